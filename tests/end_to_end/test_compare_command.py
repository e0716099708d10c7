"""`lamina compare` with real runs: killed and given again, it repeats nothing and loses nothing; its search sees no test
example."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.end_to_end.conftest import Command, paint
from tests.end_to_end.test_command import assert_self_contained
from tests.faults.processes import finish, kill_all, start
from tests.grids import Ended, MadeUp, Told, write_grid

from lamina import runs
from lamina.compare import Study
from lamina.compare.cells import Place
from lamina.compare.runners import Started
from lamina.runs.side_by_side import Process

SMALL = """\
base:
  data: {source: digits, per_class: 12, test_fraction: 0.1}
  backbone: {image_size: 32}
  stream: {tasks: 2}
  training: {epochs: 2, batch_size: 8}
  checkpoint_seconds: 0
methods: {finetune: {}, prototype: {}}
seeds: [0, 1]
baseline: prototype
jobs: 2
"""


@pytest.fixture
def _nothing_left_at_work() -> Iterator[None]:
    yield
    kill_all()


def wait_for(what: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def holders(folder: Path) -> list[int]:
    """The processes of the runs that are at work."""
    found = []
    for place in map(Place, folder.glob("*-*-*")):
        lock = place.lock()
        if lock is None:
            found += [int(number) for number in re.findall(r"^process (\d+)", place.holder())]
        else:
            lock.close()
    return found


@pytest.mark.usefixtures("_nothing_left_at_work")
@pytest.mark.slow
def test_killed_and_given_again(lamina: Command, tmp_path: Path) -> None:
    grid, cells = write_grid(tmp_path, SMALL), tmp_path / "runs" / "cells"
    begun = cells.glob("finetune-*/run/config.json")

    first = start("compare", grid)
    wait_for(lambda: next(cells.glob("finetune-*/run/config.json"), None))
    first.send_signal(signal.SIGTERM)
    code, _, err = finish(first)
    assert code == 130
    assert f"Continue with: lamina compare {grid}" in err
    assert "Traceback" not in err
    assert holders(cells) == [], "its runs were stopped before it ended"
    assert next(begun, None)

    second = start("compare", grid)
    wait_for(lambda: holders(cells))
    second.kill()
    finish(second)
    orphans = holders(cells)
    for process in orphans:
        os.kill(process, signal.SIGSTOP)
    assert orphans, "they go on without it"

    third = start("compare", grid)
    said = []
    assert third.stderr is not None
    while "is still at work on it" not in "".join(said):
        said.append(third.stderr.readline())
        assert said[-1], said
    for process in orphans:
        os.kill(process, signal.SIGCONT)
    code, out, err = finish(third)
    assert code == 0, err
    assert "prototype" in out
    assert f"Open the table: {tmp_path / 'runs' / 'grid' / 'table.html'}" in out
    assert_self_contained(tmp_path / "runs" / "grid" / "table.html")

    done = {path: path.stat().st_mtime_ns for path in cells.glob("*/run/results.json")}
    assert len(done) == 4
    listed = lamina("compare", grid, "--dry-run").out.splitlines()
    assert [line.split()[:2] for line in listed] == [
        ["done", f"grid/{method}/seed{seed}"] for method in ("finetune", "prototype") for seed in (0, 1)
    ]
    said_again = lamina("compare", grid, "--page", "page.md")
    assert said_again.code == 0
    assert "to do" not in said_again.err
    assert {path: path.stat().st_mtime_ns for path in done} == done, "nothing is run twice"
    assert "| `finetune` | " in (tmp_path / "page.md").read_text()

    # What was killed and resumed is what an undisturbed run comes to.
    (tmp_path / "page.md").unlink()
    record = json.loads((tmp_path / "runs" / "grid" / "table.json").read_text())
    cell = Path(next(r["runs"][1]["cell"] for r in record["streams"][0]["rows"] if r["name"] == "finetune"))
    whole = runs.create(runs.load_config(cell / "config.yaml", []), tmp_path / "whole")
    assert json.loads((cell / "run" / "results.json").read_text())["matrix"] == whole.matrix.as_dict()


class InThisProcess(MadeUp):
    def start_one(self, cell: Started) -> Process:
        runs.create(runs.load_config(cell.place.config, []), cell.place.run)
        return Ended(0)


def test_the_search_sees_no_test_example(tmp_path: Path) -> None:
    """Two sets of images with the same training examples and other test examples are searched alike."""
    paint(tmp_path / "one" / "train", 6, 10)
    shutil.copytree(tmp_path / "one" / "train", tmp_path / "one" / "test")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    draw = np.random.default_rng(0)
    for path in (tmp_path / "two" / "test").rglob("*.png"):
        Image.fromarray(draw.integers(0, 255, (24, 24, 3), np.uint8)).save(path)
    scores, final, records = [], [], []
    for name in ("one", "two"):
        text = f"""
