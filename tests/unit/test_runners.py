"""Cells on other machines: leases, what a runner starts, how an attempt ended, and what a machine or cluster lacks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from tests.grids import Ended, write_grid

from lamina import __version__
from lamina.compare import cell_run, lease, runners
from lamina.compare.cells import Place, code_hash
from lamina.compare.grid import Grid
from lamina.compare.runners import LOST, Remote, Resources, Started
from lamina.compare.work import Job, Watch, work
from lamina.errors import ConfigError

HERE = lease._here


# ---------------------------------------------------------------------------------------------- leases


def written(folder: Path, **changes: object) -> Path:
    content = {"token": "theirs", "who": "process 5", **HERE(), "pid": os.getpid()} | changes
    (folder / lease.FILE).write_text(json.dumps(content))
    return folder / lease.FILE


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_a_cell_is_leased_once(tmp_path: Path):
    mine = lease.claim(tmp_path, "process 7")
    assert mine is not None
    assert lease.claim(tmp_path, "process 8") is None
    assert (lease.holder(tmp_path) or "").startswith("process 7 on ")
    assert Place(tmp_path).lock() is None, "nor may a comparison here start it"
    assert Place(tmp_path).holder().startswith("process 7 on ")
    mine.release()
    assert lease.holder(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] or not list(tmp_path.iterdir())


def test_a_process_of_this_machine_that_is_gone_holds_nothing(tmp_path: Path):
    written(tmp_path, pid=dead_process())
    assert lease.holder(tmp_path) is None
    assert lease.claim(tmp_path, "me") is not None


@pytest.mark.parametrize("what", ["host", "boot", "processes"])
def test_a_lease_of_another_machine_counts_while_it_is_touched(tmp_path: Path, what: str):
    """Its process number says nothing here."""
    file = written(tmp_path, pid=dead_process(), **{what: "other"})
    assert lease.holder(tmp_path) is not None
    assert lease.claim(tmp_path, "me") is None
    long_ago = time.time() - lease.FRESH - 1
    os.utime(file, (long_ago, long_ago))
    assert lease.holder(tmp_path) is None
    taken = lease.claim(tmp_path, "me")
    assert taken is not None
    assert lease.claim(tmp_path, "you") is None


def test_a_lease_that_is_only_just_being_written_counts(tmp_path: Path):
    (tmp_path / lease.FILE).touch()
    assert lease.holder(tmp_path) is not None
    assert lease.claim(tmp_path, "me") is None


def test_one_of_many_gets_a_lost_lease(tmp_path: Path):
    written(tmp_path, pid=dead_process())
    start, got = threading.Barrier(8), []

    def ask() -> None:
        start.wait()
        got.append(lease.claim(tmp_path, "me"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([one for one in got if one is not None]) == 1


def test_a_process_number_that_is_used_again_holds_nothing_for_ever(tmp_path: Path):
    file = written(tmp_path, pid=os.getppid())
    assert lease.holder(tmp_path) is not None
    os.utime(file, (1, 1))
    assert lease.holder(tmp_path) is None


def test_a_lease_that_was_taken_over_meanwhile_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between the judgement and the taking, another process is faster."""
    written(tmp_path, pid=dead_process())
    judge = lease.holder

    def slow(folder: Path) -> str | None:
        found = judge(folder)
        (folder / lease.FILE).unlink()
        written(folder, token="faster", host="other")
        return found

    monkeypatch.setattr(lease, "holder", slow)
    assert lease.claim(tmp_path, "me") is None
    assert json.loads((tmp_path / lease.FILE).read_text())["token"] == "faster"


def test_a_kept_lease_is_touched_and_stops_its_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "BEAT", 0.02)
    stopped: list[str] = []
    mine = lease.claim(tmp_path, "me")
    assert mine is not None
    os.utime(tmp_path / lease.FILE, (0, 0))
    mine.keep(lambda: False, lambda: stopped.append("asked"))
    wait_for(lambda: (tmp_path / lease.FILE).stat().st_mtime > 1)
    written(tmp_path, host="other")  # as if it had been taken over, after this machine had been asleep
    wait_for(lambda: stopped)
    time.sleep(0.1)
    assert stopped == ["asked"]
    mine.release()
    assert (tmp_path / lease.FILE).exists(), "that of another is left alone"


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------- a cell


def run(folder: Path, ran: list[list[str]], code: int = 0, **options: Any) -> int:
    def command(arguments: list[str]) -> int:
        ran.append(arguments)
        assert lease.holder(folder) is not None
        return code

    return cell_run.run(folder, command, **{"held": False, "attempt": "a", "parent": 0} | options)


