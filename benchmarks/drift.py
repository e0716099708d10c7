"""What drift compensation reaches of the accuracy of statistics measured again: digits in five tasks, learnt by sequential LoRA
with merged weights at the full learning rate in all tasks (or another), every seed with a class order of its own. A Markdown
table, in % of the test images at the end.

    python benchmarks/drift.py --seeds 0 1 2
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import chains

from lamina import runs
from lamina.config import RunConfig

SETTINGS: dict[str, Any] = {
    "method.name": "finetune",
    "data.source": "digits",
    "data.augment": "crop",
    "data.crop_scale": [0.6, 1.0],
    "stream.tasks": 5,
    "backbone.image_size": 32,
    "training.epochs": 8,
    "training.batch_size": 32,
    "training.head_lr": 3e-3,
    "consolidation.merging": "ema",
    "consolidation.drift": "linear",
    "consolidation.classifier": "lda",
    "consolidation.layers": 4,
}
ROWS: dict[str, dict[str, Any]] = {
    "no compensation": {"consolidation.drift": "none"},
    "linear, fitted on the examples": {"consolidation.drift_variants": 0},
    "and on 1,000 variants": {},
    "and on 2,000 variants": {"consolidation.drift_variants": 2000},
    "and on 6,000 variants": {"consolidation.drift_variants": 6000},
    "a random map of the same size": {"consolidation.drift": "random"},
    "measured again on old examples": {"consolidation.drift": "remeasured"},
}


def accuracies(seed: int, later_lr: float, folder: Path) -> dict[str, float]:
    """Returns the final accuracy of every row, in %."""

    later = {"training.later_lr": later_lr}

    def config_of(own: dict[str, Any]) -> RunConfig:
        return runs.load_config(None, [*{**SETTINGS, "seed": seed, "stream.order_seed": seed, **later, **own}.items()])

    chains.create(config_of({}), folder / "chain")
    memo: chains.Memo = {}
    found = {}
    for number, (name, own) in enumerate(ROWS.items()):
        record = chains.replay(folder / "chain", config_of(own), folder / str(number), memo)
        found[name] = 100 * record.metrics.final_accuracy
        print(f"seed {seed}, {name}: {found[name]:.1f} %", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--later-lr", type=float, default=1.0, help="factor of the learning rate after the first task")
    options = parser.parse_args()
    seeds = options.seeds
    with tempfile.TemporaryDirectory() as folder:
        found = [accuracies(seed, options.later_lr, Path(folder) / str(seed)) for seed in seeds]
    print(f"| statistics of old classes | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |")
    print("|---" + "|---:" * (len(seeds) + 1) + "|")
    for name in ROWS:
        values = [accuracy[name] for accuracy in found]
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} | {mean(values):.1f} |")


if __name__ == "__main__":
    main()