base:
  data: {{source: {tmp_path / name}, augment: none}}
  backbone.image_size: 32
  stream.tasks: 3
  training: {{epochs: 1, batch_size: 8}}
methods: {{finetune: {{}}}}
search: {{over: {{training.lr: [1.0e-4, 1.0e-2]}}, tasks: 2}}
"""
        study = Study(write_grid(tmp_path, text, f"{name}.yaml"), cells=tmp_path / "cells")
        assert study.work(Told(), InThisProcess(lambda config: None)).failures == []
        (row,) = study.grid.rows
        trials = [study.place(cell).record() for cell in study.grid.trials(row)]
        scores.append([(trial.matrix, trial.task_aware, trial.losses) for trial in trials] + [study.chosen(row)])
        final += [study.place(cell).record().matrix for cell in study.table_cells(row)]
        records += trials
    assert scores[0] == scores[1]
    assert (final[0].correct_ij[:2] != final[1].correct_ij[:2]).any(), (
        "where the test examples are used they make a difference"
    )
    assert len(list((tmp_path / "cells").glob("finetune-*"))) == 6, "other data is another cell, searched or not"
    for record in records:
        assert record.split == "val"
        assert record.batch is not None
        assert (record.batch.examples, record.batch.dependent) == (6, 0)
        tasks = record.stream.tasks
        assert [task.val for task in tasks] == record.matrix.total_ij[-1].tolist() == [4, 4]
        assert [task.train for task in tasks] == [16, 16], "validation examples are not trained on"
        assert sum(found.total for found in record.classes) == 8
        learnt = [found.correct_when_learnt for found in record.classes]
        assert sum(learnt) == np.trace(record.matrix.correct_ij)
        assert sum(found.correct for found in record.classes) == record.matrix.correct_ij[-1].sum()


def test_what_is_wrong_with_a_grid_is_one_message(lamina: Command, tmp_path: Path) -> None:
    grid = write_grid(tmp_path, "methods: {finetun: {}, inflora: {training.lr: -1}}\nsteams: {}\n")
    message = lamina.refused("compare", grid)
    assert "1 error in" in message
    assert "Did you mean 'streams'?" in message
    write_grid(tmp_path, "methods: {finetun: {}, inflora: {training.lr: -1}}\nbaseline: infl\n")
    message = lamina.refused("compare", grid)
    for part in ("3 errors", "Did you mean 'finetune'?", "methods.inflora.training.lr = -1", "Did you mean 'inflora'?"):
        assert part in message
    write_grid(tmp_path, "methods: {finetune: {}}\n")
    (tmp_path / "page.md").write_text("no markers")
    assert "<!-- compare -->" in lamina.refused("compare", grid, "--page", "page.md")
    assert "fits no cell" in lamina.refused("compare", grid, "--only", "nothing")
    assert "cannot be read" in lamina.refused("compare", "nowhere.yaml")
    write_grid(tmp_path, "base: {data.source: digits}\nmethods: {finetune: {}, inflora: {stream.tasks: 11}}\n")
    assert "stream.tasks = 11: 'digits' has 10 classes" in lamina.refused("compare", grid)
    assert not (tmp_path / "runs").exists(), "nothing was begun"


def test_a_run_that_fails_is_told_and_the_others_are_done(
    lamina: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate of one of the two is far too large."""
    text = SMALL.replace("seeds: [0, 1]", "seeds: [0]")
    text = text.replace(
        "finetune: {}",
        "finetune: {training.lr: 1000, training.head_lr: 1000, training.optimizer: sgd, training.epochs: 9}",
    )
    said = lamina("compare", write_grid(tmp_path, text), "--jobs", 1)
    assert said.code == 1
    assert "FAILED grid/finetune/seed0" in said.err
    assert "error: the loss is nan in task 'task-0" in said.err
    assert "[2/2] grid/prototype/seed0: final accuracy" in said.err
    assert "`finetune`: 1 run of 1 missing" in (tmp_path / "runs" / "grid" / "table.md").read_text()
