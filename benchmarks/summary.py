"""Write the table of the README from the records of the grids: every method on every stream.

    python benchmarks/summary.py

The records are those that `make results` keeps in docs/results/records.
"""

import re
from pathlib import Path

from lamina.compare import Study
from lamina.compare.rows import RowRuns

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
    """Returns final accuracy of every row of a grid, and forgetting in brackets."""
    study = Study(
        ROOT / "benchmarks" / "grids" / f"{name}.yaml",
        keep_code=True,
        records=RECORDS / f"{name}.jsonl",
    )
    (section,) = study.content("").sections
    return {line.name: cell(line.row) for line in section.lines}


def cell(row: RowRuns) -> str:
    final, forgetting = row.spread("final_accuracy"), row.spread("forgetting")[0]
    mean, deviation = row.spread("final_accuracy_micro") if final[0] is None else final  # of joint training
    if mean is None:
        return "–"
    spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
    lost = "" if forgetting is None else f" ({100 * forgetting:.1f})"
    return f"{100 * mean:.1f}{spread}{lost}"


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