def test_a_cell_begins_or_goes_on_and_says_how_it_ended(tmp_path: Path):
    ran: list[list[str]] = []
    assert run(tmp_path, ran, code=3) == 3
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    assert run(tmp_path, ran) == 0
    assert ran == [
        ["run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")],
        ["resume", str(tmp_path / "run")],
    ]
    assert cell_run.how_it_ended(tmp_path, "a") == 0
    assert cell_run.how_it_ended(tmp_path, "b") is None, "of another attempt nothing is known"
    (tmp_path / "run" / "results.json").touch()
    assert run(tmp_path, ran, attempt="c") == 0
    assert len(ran) == 2, "what is done is not done again"
    assert lease.holder(tmp_path) is None


def test_a_cell_does_not_run_with_other_code_than_it_was_submitted_with(tmp_path: Path):
    identity = {"lamina": __version__, "code": code_hash("finetune"), "method": "finetune"}
    ran: list[list[str]] = []
    (tmp_path / "cell.json").write_text(json.dumps(identity))
    assert run(tmp_path, ran) == 0
    (tmp_path / "cell.json").write_text(json.dumps(identity | {"code": "older"}))
    assert run(tmp_path, ran) == cell_run.OTHER_CODE
    assert len(ran) == 1
    ended: list[int | None] = []
    job = Job("a", Place(tmp_path), lambda: True)
    ends = Ends([cell_run.OTHER_CODE])
    work([job], ends, Watch(lambda _, code: ended.append(code), lambda _: None, lambda _: None, lambda _: None))
    assert ended == [None], "it counts as not started"


class Ends:
    """A runner whose runs end at once with these codes, one after the other."""

    side_by_side, pause = 1, 0.0

    def __init__(self, codes: list[int]) -> None:
        self.codes = codes

    def start(self, cells: list[Started]) -> list[Any]:
        found = []
        for cell in cells:
            cell.lock.close()
            found.append(Ended(self.codes.pop(0)))
        return found

    def leave(self) -> str | None:
        return None

    def reason(self, place: Place) -> str:
        return ""


def test_a_lost_run_is_started_again_but_not_for_ever(tmp_path: Path):
    ended, lost = list[int | None](), list[str]()
    watch = Watch(lambda _, code: ended.append(code), lambda _: None, lambda job: lost.append(job.name), lambda _: None)
    ends = Ends([LOST] * 5)
    work([Job("a", Place(tmp_path), lambda: True)], ends, watch)
    assert (ended, lost, ends.codes) == ([LOST], ["a"] * 3, [LOST])


def test_a_run_lost_with_its_machine_leaves_a_lease_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "FRESH", 0.05)

    class OnOtherMachine(Ends):
        def start(self, cells: list[Started]) -> list[Any]:
            written(tmp_path, host="other")
            return super().start(cells)

    ended, lost = list[int | None](), list[str]()
    watch = Watch(lambda _, code: ended.append(code), lambda _: None, lambda job: lost.append(job.name), lambda _: None)
    work([Job("a", Place(tmp_path), lambda: True)], OnOtherMachine([LOST] * 5), watch)
    assert (ended, lost) == ([LOST], ["a"] * 3)


def test_a_run_that_raises_has_failed_and_is_not_lost(tmp_path: Path):
    def broken(_: list[str]) -> int:
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        cell_run.run(tmp_path, broken, held=False, attempt="a", parent=0)
    assert cell_run.how_it_ended(tmp_path, "a") == 1
    assert lease.holder(tmp_path) is None


def test_a_cell_that_another_holds_is_left_alone(tmp_path: Path):
    ran: list[list[str]] = []
    lock = Place(tmp_path).lock()
    assert lock is not None
    assert run(tmp_path, ran) == cell_run.HELD
    assert run(tmp_path, ran, held=True) == 0, "its starter holds the lock for it"
    lock.close()
    written(tmp_path, host="other")
    assert run(tmp_path, ran) == run(tmp_path, ran, held=True) == cell_run.HELD
    assert len(ran) == 1


def test_a_run_stops_when_who_started_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "BEAT", 0.02)
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        code = cell_run.run(
            tmp_path, lambda _: wait_for(lambda: asked) or 130, held=False, attempt="a", parent=dead_process()
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, asked) == (130, [signal.SIGTERM])


def test_a_remote_run_is_lost_where_its_job_is_gone_and_nothing_is_said(tmp_path: Path):
    gone: list[bool] = []
    one = Remote(Place(tmp_path), "a", "job", lambda _: bool(gone), lambda *_: None)
    assert one.poll() is None
    gone.append(True)
    assert one.poll() == LOST
    for code, seen in ((0, 0), (2, 2), (130, LOST)):  # 130: it was asked to stop, and saved
        (tmp_path / cell_run.ENDED).write_text(json.dumps({"attempt": "a", "code": code}))
        assert one.poll() == one.wait() == seen
    gone.clear()
    assert one.poll() is None, "its job is queued again"


