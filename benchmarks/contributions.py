"""What each switch around a method contributes: Shapley values of final accuracy, from the records of the lattice.

    python benchmarks/contributions.py docs/results/lattice.md

writes, between the two markers of the page, a table for every stream. A switch's Shapley value is what it adds to the final
accuracy, averaged over all orders in which the four could be switched on, so that the four add up to the whole gain. The shift
moves statistics, so without a unified head it does nothing, and adds 0.
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
BLOCK = re.compile(r"(<!-- contributions -->\n).*?(<!-- /contributions -->)", re.DOTALL)


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


def main() -> None:
    page = Path(sys.argv[1])
    study = Study(
        ROOT / "benchmarks" / "grids" / "lattice.yaml",
        keep_code=True,
        records=ROOT / "docs/results/records/lattice.jsonl",
    )
    sets = [frozenset(s for k, s in enumerate(SWITCHES) if mask >> k & 1) for mask in range(2 ** len(SWITCHES))]
    parts = []
    for section in study.content("").sections:
        rows = {
            line.name: {run["seed"]: run["figures"]["final_accuracy"] for run in line.record["runs"]}
            for line in section.lines
        }
        lines = [
            "| Method | All off | " + " | ".join(SWITCHES) + " | All on |",
            "|---|" + "---:|" * (len(SWITCHES) + 2),
        ]
        for method in METHODS:
            seeds = set.intersection(*(set(rows[row_of(method, on)]) for on in sets))
            if not seeds:
                continue
            by_seed = {seed: {on: rows[row_of(method, on)][seed] for on in sets} for seed in sorted(seeds)}
            values = {seed: shapley(accuracies) for seed, accuracies in by_seed.items()}
            ends = [
                100 * sum(a[on] for a in by_seed.values()) / len(seeds) for on in (frozenset(), frozenset(SWITCHES))
            ]
            told = []
            for switch in SWITCHES:
                gain = stats.paired({(s, None): values[s][switch] for s in seeds}, {(s, None): 0.0 for s in seeds})
                assert gain is not None
                spread = (
                    "" if gain.low is None or gain.high is None else f" [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
                )
                told.append(f"{100 * gain.mean:+.1f}{spread}")
            lines.append(f"| `{method}` | {ends[0]:.1f} | " + " | ".join(told) + f" | {ends[1]:.1f} |")
        parts.append(f"### {section.name}\n\n" + "\n".join(lines))
    text, count = BLOCK.subn(
        lambda m: m[1] + "\n" + "\n\n".join(parts) + "\n\n" + m[2], page.read_text(encoding="utf-8")
    )
    assert count == 1, f"{page} needs the two markers once"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
