"""What each switch around a method contributes, and what `lamina` gains over the papers' methods.

    python benchmarks/contributions.py docs/results/lattice.md

writes two parts of the page, each between its two markers, from the records. A switch's Shapley value is what it adds to the
final accuracy, averaged over all orders in which the four could be switched on, so that the four add up to the whole gain. The
shift moves statistics, so without a unified head it does nothing, and adds 0.
"""

import re
import sys
from collections.abc import Mapping
from itertools import permutations
from math import factorial
from pathlib import Path

from lamina.compare import Study, stats

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = {
    "chain": ("fresh", "chain"),
    "average": ("none", "ema"),
    "shift": ("none", "linear"),
    "tail": ("local", "lda"),
}
NAME = "{method}, init {chain}, merge {average}, drift {shift}, head {tail}"
METHODS = ("finetune", "inflora", "clora")
TABLES = {
    "cifar100": "Split CIFAR-100, 10 tasks",
    "cifar100x20": "20 tasks",
    "pacs": "PACS",
    "clinc150": "CLINC150",
}
NO_PAPERS = ("lamina", "finetune", "prototype", "frozen", "joined")
Seeds = dict[int, float]
"""Final accuracy by seed."""


def study_of(name: str) -> Study:
    grid, records = ROOT / f"benchmarks/grids/{name}.yaml", ROOT / f"docs/results/records/{name}.jsonl"
    return Study(grid, keep_code=True, records=records)


def rows_of(study: Study) -> dict[str, dict[str, Seeds]]:
    """By stream and row."""
    return {
        section.name: {
            line.name: {run["seed"]: run["figures"]["final_accuracy"] for run in line.record["runs"]}
            for line in section.lines
        }
        for section in study.content("").sections
    }


def told(values: Seeds, against: Seeds) -> str:
    """Mean difference in points, and its paired interval."""
    gain = stats.paired({(s, None): v for s, v in values.items()}, {(s, None): v for s, v in against.items()})
    if gain is None:
        return "–"
    spread = "" if gain.low is None or gain.high is None else f" [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    return f"{100 * gain.mean:+.1f}{spread}"


def mean(values: Seeds) -> str:
    return f"{100 * sum(values.values()) / len(values):.1f}" if values else "–"


# -------------------------------------------------------------------------------------------------- contributions


def shapley(accuracies: Mapping[frozenset[str], float]) -> dict[str, float]:
    """The value of every switch, from the accuracy with every set of them switched on."""
    found = dict.fromkeys(SWITCHES, 0.0)
    for order in permutations(SWITCHES):
        for place, switch in enumerate(order):
            before = frozenset(order[:place])
            found[switch] += (accuracies[before | {switch}] - accuracies[before]) / factorial(len(SWITCHES))
    return found


def row_of(method: str, on: frozenset[str]) -> str:
    on = on if "tail" in on else on - {"shift"}
    return NAME.format(method=method, **{name: values[name in on] for name, values in SWITCHES.items()})


def contributions() -> str:
    sets = [frozenset(s for k, s in enumerate(SWITCHES) if mask >> k & 1) for mask in range(2 ** len(SWITCHES))]
    parts = []
    for stream, rows in rows_of(study_of("lattice")).items():
        lines = [
            "| Method | All off | " + " | ".join(SWITCHES) + " | All on |",
            "|---|" + "---:|" * (len(SWITCHES) + 2),
        ]
        for method in METHODS:
            seeds = set.intersection(*(set(rows.get(row_of(method, on), {})) for on in sets))
            if not seeds:
                continue
            values = {s: shapley({on: rows[row_of(method, on)][s] for on in sets}) for s in sorted(seeds)}
            zero = dict.fromkeys(seeds, 0.0)
            off, on = (
                mean({s: rows[row_of(method, which)][s] for s in seeds}) for which in (frozenset(), frozenset(SWITCHES))
            )
            gains = " | ".join(told({s: values[s][switch] for s in seeds}, zero) for switch in SWITCHES)
            lines.append(f"| `{method}` | {off} | {gains} | {on} |")
        if len(lines) > 2:
            parts.append(f"### {stream}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


# -------------------------------------------------------------------------------------------------- against the papers


def against_the_papers() -> str:
    """`lamina` less every paper's method, on the streams of the tables. A dash where a table has no such row."""
    found = {title: next(iter(rows_of(study_of(name)).values())) for name, title in TABLES.items()}
    papers = [row for row in next(iter(found.values())) if row not in NO_PAPERS]
    lines = ["| `lamina` minus | " + " | ".join(found) + " |", "|---|" + "---:|" * len(found)]
    for row in [*papers, "finetune", "prototype", "frozen"]:
        cells = (
            f"{told(rows['lamina'], rows.get(row, {}))}" + (" **best**" if row == best(rows, papers) else "")
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