# ---------------------------------------------------------------------------------------------- resources


def test_a_row_may_need_more_than_the_others(tmp_path: Path):
    text = """
resources: {cpus: 2, minutes: 30}
methods:
  finetune: {}
  ewc: {resources: {gpus: 1, memory_gb: 12}, each: {method.rank: [2, 4]}}
"""
    grid = Grid(write_grid(tmp_path, text))
    assert [grid.resources(row) for row in grid.rows] == [
        Resources(cpus=2, minutes=30),
        *[Resources(cpus=2, minutes=30, gpus=1, memory_gb=12)] * 2,
    ]
    assert {cell.config.threads for row in grid.rows for cell in grid.cells(row, {})} == {2}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("resources: {cpus: 0}\nmethods: {finetune: {}}", "resources.cpus = 0"),
        ("resources: {cores: 2}\nmethods: {finetune: {}}", "resources.cores"),
        ("methods: {finetune: {resources: {gpus: -1}}}", "methods.finetune.resources.gpus = -1"),
        ("methods: {finetune: {resources: 3}}", "methods.finetune.resources"),
    ],
)
def test_resources_that_cannot_be(tmp_path: Path, text: str, told: str):
    with pytest.raises(ConfigError) as refused:
        Grid(write_grid(tmp_path, text))
    assert told in str(refused.value)
    assert "line " in str(refused.value)


def test_what_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"resources.cpus = 4096: this machine has \d+ cores"):
        runners.local(1, [Resources(), Resources(cpus=4096)])
    monkeypatch.setattr(runners, "_gpus", lambda: 3)
    with pytest.raises(ConfigError, match=r"resources.gpus = 4: this machine has 3 GPUs"):
        runners.local(1, [Resources(gpus=4)])
    assert runners.local(8, [Resources(), Resources(gpus=1)]).side_by_side == 3
    assert runners.local(8, [Resources(gpus=2)]).side_by_side == 1
    assert runners.local(8, [Resources()]).side_by_side == 8


class Sleeping:
    """In place of a process."""

    pid = 1

    def __init__(self) -> None:
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code


def test_a_gpu_is_given_to_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str | None] = []

    def launch(folder: Path, *options: str, pass_fds: object, environment: dict[str, str]) -> Sleeping:
        seen.append(environment.get("CUDA_VISIBLE_DEVICES"))
        return Sleeping()

    monkeypatch.setattr(cell_run, "launch", launch)
    runner = runners.Local(side_by_side=2, gpus=3)

    def begin(name: str, gpus: int) -> Any:
        place = Place(tmp_path / name)
        lock: IO[str] | None = place.lock()
        assert lock is not None
        (process,) = runner.start([Started(place, lock, Resources(gpus=gpus))])
        lock.close()
        return process

    first = begin("a", 2)
    begin("b", 1)
    first.code = 0
    begin("c", 1)
    begin("d", 0)
    assert seen == ["0,1", "2", "0", ""], "and a run that needs none sees none"


def test_the_gpus_are_those_that_are_visible_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str | None] = []

    def launch(folder: Path, *options: str, pass_fds: object, environment: dict[str, str]) -> Sleeping:
        seen.append(environment.get("CUDA_VISIBLE_DEVICES"))
        return Sleeping()

    monkeypatch.setattr(cell_run, "launch", launch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    place = Place(tmp_path / "a")
    lock = place.lock()
    assert lock is not None
    runners.Local(side_by_side=1, gpus=2).start([Started(place, lock, Resources(gpus=2))])
    lock.close()
    assert seen == ["4,6"]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *(
            ("setup", "module load cuda", ["module load cuda"]),
            ("use_srun", "false", False),
            ("exclusive", "true", True),
        ),
        *(("account", "007", "007"), ("nodes", "2", 2), ("partition", "gpu", "gpu"), ("time", "1:00", "1:00")),
    ],
)
def test_parameters_of_submitit(key: str, text: str, value: object):
    assert runners._value(key, text) == value


def test_a_run_that_another_holds_on_a_cluster_is_not_lost(tmp_path: Path):
    written(tmp_path, host="other")
    (tmp_path / cell_run.ENDED).write_text(json.dumps({"attempt": "theirs", "code": 0}))
    assert run(tmp_path, [], attempt="mine") == cell_run.HELD
    assert Remote(Place(tmp_path), "mine", "job", lambda _: True, lambda *_: None).poll() == cell_run.HELD
    assert cell_run.how_it_ended(tmp_path, "theirs") == 0
