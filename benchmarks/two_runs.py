"""Two runs on one machine: milliseconds per training step, alone and side by side, by what waiting threads do.

    python benchmarks/two_runs.py     writes docs/results/records/two_runs.json; bench.py --page shows it

Every run has as many threads as the machine has cores. With `OMP_WAIT_POLICY=passive`, the command's default, waiting threads
sleep; with OpenMP's own default they spin first.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import TWO_RUNS, machine

POLICIES = {"passive": {"OMP_WAIT_POLICY": "passive"}, "OpenMP's default": {"OMP_WAIT_POLICY": ""}}
REPEATS = 1
MOST = 60.0
"""Seconds after which runs are stopped."""


def command(out: Path, precision: str) -> list[str]:
    settings = {
        "training.batch_size": 32,
        "evaluation.per_class": 5,
        "threads": os.cpu_count(),
        "precision": precision,
        "checkpoint_seconds": 600,
    }
    given = ["--data", "digits", "--tasks", "2", "--method", "finetune", "--image-size", "32", "--epochs", "3"]
    given += ["--per-class", "40", "--out", str(out)]
    return [sys.executable, "-m", "lamina.cli", "run", *given, *(f"--set={k}={v}" for k, v in settings.items())]


def measure(runs: int, precision: str, policy: str) -> list[float | None]:
    """Returns the milliseconds per training step of runs that start together; None for one that was stopped."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | POLICIES[policy]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(number) for number in range(runs)]
        silent = subprocess.DEVNULL
        started = [
            subprocess.Popen(command(out, precision), env=environment, stdout=silent, stderr=silent) for out in outs
        ]
        found: list[float | None] = []
        for process, out in zip(started, outs, strict=True):
            try:
                process.wait(MOST)
                cost = json.loads((out / "results.json").read_text(encoding="utf-8"))["cost"]
                found.append(1000 * cost["seconds"]["train"] / cost["steps"])
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                found.append(None)
        return found


def main() -> None:
    rows = []
    for precision in ("fp32", "bf16"):
        for policy in POLICIES:
            found = {
                name: [value for _ in range(REPEATS) for value in measure(runs, precision, policy)]
                for name, runs in (("alone_ms", 1), ("two_runs_ms", 2))
            }
            rows.append({"precision": precision, "policy": policy, **found})
            print(json.dumps(rows[-1]), flush=True)
    TWO_RUNS.write_text(
        json.dumps({"machine": machine(), "limit_s": MOST, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
