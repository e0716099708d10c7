"""One results table made by three runners: processes of this machine, submitit's local executor, and a Ray cluster of several
local nodes. Exits with code 1 where their numbers differ.

    python benchmarks/runners.py                                  # the table of the demo, an hour
    python benchmarks/runners.py GRID.yaml --only '*/finetune/*'
"""

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina.compare.rows import ACCURACIES

PORT = 6397
GRID = Path(__file__).parent / "grids" / "demo.yaml"


@contextmanager
def ray_cluster(nodes: int) -> Iterator[str]:
    """Starts a head without cores and nodes with one core each. Yields its address."""
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    memory = "--object-store-memory=80000000"
    subprocess.run(
        [*ray, "start", "--head", f"--port={PORT}", "--num-cpus=0", memory, "--include-dashboard=false"], check=True
    )
    try:
        for _ in range(nodes):
            subprocess.run([*ray, "start", f"--address=127.0.0.1:{PORT}", "--num-cpus=1", memory], check=True)
        yield f"127.0.0.1:{PORT}"
    finally:
        subprocess.run([*ray, "stop", "--force"], check=True)


def table(grid: Path, out: Path, jobs: int, only: list[str], *options: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Runs a grid, and returns the figures of every run by stream, row, seed and class order."""
    command = ["compare", str(grid), f"--cells={out / 'cells'}", f"--out={out}", f"--jobs={jobs}", *only, *options]
    subprocess.run([sys.executable, "-m", "lamina.cli", *command], check=True)
    lines = csv.DictReader(io.StringIO((out / "table.csv").read_text(encoding="utf-8")))
    key = ("stream", "row", "seed", "class_order")
    return {tuple(line[k] for k in key): tuple(line[k] for k in ACCURACIES) for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, nargs="?", default=GRID)
    parser.add_argument("--only", help="as of lamina compare")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/runners"))
    given = parser.parse_args()
    only = ["--only", given.only] if given.only else []
    found = {
        "local": table(given.grid, given.out / "local", given.jobs, only),
        "submitit": table(
            given.grid, given.out / "submitit", given.jobs, only, "--runner=slurm", "--slurm=cluster=local"
        ),
    }
    with ray_cluster(given.jobs) as address:
        found["ray"] = table(given.grid, given.out / "ray", given.jobs, only, "--runner=ray", f"--ray={address}")
    differ = [name for name, figures in found.items() if figures != found["local"]]
    runs = len(found["local"])
    print(f"{runs} runs each: " + (f"{', '.join(differ)} differ from local" if differ else "identical numbers"))
    sys.exit(1 if differ or not runs else 0)


if __name__ == "__main__":
    main()
