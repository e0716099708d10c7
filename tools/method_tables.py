"""Write the tables of methods into the documentation, from the methods themselves.

python tools/method_tables.py
"""

import re
from pathlib import Path

from lamina.methods import table

DOCS = Path(__file__).resolve().parents[1] / "docs"
COLUMNS = {
    DOCS / "index.md": ["method", "paper", "when to use"],
    DOCS / "choosing.md": ["method", "paper", "examples", "task count", "cost per task", "when to use"],
}


def written(columns: list[str]) -> str:
    """Returns these columns of the table in Markdown. Every method links to its page."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in table():
        cells = row | {"method": f"[`{row['method']}`](papers/{row['method']}.md)"}
        lines.append(f"| {' | '.join(cells[column] for column in columns)} |")
    return "\n".join(lines)


def filled(page: Path) -> str:
    """Returns the text of a page with its table."""
    found = f"<!-- methods -->\n{written(COLUMNS[page])}\n<!-- /methods -->"
    text = page.read_text(encoding="utf-8")
    return re.sub("<!-- methods -->.*<!-- /methods -->", lambda _: found, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in COLUMNS:
        page.write_text(filled(page), encoding="utf-8")
