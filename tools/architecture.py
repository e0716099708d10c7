"""Draw docs/architecture.svg: the packages of lamina by level, and their imports, read from the code.

python tools/architecture.py            writes the drawing, and the table of docs/architecture.md
python tools/architecture.py --check    exits with 1 if they are not those of the code
"""

import ast
import sys
from pathlib import Path

from markupsafe import Markup, escape

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lamina"
PAGE, DRAWING = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
BEGIN, END = "<!-- parts -->", "<!-- /parts -->"
WIDTH, HEIGHT, GAP, MARGIN = 112, 34, 62, 16


def parts() -> dict[str, set[str]]:
    """Returns the modules and packages directly in lamina, each with those it imports."""
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    names -= {"__init__"}
    found: dict[str, set[str]] = {name: set() for name in sorted(names)}
    for file in SOURCE.rglob("*.py"):
        own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("lamina") or own == "__init__":
                continue
            inner = str(node.module).split(".")[1:2] or [alias.name for alias in node.names]
            found[own] |= {name for name in inner if name in names and name != own}
    return found


def levels(imports: dict[str, set[str]]) -> list[list[str]]:
    """Returns the parts, each one level above the highest part it imports. Raises ValueError on a cycle."""
    level: dict[str, int] = {}
    while len(level) < len(imports):
        ready = [n for n, needs in imports.items() if n not in level and needs <= level.keys()]
        if not ready:
            raise ValueError(f"an import cycle among {sorted(imports.keys() - level.keys())}")
        level |= {name: 1 + max((level[n] for n in imports[name]), default=-1) for name in ready}
    return [sorted(n for n, own in level.items() if own == number) for number in range(max(level.values()) + 1)]


def without_shortcuts(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns the imports that no chain of other imports implies, so that the drawing can be read."""

    def reach(name: str) -> set[str]:
        return imports[name].union(*(reach(inner) for inner in imports[name]))

    return {
        name: {n for n in needs if not any(n in reach(other) for other in needs - {n})}
        for name, needs in imports.items()
    }


def drawing(imports: dict[str, set[str]]) -> str:
    rows = levels(imports)
    width = max(map(len, rows)) * (WIDTH + 28) + 2 * MARGIN
    height = len(rows) * (HEIGHT + GAP) - GAP + 2 * MARGIN
    place: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        for k, name in enumerate(row):
            x = width / 2 + (k - (len(row) - 1) / 2) * (WIDTH + 28)
            place[name] = x, height - MARGIN - HEIGHT / 2 - number * (HEIGHT + GAP)
    lines = [
        Markup('<path d="M{:.0f} {:.0f}C{:.0f} {:.0f} {:.0f} {:.0f} {:.0f} {:.0f}"/>').format(
            x, y + HEIGHT / 2, x, y + HEIGHT / 2 + 34, to_x, to_y - HEIGHT / 2 - 34, to_x, to_y - HEIGHT / 2 - 6
        )
        for name, needs in without_shortcuts(imports).items()
        for x, y in [place[name]]
        for to_x, to_y in (place[n] for n in sorted(needs))
    ]
    boxes = [
        Markup(
            '<rect x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="5"/><text x="{:.0f}" y="{:.0f}">{}</text>'
        ).format(x - WIDTH / 2, y - HEIGHT / 2, WIDTH, HEIGHT, x, y + 5, escape(name))
        for name, (x, y) in sorted(place.items())
    ]
    style = (
        "path{fill:none;stroke:#6b7a90;stroke-width:1.3;marker-end:url(#a)}rect{fill:#f4f6fa;stroke:#33415c}"
        "text{font:14px system-ui,sans-serif;text-anchor:middle;fill:#111827}.page{fill:#fff;stroke:none}"
    )
    arrow = (
        '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill:#6b7a90;stroke:none"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>The parts of lamina and their imports</title><style>{style}</style><defs>{arrow}</defs>"
        f'<rect class="page" width="{width}" height="{height}"/>{"".join(lines)}{"".join(boxes)}</svg>\n'
    )


def table(imports: dict[str, set[str]]) -> str:
    """Returns the parts from the highest level to the lowest, each with the first sentence of its docstring."""
    lines = ["| level | part | what it is |", "|---:|---|---|"]
    for number, row in reversed(list(enumerate(levels(imports)))):
        for name in row:
            folder, file = SOURCE / name, SOURCE / f"{name}.py"
            text = (file if file.is_file() else folder / "__init__.py").read_text(encoding="utf-8")
            what = " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
            lines.append(f"| {number} | `{name}` | {what} |")
    return "\n".join(lines)


def main() -> None:
    imports = parts()
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    wanted = {DRAWING: drawing(imports), PAGE: f"{head}{BEGIN}\n{table(imports)}\n{END}{tail}"}
    if "--check" in sys.argv:
        stale = [
            path.name for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        if stale:
            sys.exit(f"{', '.join(stale)}: not as in the code; run python tools/architecture.py")
        return
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
