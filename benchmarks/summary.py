"""Write the table of the README from the records of the grids: every method on every stream.

    python benchmarks/summary.py

The records are those that `make results` keeps in docs/results/records.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.compare import Study

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "results" / "records"
STREAMS = {
    "demo": "digits, 5 tasks (the demo)",
    "cifar100": "Split CIFAR-100, 10 tasks",
    "pacs": "PACS, 4 domains",
    "clinc150": "CLINC150, 10 domains of text",
}
BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)


def column(name: str) -> dict[str, str]:
    """Final accuracy of every row of a grid, and in brackets how much was forgotten."""
    study = Study(
        ROOT / "benchmarks" / "grids" / f"{name}.yaml",
        keep_code=True,
        records=RECORDS / f"{name}.jsonl",
    )
    (section,) = study.content("").sections
    return {line.name: cell(line.record["figures"]) for line in section.lines}


def cell(figures: Mapping[str, Mapping[str, Any]]) -> str:
    final, forgotten = figures["final_accuracy"], figures["forgetting"]
    if final["mean"] is None:  # all tasks at once
        final = figures["final_accuracy_micro"]
    if final["mean"] is None:
        return "–"
    spread = "" if final["std"] is None else f" ± {100 * final['std']:.1f}"
    lost = "" if forgotten["mean"] is None else f" ({100 * forgotten['mean']:.1f})"
    return f"{100 * final['mean']:.1f}{spread}{lost}"


def main() -> None:
    columns = {name: column(name) for name in STREAMS if (RECORDS / f"{name}.jsonl").exists()}
    names = list(dict.fromkeys(name for found in reversed(columns.values()) for name in found))
    head = [f"[{STREAMS[name]}](docs/results/{name}.md)" for name in columns]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    lines += [
        f"| `{name}` | " + " | ".join(found.get(name, "–") for found in columns.values()) + " |" for name in names
    ]
    readme = ROOT / "README.md"
    text, count = BLOCK.subn(lambda m: m[1] + "\n".join(lines) + "\n" + m[2], readme.read_text(encoding="utf-8"))
    assert count == 1
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
