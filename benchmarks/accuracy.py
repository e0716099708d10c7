"""The effect of bf16 on accuracy: whole runs of InfLoRA in bf16 and in fp32 on one stream, with the same seeds.

    python benchmarks/accuracy.py        Split CIFAR-100 in ten tasks, 15 images per class, four epochs; three seeds

Any CPU will do; without bf16 instructions a run in bf16 takes seven minutes or more. Prints a line of JSON per seed and adds
it to docs/results/records/accuracy.jsonl, from which `bench.py --page` makes a section. Needs ../shared/data/cifar100.
"""

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

from bench import ACCURACY, machine
from rivals import lamina_run
from run import configuration, decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="inflora")
    parser.add_argument("--per-class", type=int, default=15, help="training images of each class, of 500")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for seed in options.seeds:
        line = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "method": options.method,
            "per_class": options.per_class,
            "epochs": options.epochs,
            "seed": seed,
        }
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            more = {"training.epochs": options.epochs, "seed": seed}
            config = configuration(options.method, options.per_class, Path(folder) / "cache", **more)
            decode(config)
            for kind in ("fp32", "bf16"):
                out = Path(folder) / kind
                line[kind] = round(lamina_run(config, out, method=options.method, wanted=kind).accuracy, 4)
        with ACCURACY.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
