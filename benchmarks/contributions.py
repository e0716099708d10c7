"""Contribution of each part of consolidation to a method, and difference of `lamina` from the papers' methods.

    python benchmarks/contributions.py docs/results/lattice.md

writes two parts of the page, each between its two markers, from the records. The contribution of a part is its Shapley value:
its gain in final accuracy, averaged over all orders in which the four parts can be added, so that the four sum to the whole
gain. Drift compensation moves statistics, so without a unified classifier it adds 0.
"""

import re
import sys
from collections.abc import Mapping
from itertools import permutations
from math import factorial
from pathlib import Path

from lamina.compare import Study, stats

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER, DRIFT = "unified classifier", "drift compensation"
PARTS = {
    "chain": ("init", "fresh", "chain"),
    "weight merging": ("merging", "none", "ema"),
    DRIFT: ("drift", "none", "linear"),
    CLASSIFIER: ("classifier", "own", "lda"),
}
"""Each part of consolidation: its setting, and the value without and with it."""
METHODS = ("finetune", "inflora", "clora")
TABLES = {
    "cifar100": "Split CIFAR-100, 10 tasks",
    "cifar100x20": "20 tasks",
    "pacs": "PACS",
    "clinc150": "CLINC150",
}
NO_PAPERS = ("lamina", "finetune", "prototype", "frozen + LDA", "joint")
Seeds = dict[int, float]
"""Final accuracy by seed."""


def study_of(name: str) -> Study:
    grid, records = ROOT / f"benchmarks/grids/{name}.yaml", ROOT / f"docs/results/records/{name}.jsonl"
    return Study(grid, keep_code=True, records=records)


def rows_of(study: Study) -> dict[str, dict[str, Seeds]]:
    """Returns the final accuracies by stream and row."""
    return {
        section.name: {
            line.name: {run.seed: run.record.metrics.final_accuracy for run in line.row.runs} for line in section.lines
        }
        for section in study.content("").sections
    }


def difference(values: Seeds, against: Seeds) -> str:
    """Returns the mean difference in points, and its paired interval."""
    gain = stats.paired({(s, None): v for s, v in values.items()}, {(s, None): v for s, v in against.items()})
    if gain is None:
        return "–"
    spread = "" if gain.low is None or gain.high is None else f" [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    return f"{100 * gain.mean:+.1f}{spread}"


def mean(values: Seeds) -> str:
    return f"{100 * sum(values.values()) / len(values):.1f}" if values else "–"


# -------------------------------------------------------------------------------------------------- contributions


def shapley(accuracies: Mapping[frozenset[str], float]) -> dict[str, float]:
    """Returns the value of every part, from the accuracy with every set of them."""
    found = dict.fromkeys(PARTS, 0.0)
    for order in permutations(PARTS):
        for place, part in enumerate(order):
            before = frozenset(order[:place])
            found[part] += (accuracies[before | {part}] - accuracies[before]) / factorial(len(PARTS))
    return found


def row_of(method: str, on: frozenset[str]) -> str:
    """Returns the name of the row with these parts."""
    on = on if CLASSIFIER in on else on - {DRIFT}
    return ", ".join([method, *(f"{key} {values[part in on]}" for part, (key, *values) in PARTS.items())])


def contributions() -> str:
    sets = [frozenset(part for k, part in enumerate(PARTS) if mask >> k & 1) for mask in range(2 ** len(PARTS))]
    tables = []
    for stream, rows in rows_of(study_of("lattice")).items():
        lines = [
            "| Method | No part | " + " | ".join(PARTS) + " | All four |",
            "|---|" + "---:|" * (len(PARTS) + 2),
        ]
        for method in METHODS:
            seeds = set.intersection(*(set(rows.get(row_of(method, on), {})) for on in sets))
            if not seeds:
                continue
            values = {s: shapley({on: rows[row_of(method, on)][s] for on in sets}) for s in sorted(seeds)}
            zero = dict.fromkeys(seeds, 0.0)
            off, on = (
                mean({s: rows[row_of(method, which)][s] for s in seeds}) for which in (frozenset(), frozenset(PARTS))
            )
            gains = " | ".join(difference({s: values[s][part] for s in seeds}, zero) for part in PARTS)
            lines.append(f"| `{method}` | {off} | {gains} | {on} |")
        if len(lines) > 2:
            tables.append(f"### {stream}\n\n" + "\n".join(lines))
    return "\n\n".join(tables)


# -------------------------------------------------------------------------------------------------- against the papers


def against_the_papers() -> str:
    """Returns `lamina` minus every paper's method, on the streams of the tables; a dash where a table has no such row."""
    found = {title: next(iter(rows_of(study_of(name)).values())) for name, title in TABLES.items()}
    papers = [row for row in next(iter(found.values())) if row not in NO_PAPERS]
    lines = ["| `lamina` minus | " + " | ".join(found) + " |", "|---|" + "---:|" * len(found)]
    for row in [*papers, "finetune", "prototype", "frozen + LDA"]:
        cells = (
            f"{difference(rows['lamina'], rows.get(row, {}))}" + (" **best**" if row == best(rows, papers) else "")
            for rows in found.values()
        )
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    lines.append("| `lamina` itself | " + " | ".join(mean(rows["lamina"]) for rows in found.values()) + " |")
    return "\n".join(lines)


def best(rows: Mapping[str, Seeds], papers: list[str]) -> str:
    tried = [row for row in papers if rows.get(row)]
    return max(tried, key=lambda row: sum(rows[row].values()) / len(rows[row]))


def main() -> None:
    page = Path(sys.argv[1])
    text = page.read_text(encoding="utf-8")
    for name, content in (("contributions", contributions()), ("papers", against_the_papers())):
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = block.subn(lambda m, c=content: m[1] + "\n" + c + "\n\n" + m[2], text)  # type: ignore[misc]
        assert count == 1, f"{page} needs the two markers of {name} once"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
