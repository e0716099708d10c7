"""Processes that train tasks side by side: started, watched, stopped; here each is a few lines of shell."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.tiny import tiny_images

from lamina.cli.progress import Watcher
from lamina.data.streams import class_plan, make_stream
from lamina.engine.loop import Event, Interrupted
from lamina.errors import RunError, TrainingError
from lamina.runs import side_by_side

NAMES = {0: "task-01", 1: "task-02", 2: "task-03", 3: "task-04"}
SAVES_WHEN_STOPPED = """
    trap 'touch "$1/saved-$2"; exit 130' TERM
    touch "$1/at-work-$2"
    for _ in $(seq 1000); do sleep 0.01; done
"""
"""Ends by itself after some time, so that a test which fails leaves nothing at work."""


def train(out: Path, script: str, jobs: int, should_stop: Callable[[], bool] = lambda: False) -> list[tuple[int, str]]:
    """The script gets the run's directory, the number of the task, and this process as $1, $2 and $3."""
    shown: list[tuple[int, str]] = []
    command = ("sh", "-c", script, "sh")
    side_by_side.train(out, NAMES, jobs, lambda *facts: shown.append(facts), should_stop, command)
    return shown


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "PAUSE", 0.01)


def test_every_task_is_trained_and_no_more_than_jobs_at_a_time(tmp_path: Path):
    shown = train(tmp_path, 'echo "1/2"; echo "$3" > $1/ran-$2; sleep 0.1; echo "2/2"', 2)
    assert {path.name for path in tmp_path.glob("ran-*")} == {f"ran-{number}" for number in NAMES}
    assert {path.read_text().strip() for path in tmp_path.glob("ran-*")} == {str(os.getpid())}
    assert max(at_work.count("task-") for _, at_work in shown) == 2
    assert shown[-1] == (4, "")
    assert any("1/2" in at_work for _, at_work in shown)
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)


def test_a_failure_is_told_in_the_words_of_its_process_once_the_others_have_saved(tmp_path: Path):
    fails = (
        "while [ ! -e $1/at-work-0 ]; do sleep 0.01; done; echo 3/80; echo 'error: the loss is nan\n  and more'; exit 2"
    )
    with pytest.raises(TrainingError, match=r"^the loss is nan\n  and more$"):
        train(tmp_path, f"if [ $2 = 1 ]; then {fails}; fi\n{SAVES_WHEN_STOPPED}", 2)
    assert (tmp_path / "saved-0").exists()
    assert not (tmp_path / "at-work-2").exists()


def test_a_process_that_was_killed_is_named(tmp_path: Path):
    with pytest.raises(
        RunError, match=r"task 'task-01' ended early: it was killed by SIGKILL\. .*0/log.txt.*fewer --jobs"
    ):
        train(tmp_path, "kill -9 $$", 1)


def test_asked_to_stop_it_stops_its_processes_first(tmp_path: Path):
    def should_stop() -> bool:
        return len(list(tmp_path.glob("at-work-*"))) >= 2

    with pytest.raises(Interrupted):
        train(tmp_path, SAVES_WHEN_STOPPED, 2, should_stop)
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_the_watcher_says_which_tasks_there_are_and_what_is_in_progress():
    event = Event(task=0, phase="parallel", done=3, total=10, workers="task-04 60/80, task-05 10/80")
    labelled = tiny_images(classes=20)
    written, stream = io.StringIO(), make_stream(labelled, class_plan(labelled, 10), "class")
    watch: Any = Watcher("mine", Console(file=written, soft_wrap=True), interval=0)
    watch(stream, event)
    watch(stream, event)
    tasks = [
        f"mine: task {n + 1}/10 task-{n + 1:02d}: class{2 * n}, class{2 * n + 1} ({len(task.train)} training examples)"
        for n, task in enumerate(stream)
    ]
    progress = "mine: tasks trained 3/10, in progress: task-04 60/80, task-05 10/80"
    assert written.getvalue().splitlines() == [*tasks, progress, progress]
