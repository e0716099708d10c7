"""A comparison on this machine, on submitit's local executor and on a Ray cluster of several nodes: the same table, also where
a worker, a node and the comparison itself are killed."""

import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.faults import pretend_slurm
from tests.grids import write_grid

from lamina.compare import lease

GRID = """\
base:
  data: {source: digits, per_class: 12, test_fraction: 0.1}
  backbone: {image_size: 32}
  stream: {tasks: 2}
  training: {epochs: 6, batch_size: 8}
  checkpoint_seconds: 0
methods: {finetune: {}, prototype: {}}
seeds: [0, 1, 2]
jobs: 2
"""
NODES = 2
PORT = 6395


def command(grid: Path, cells: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lamina.cli", "compare", str(grid), f"--cells={cells}", f"--out={cells}-out", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    return out


def figures(cells: Path) -> list[tuple[str, ...]]:
    lines = csv.DictReader(io.StringIO(Path(f"{cells}-out/table.csv").read_text()))
    wanted = ("row", "seed", "final_accuracy", "average_accuracy", "forgetting", "task_inference_accuracy")
    return [tuple(line[key] for key in wanted) for line in lines]


def wait_for(what: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs_at_work(cells: Path) -> dict[Path, int]:
    """The processes of runs that train, by their cell."""
    found = {}
    for file in cells.glob(f"finetune-*/{lease.FILE}"):
        try:
            pid = int(json.loads(file.read_text())["pid"])
            os.kill(pid, 0)
        except (OSError, ValueError):
            continue
        if (file.parent / "run" / "checkpoints").exists() and not (file.parent / "run" / "results.json").exists():
            found[file.parent] = pid
    return found


def finished(cells: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cells.glob("*/run/results.json")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ...]]:
    """The table of an undisturbed comparison on this machine."""
    folder = tmp_path_factory.mktemp("local")
    finish(command(write_grid(folder, GRID), folder / "cells"))
    found = figures(folder / "cells")
    assert len(found) == 6
    return found


def disturbed(folder: Path, options: list[str], kill_node: Callable[[Path], None] | None = None) -> str:
    """Kills a run, then a node, then the comparison, and gives the command again. Returns what the first one said."""
    grid, cells = write_grid(folder, GRID), folder / "cells"
    first = command(grid, cells, *options)
    try:
        wait_for(lambda: runs_at_work(cells))
        cell, pid = next(iter(runs_at_work(cells).items()))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: runs_at_work(cells).get(cell, pid) != pid or (cell / "run" / "results.json").exists())
        if kill_node:
            wait_for(lambda: runs_at_work(cells))
            kill_node(next(iter(runs_at_work(cells))))
        wait_for(lambda: runs_at_work(cells))
    finally:
        os.kill(first.pid, signal.SIGKILL)
    said, _ = first.communicate(timeout=60)
    done = finished(cells)
    finish(command(grid, cells, *options))
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what is finished is not run again"
    assert len(finished(cells)) == 6
    return said


@pytest.mark.slow
def test_killed_on_this_machine(tmp_path: Path, reference: list[tuple[str, ...]]) -> None:
    """A run that is killed has failed here; the command given again continues it. It outlives a comparison that is killed."""
    grid, cells = write_grid(tmp_path, GRID), tmp_path / "cells"
    first = command(grid, cells)
    wait_for(lambda: runs_at_work(cells))
    os.kill(next(iter(runs_at_work(cells).values())), signal.SIGKILL)
    wait_for(lambda: any(cells.glob("*/failed.txt")) and runs_at_work(cells))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    assert runs_at_work(cells), "they go on without it"
    done = finished(cells)
    finish(command(grid, cells))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert figures(cells) == reference


@pytest.mark.slow
def test_killed_under_submitit(tmp_path: Path, reference: list[tuple[str, ...]]) -> None:
    said = disturbed(tmp_path, ["--runner=slurm", "--slurm=cluster=local", "--jobs=2"])
    assert "its process or machine was lost; it continues elsewhere from its last checkpoint" in said
    assert figures(tmp_path / "cells") == reference


@pytest.mark.slow
def test_jobs_of_slurm(tmp_path: Path, reference: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is over for one job, which saves and is queued again. The comparison is killed while the rest waits in the queue."""
    for name, value in pretend_slurm.install(tmp_path).items():
        monkeypatch.setenv(name, value)
    grid, cells = write_grid(tmp_path, GRID), tmp_path / "cells"
    submitted = tmp_path / "state" / "submitted"
    first = command(grid, cells, "--runner=slurm", "--slurm=partition=all")
    try:
        wait_for(lambda: runs_at_work(cells))
        cell, pid = next(iter(runs_at_work(cells).items()))
        job = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(job, signal.SIGUSR2)
        wait_for(lambda: runs_at_work(cells).get(cell, pid) != pid or (cell / "run" / "results.json").exists())
    finally:
        os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    assert "#SBATCH --partition=all" in Path(submitted.read_text().splitlines()[0]).read_text()
    assert (cell / "log.txt").read_text().count("lamina run-cell") == 2
    finish(command(grid, cells, "--runner=slurm", "--slurm=partition=all"))
    assert len(submitted.read_text().splitlines()) == 1, "one array, and nothing is submitted twice"
    assert figures(cells) == reference

    monkeypatch.setenv("PRETEND_WAIT", "20")
    again = command(grid, tmp_path / "late", "--runner=slurm")
    wait_for(
        lambda: len(submitted.read_text().splitlines()) == 2 and len([*(tmp_path / "late").glob("*/job.json")]) == 6
    )
    os.kill(again.pid, signal.SIGTERM)
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 130
    assert "the jobs go on in SLURM" in said
    finish(command(grid, tmp_path / "late", "--runner=slurm"))
    assert len(submitted.read_text().splitlines()) == 2, "what waits in the queue stays there"
    assert figures(tmp_path / "late") == reference


@pytest.fixture
def ray_nodes(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """A Ray cluster on this machine: a head without cores, and nodes with one core each. Each is a session of its own."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs ray: pip install 'lamina[ray]'")
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=80000000"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, told: bytes, *options: str) -> None:
        with (tmp_path / f"{name}.log").open("wb") as log:
            nodes[name] = subprocess.Popen(
                [*ray, *options], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait_for(lambda: told in (tmp_path / f"{name}.log").read_bytes(), 120)

    try:
        start("head", b"ray start --address", "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")
        for number in range(NODES):
            start(f"node{number}", b"Ray runtime started", f"--address=127.0.0.1:{PORT}", "--num-cpus=1")
        yield nodes
    finally:
        for process in nodes.values():
            kill_session(process)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kills every process of its session, as a machine that loses power does."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == process.pid:
            os.kill(int(stat.parent.name), signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_on_a_ray_cluster(
    tmp_path: Path, reference: list[tuple[str, ...]], ray_nodes: dict[str, subprocess.Popen[bytes]]
) -> None:
    def kill_node(_: Path) -> None:
        kill_session(ray_nodes.pop("node0"))

    options = ["--runner=ray", f"--ray=127.0.0.1:{PORT}"]
    said = disturbed(tmp_path, options, kill_node)
    assert "its process or machine was lost; it continues elsewhere from its last checkpoint" in said
    assert figures(tmp_path / "cells") == reference
