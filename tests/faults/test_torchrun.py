"""`torchrun -m lamina run`: the result of one process, also where a process is killed and torchrun starts all again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.faults.processes import SMALL

SETTINGS = [f"--set={key}={value}" for key, value in (SMALL | {"training.epochs": 6, "checkpoint_seconds": 0}).items()]


def launch(*arguments: str, processes: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, f"--max-restarts={restarts}", "-m", "lamina", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=600)
    return process.returncode, out


def result(out: Path) -> dict[str, Any]:
    found = json.loads((out / "results.json").read_text())
    return {key: found[key] for key in ("matrix", "task_aware", "classes", "batch")}


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"lamina" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def begun(out: Path) -> bool:
    """Whether the second task is being trained."""
    states = sorted((out / "checkpoints").glob("[0-9]*/state.json"))
    try:
        position = json.loads(states[-1].read_text())["position"] if states else {}
    except (OSError, ValueError):
        return False
    return bool(position.get("task") == 1 and position.get("phase") == "train" and position.get("step", 0) > 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "run", "--method=inflora", *SETTINGS, f"--out={out}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return result(out)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_a_killed_process_changes_nothing(tmp_path: Path, alone: dict[str, Any], sharded: str):
    out = tmp_path / "run"
    command = ["run", "--method=inflora", *SETTINGS, f"--set=backbone.shard={sharded}", f"--out={out}"]
    process = launch(*command, restarts=2)
    wait_for(lambda: begun(out), process)
    os.kill(workers(process)[-1], signal.SIGKILL)
    code, said = finish(process)
    assert code == 0, said
    assert result(out) == alone
    assert said.count("Open the report") == 1, "one process speaks"
    assert ("MB in each of 2 processes" in said) == (sharded == "true")
    code, said = finish(launch(*command))
    assert (code, said.count("Open the report")) == (0, 1), "it is finished"


@pytest.mark.slow
def test_asked_to_stop_all_stop_and_go_on_later(tmp_path: Path, alone: dict[str, Any]):
    out = tmp_path / "run"
    process = launch("run", "--method=inflora", *SETTINGS, f"--out={out}")
    wait_for(lambda: begun(out), process)
    os.kill(process.pid, signal.SIGTERM)
    code, said = finish(process)
    assert code != 0
    assert f"Continue with: lamina resume {out}" in said
    code, said = finish(launch("resume", str(out), processes=2))
    assert code == 0, said
    assert result(out) == alone


@pytest.mark.slow
def test_a_process_that_is_lost_before_they_have_met_keeps_none_waiting(tmp_path: Path):
    script = tmp_path / "meet.py"
    script.write_text(MEETING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "0 of 2 met at start 1", "1 of 2 met at start 1"]


MEETING = """
import os, sys, time
import torch.distributed as dist
from lamina.engine import world

start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if (start, rank) == (0, 1):
    store, *_ = next(iter(dist.rendezvous("env://")))
    store.get(world._OFFER)
    sys.exit(1)
if (start, rank) == (1, 0):
    time.sleep(3)  # the other one finds the old offer
met = world.join()
met.wait()
sys.stdout.write(f"{met.rank} of {met.size} met at start {start}\\n")
world.leave()
"""


@pytest.mark.slow
def test_a_single_process_goes_on_after_a_loss_as_well(tmp_path: Path, alone: dict[str, Any]):
    out = tmp_path / "run"
    process = launch("run", "--method=inflora", *SETTINGS, f"--out={out}", processes=1, restarts=1)
    wait_for(lambda: begun(out), process)
    os.kill(workers(process)[0], signal.SIGKILL)
    code, said = finish(process)
    assert code == 0, said
    assert result(out) == alone


@pytest.mark.slow
def test_what_several_processes_cannot_do(tmp_path: Path):
    out = tmp_path / "run"
    code, said = finish(launch("run", "--method=color", *SETTINGS, "--jobs=2", f"--out={out}"))
    assert code != 0
    assert "jobs = 2: tasks are trained in parallel by one process" in said
    short = [*SETTINGS, "--set=stream.first=1", "--set=training.epochs=1"]
    code, said = finish(launch("run", "--method=finetune", *short, f"--out={out}"))
    assert code == 0, said
    code, said = finish(launch("run", "--method=ewc", *short, f"--out={out}"))
    assert code != 0
    assert "holds a run of other settings (method" in said
    before = (out / "config.json").read_text()
    code, said = finish(launch("run", "--method=finetune", *short, "--set=backbone.name=other", f"--out={out}"))
    assert code != 0
    assert "holds a run of other settings (backbone" in said
    (out / "results.json").unlink()
    for options, told in ((("--jobs=2",), "jobs = 2: tasks are trained"), (("--data=nowhere",), "nowhere")):
        code, said = finish(launch("resume", str(out), *options))
        assert code != 0
        assert told in said
        assert (out / "config.json").read_text() == before, "what is refused changes nothing"
    code, said = finish(launch("run", "--method=finetune", *short, "--set=backbone.shard=true", f"--out={out}"))
    assert code == 0, said
    assert "MB in each of 2 processes" in said, "a setting that changes no result may change"
    made = json.loads((out / "results.json").read_text())
    assert made["machine"]["processes"] == 2
