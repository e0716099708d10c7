"""Comparisons: the grid and its errors, what makes two cells the same, the loop, the search, and the tables."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console
from tests.grids import MadeUp, Told, write_grid

from lamina import record
from lamina.cli.progress import GridWatcher
from lamina.compare import Study, cells, guards, stats, table
from lamina.compare.cells import Place, Store, bare, code_hash
from lamina.compare.drawings import pareto
from lamina.compare.grid import Grid
from lamina.compare.runners import LOST, Started
from lamina.compare.study import duration, seconds_left
from lamina.compare.work import Job, Watch, work
from lamina.config import RunConfig
from lamina.data.leaks import Leaks
from lamina.engine.loop import Interrupted
from lamina.errors import ConfigError, LaminaError, RunError
from lamina.runs.side_by_side import Process

GRID = """\
title: Made up
base: {data: {source: digits}, stream.tasks: 5}
methods:
  finetune: {}
  inflora: {method.epsilon: 0.99}
  noproj: {method: inflora, method.rank: 3}
  joint: {method.name: finetune, stream.joint: true}
seeds: [0, 1, 2]
baseline: finetune
"""
SEARCHED = GRID + "search: {over: {training.lr: [1e-3, 2e-3]}, tasks: 2}\n"


@pytest.fixture(autouse=True)
def _no_search_for_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes two seconds, and digits have none."""
    monkeypatch.setattr(guards, "look", lambda *_: Leaks(tests=359, exact=0, near=0))


# ---------------------------------------------------------------------------------------------- the grid


def test_a_grid_becomes_cells(tmp_path: Path):
    grid = Grid(write_grid(tmp_path, GRID))
    found = [cell for row in grid.rows for cell in grid.cells(row, {})]
    assert [cell.name for cell in found][:4] == [
        *("grid/finetune/seed0", "grid/finetune/seed1", "grid/finetune/seed2", "grid/inflora/seed0")
    ]
    assert len(found) == 12
    names = {cell.row.method: cell.config.method["name"] for cell in found}
    assert names == {"finetune": "finetune", "inflora": "inflora", "noproj": "inflora", "joint": "finetune"}
    assert {cell.config.stream.joint for cell in found if cell.row.method == "joint"} == {True}
    assert [cell.config.method.get("rank") for cell in found if cell.row.method == "noproj"] == [3] * 3
    assert {(cell.config.threads, cell.config.precision, cell.config.stream.tasks) for cell in found} == {
        (1, "fp32", 5)
    }


def test_layers_lie_on_top_of_each_other(tmp_path: Path):
    write_grid(tmp_path, "training: {lr: 1, epochs: 1}\nseed: 9\nprecision: bf16\n", "base.yaml")
    write_grid(tmp_path, "training.epochs: 2\ndata.source: digits\n", "stream.yaml")
    text = """
base: base.yaml
streams: {a: stream.yaml, b: {training: {epochs: 3}}}
methods: {finetune: null, inflora: {training.lr: 7}}
orders: [null, 4]
"""
    grid = Grid(write_grid(tmp_path, text))
    found = {cell.name: cell.config for row in grid.rows for cell in grid.cells(row, {})}
    assert len(found) == 8
    a, b = found["a/finetune/seed0"], found["b/inflora/seed0-order4"]
    assert (a.training.lr, a.training.epochs, a.seed, a.stream.order_seed, a.precision) == (1, 2, 0, None, "bf16")
    assert (b.training.lr, b.training.epochs, b.stream.order_seed) == (7, 3, 4)


def test_trials_see_the_first_tasks_and_validation_data_only(tmp_path: Path):
    text = SEARCHED.replace("inflora: {method.epsilon: 0.99}", "inflora: {search: {method.epsilon: [0.9, 0.99]}}")
    grid = Grid(
        write_grid(tmp_path, text.replace("  noproj", "  prototype: {search: false}\n  noproj") + "orders: [5, 6]\n")
    )
    trials = {row.method: grid.trials(row) for row in grid.rows}
    assert {name: len(found) for name, found in trials.items()} == {
        "finetune": 2,
        "inflora": 4,
        "prototype": 0,
        "noproj": 2,
        "joint": 2,
    }
    for cell in [cell for found in trials.values() for cell in found]:
        assert cell.config.evaluation.split == "val"
        assert (cell.config.stream.first, cell.config.stream.validation) == (2, 0.2)
        assert (cell.config.seed, cell.config.stream.order_seed) == (0, 5)
        assert cell.config.training.lr == cell.tried["training.lr"]
    assert trials["inflora"][1].tried == {"training.lr": 1e-3, "method.epsilon": 0.99}
    assert trials["inflora"][1].name == "grid/inflora/search/training.lr=0.001, method.epsilon=0.99"
    (last,) = {cell.config.training.lr for cell in grid.cells(grid.rows[1], {"training.lr": 2e-3})}
    assert last == 2e-3
    assert {cell.config.evaluation.split for cell in grid.cells(grid.rows[1], {})} == {"test"}


def test_a_row_can_stand_for_every_combination(tmp_path: Path):
    text = """\
methods:
  finetune: {training.lr: 0.5, each: {consolidation.merging: [none, ema], consolidation.classifier: [own, lda]}}
  color: {each: {consolidation.merging: [none, ema], training.epochs: [1, 2]}}
  prototype: {consolidation.classifier: own, each: {consolidation.drift: [none, linear]}}
  other: {method: {name: inflora, rank: 3}, each: {method.epsilon: [0.5, 0.75]}}
  slca: {each: {consolidation.drift: [none, random]}}
  plain: {method.name: slca, each: {consolidation.classifier: [own, ncm]}}
baseline: finetune, merging none, classifier own
"""
    grid = Grid(write_grid(tmp_path, text))
    assert [row.method for row in grid.rows] == [
        *(f"finetune, merging {merging}, classifier {kind}" for merging in ("none", "ema") for kind in ("own", "lda")),
        *(f"color, merging none, epochs {epochs}" for epochs in (1, 2)),  # merging does not go with it
        "prototype, drift none",  # without statistics there is nothing to move
        *(f"other, epsilon {epsilon}" for epsilon in (0.5, 0.75)),
        *(f"slca, drift {drift}" for drift in ("none", "random")),  # it has a classifier of its own, said or not
        *(f"plain, classifier {kind}" for kind in ("own", "ncm")),
    ]
    ranks = [grid.cells(row, {})[0].config.consolidation.class_covariance_rank for row in grid.rows[-2:]]
    assert ranks == [0, 16], "what belongs to a unified classifier goes with it"
    configs = [grid.cells(row, {})[0].config for row in grid.rows[:-4]]
    assert (configs[3].consolidation.merging, configs[3].consolidation.classifier, configs[3].training.lr) == (
        "ema",
        "lda",
        0.5,
    )
    assert [c.method["name"] for c in configs[4:]] == ["color", "color", "prototype", "inflora", "inflora"]
    assert (configs[-1].method["rank"], configs[-1].method["epsilon"]) == (3, 0.75)
    bad = problems(write_grid(tmp_path, "methods: {finetune: {each: {seed: 3}}}"))
    assert "methods.finetune.each = {'seed': 3}: must be settings, each with a list of values" in bad[0]
    bad = problems(write_grid(tmp_path, "methods: {color: {consolidation.merging: ema}}"))
    assert "consolidation.merging = 'ema' does not go with color: adapters are selected per input" in bad[0]


def problems(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        Grid(file)
    first, *found = str(refused.value).splitlines()
    assert first == f"{len(found)} error{'s' * (len(found) > 1)} in {file}:"
    return [line.strip() for line in found]


def test_every_error_of_a_grid_at_once_with_its_line_and_the_nearest_name(tmp_path: Path):
    write_grid(tmp_path, "data: {source: digits}\ntraining:\n  epoch: 3\n", "base.yaml")
    text = """\
base: base.yaml
streams:
  classes: {}
  domains: {stream.scenario: domain}
methods:
  finetune: {training.lr: 1.0}
  inflora: {method.epsilonn: 0.99, seed: 3}
  inflora-x: {method: {rank: 0}}
  my: {method.name: finetun, search: 3}
  pp: {method.name: prototype, training: {lr: many}, search: {method.metrc: [1]}}
orders: [1, null]
baseline: finetun
search: {over: {training.lr: [1, x]}, tasks: 40}
"""
    expected = [
        "line 12: baseline = 'finetun': not one of the methods: finetune, .* Did you mean 'finetune'?",
        "line 7: methods.inflora.seed: `seeds` of the grid sets it; leave it out here",
        "line 9: methods.my.search = 3: must be settings, each with a list of values to try, or false",
        "line 6: methods.finetune.training.lr: the search sets it too. Leave it out here, .*`search: false`",
        "line 10: methods.pp.training.lr: the search sets it too. Leave it out here, .*`search: false`",
        f"{tmp_path / 'base.yaml'}, line 3: training.epoch = 3: no such setting. .* Did you mean 'epochs'?",
        "line 13: search.over.training.lr = 'x': allowed is a number",
        "line 7: methods.inflora.method.epsilonn = 0.99: no such setting. .* Did you mean 'epsilon'?",
        "line 8: methods.inflora-x.method.name = 'inflora-x': not one of the methods: .* Did you mean 'inflora'?",
        "line 9: methods.my.method.name = 'finetun': not one of the methods: .* Did you mean 'finetune'?",
        "line 10: methods.pp.search.method.metrc = 1: no such setting. .* Did you mean 'metric'?",
    ]
    found = problems(write_grid(tmp_path, text))
    assert len(found) == len(expected), found
    for line, pattern in zip(found, expected, strict=True):
        start, _, end = pattern.partition(".*")
        assert line.startswith(start), line
        assert line.endswith(end), line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("methods: {}", "methods = {}"),
        ("seeds: [0]", "methods = .*field required"),
        ("methods: {finetune: {}}\nseeds: [1, 1]", "a value occurs twice"),
        ("methods: {finetune: {}}\nseeds: [-1]", "seeds = [-1]: must be a list of whole numbers"),
        ("methods: {finetune: {}}\nbse: {}", "Did you mean 'base'?"),
        ("methods: {finetune: {}}\nsearch: {ovr: {}}", "Did you mean 'over'?"),
        (
            "methods: {finetune: {}}\norders: []",
            "orders = []: must be `seeds`, or a list of whole numbers and null",
        ),
        ("methods: {finetune: {}}\norders: seed", "orders = 'seed': must be `seeds`, or a list"),
        ("methods: {finetune: {}}\nsearch: {over: {training.lr: []}}", "no value to try for training.lr"),
        ("methods: {finetune: {}}\nsearch: {over: {training.lr: [1]}, tasks: 11}", "has 10 tasks"),
        ("methods: {finetune: {search: {training.lr: [1]}}}", "has no `search` that this could extend"),
        ("methods: {finetune: {}}\nbase: {stream.first: 11}", "stream.first = 11: the stream .* has 10 tasks"),
        (
            "methods: {prototype: {}}\nbase: {rehearsal.per_class: 5}",
            "rehearsal.per_class = 5 does not go with prototype",
        ),
        ("methods: {duallora: {each: {consolidation.merging: [ema]}}}", "no combination of `each` is valid"),
        (
            "methods: {finetune: {}}\nbase: {stream: {scenario: mixed, plan: [{name: a, classes: ['0']}]}}\norders: [1, 2]",
            "has the order of its plan",
        ),
        ("methods: {finetune: {}}\nbase: gone.yaml", "gone.yaml: cannot be read"),
        ("- a", "must hold keys and values"),
    ],
)
def test_grids_that_cannot_be(tmp_path: Path, text: str, told: str):
    with pytest.raises(ConfigError) as refused:
        Grid(write_grid(tmp_path, text))
    start, _, end = told.partition(".*")
    assert start in str(refused.value)
    assert end in str(refused.value)


def test_data_and_weights_that_are_not_there_are_all_named_before_anything_runs(tmp_path: Path):
    text = "streams: {a: {data.source: gone}, b: {backbone.name: lost}, c: {}}\nmethods: {finetune: {}, inflora: {}}"
    with pytest.raises(ConfigError) as refused:
        Study(write_grid(tmp_path, text), cells=tmp_path / "cells")
    assert "2 errors" in str(refused.value)
    assert "gone does not exist" in str(refused.value)
    assert "no backbone 'lost'" in str(refused.value)


# ---------------------------------------------------------------------------------------------- one cell and another


def test_code_is_what_computes():
    code = '"""A module."""\n\ndef f(x: int) -> int:\n    """Says."""\n    return x  # as it is\n'
    assert bare(code) == bare("def f( x:int )->int:\n\n  return (x)")
    assert bare(code) != bare("def f(x: int) -> int:\n    return -x")
    assert (
        bare('class A:\n    x: int = 1\n    """Of x."""\n') == bare("class A:\n    x: int = 1\n") != bare("x = 'text'")
    )


def test_a_cell_depends_on_the_code_that_can_change_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = {name: code_hash(name) for name in ("finetune", "inflora")}
    assert before["finetune"] != before["inflora"]
    read = Path.read_text

    def changed(*names: str) -> list[str]:
        """Which methods' hashes change with an added statement in these files."""
        files = [cells.PACKAGE / name for name in names]

        def read_text(path: Path, *args: str, **named: str) -> str:
            return read(path, *args, **named) + ("\nadded = 1\n" if path in files else "")

        monkeypatch.setattr(Path, "read_text", read_text)
        cells._bare.cache_clear()
        return [method for method in before if code_hash(method) != before[method]]

    try:
        assert (
            changed("engine/loop.py")
            == changed("methods/base.py")
            == changed("methods/routed.py")
            == changed("config/schema.py")
            == ["finetune", "inflora"]
        )
        assert changed("methods/inflora.py") == ["inflora"]
        assert changed("cli/app.py", "record.py", "report/page.py", "compare/study.py", "methods/__init__.py") == []
    finally:
        cells._bare.cache_clear()


def test_a_cell_is_recognised_by_its_content(tmp_path: Path):
    from tests.end_to_end.conftest import paint

    def config(**settings: object) -> RunConfig:
        data = {"source": str(tmp_path / "one"), **settings}
        return RunConfig.model_validate({"method": {"name": "finetune"}, "data": data})

    paint(tmp_path / "one", 2, 3)
    first = Store(tmp_path / "cells").place(config()).folder
    assert first.parent == tmp_path / "cells"
    (tmp_path / "one").rename(tmp_path / "two")
    here = Store(tmp_path / "cells")
    assert here.place(config(source=str(tmp_path / "two"))).folder == first, "wherever the data lies"
    assert here.place(config(source=str(tmp_path / "two"), augment="none")).folder != first
    image = tmp_path / "two" / "class0" / "0.png"
    os.utime(image, ns=(1, 1))
    assert Store(tmp_path / "cells").place(config(source=str(tmp_path / "two"))).folder == first, "touched, not changed"
    content = bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)
    assert Store(tmp_path / "cells").place(config(source=str(tmp_path / "two"))).folder != first, (
        "same size, other bytes"
    )


# ---------------------------------------------------------------------------------------------- the loop

SLEEPER = "import sys, time; time.sleep(float(sys.argv[1])); open(sys.argv[2], 'w').close(); sys.exit(int(sys.argv[3]))"


class Sleepers:
    """Starts processes that sleep and then say that their run is done, and counts how many were at work at once."""

    pause = 0.05

    def __init__(self, seconds: float = 0.4, codes: dict[str, int] | None = None, side_by_side: int = 1) -> None:
        self.seconds, self.codes, self.processes = seconds, codes or {}, []
        self.side_by_side, self.most = side_by_side, 0

    def start(self, cells: Sequence[Started]) -> list[Process]:
        return [self.start_one(cell.place, cell.lock) for cell in cells]

    def leave(self) -> str | None:
        return None

    def reason(self, place: Place) -> str:
        return ""

    def start_one(self, place: Place, lock: IO[str]) -> subprocess.Popen[bytes]:
        place.run.mkdir(exist_ok=True)
        code = self.codes.get(place.folder.name, 0)
        done = place.run / ("results.json" if code == 0 else "nothing")
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-S", "-c", SLEEPER, str(self.seconds), str(done), str(code)], pass_fds=[lock.fileno()]
            )
        )
        self.most = max(self.most, sum(p.poll() is None for p in self.processes))
        return self.processes[-1]


def jobs_in(folder: Path, count: int) -> list[Job]:
    return [Job(f"cell{k}", Place(folder / f"cell{k}"), lambda: True) for k in range(count)]


def watch(ended: list[tuple[str, int | None]], held: list[str] | None = None) -> Watch:
    return Watch(
        ended=lambda job, code: ended.append((job.name, code)),
        held=lambda job: (held if held is not None else []).append(job.name),
        lost=lambda job: ended.append((job.name, LOST)),
        look=lambda jobs: None,
    )


def test_cells_run_side_by_side_and_a_failure_stops_no_other(tmp_path: Path):
    start, ended = Sleepers(codes={"cell1": 3}, side_by_side=2), []
    jobs = [*jobs_in(tmp_path, 4), Job("cell4", Place(tmp_path / "cell4"), lambda: False)]
    work(jobs, start, watch(ended))
    assert dict(ended) == {"cell0": 0, "cell1": 3, "cell2": 0, "cell3": 0, "cell4": None}
    assert start.most == 2
    assert len(start.processes) == 4
    ended.clear()
    work(jobs_in(tmp_path, 4), start, watch(ended))
    assert sorted(ended) == [("cell0", 0), ("cell1", 3), ("cell2", 0), ("cell3", 0)]
    assert len(start.processes) == 5, "what is done is not started again"


def test_a_cell_that_another_process_holds_is_waited_for(tmp_path: Path):
    place = Place(tmp_path / "cell0")
    lock = place.lock()
    orphan = Sleepers(1.0).start_one(place, lock)
    lock.close()  # as if the comparison that started it had been killed
    start, ended, held = Sleepers(0.1), [], []
    work(jobs_in(tmp_path, 2), start, watch(ended, held))
    assert held == ["cell0"]
    assert ended == [("cell0", 0), ("cell1", 0)]
    assert len(start.processes) == 1
    assert orphan.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_stops_its_runs_first(tmp_path: Path, number: int):
    start, ended = Sleepers(60, side_by_side=2), []
    late = Watch(
        ended=lambda job, code: ended.append(job.name),
        held=lambda job: None,
        lost=lambda job: None,
        look=lambda jobs: os.kill(os.getpid(), number),
    )
    before = time.monotonic()
    with pytest.raises(Interrupted):
        work(jobs_in(tmp_path, 3), start, replace(late))
    assert time.monotonic() - before < 30
    assert [process.returncode for process in start.processes] == [-signal.SIGTERM] * 2
    assert ended == []
    lock = Place(tmp_path / "cell0").lock()
    assert lock is not None, "nobody holds it any longer"
    lock.close()


# ---------------------------------------------------------------------------------------------- a whole comparison


def accuracies(config: RunConfig) -> float:
    """finetune learns best slowly, inflora best fast; by hundredths better with every seed."""
    wanted = 1e-3 if config.method["name"] == "finetune" else 2e-3
    return (
        (0.6 if config.training.lr == wanted else 0.4) + 0.01 * config.seed + 0.1 * (config.method["name"] == "inflora")
    )


def study(folder: Path, text: str = SEARCHED, **options: object) -> Study:
    return Study(write_grid(folder, text), out=folder / "out", cells=folder / "cells", **options)


def test_settings_are_chosen_first_and_only_what_is_not_done_is_run(tmp_path: Path):
    start, told = MadeUp(accuracies), Told()
    found = study(tmp_path)
    assert {listed.state for listed in found.listing()} == {"new", None}
    outcome = found.work(told, start)
    assert (outcome.failures, outcome.not_started) == ([], [])
    assert len(start.started) == 8 + 12
    assert [found.chosen(row)["training.lr"] for row in found.grid.rows] == [1e-3, 2e-3, 2e-3, 1e-3]
    assert {c.training.lr for c in start.started[8:] if c.method["name"] == "inflora"} == {2e-3}
    assert told.lines[0] == "8 cells of the search: 0 done, 8 to do"
    assert told.lines[1].startswith(
        "[1/8] grid/finetune/search/training.lr=0.001: average accuracy on validation 60.0%, 10 s"
    )
    assert told.lines[-1].startswith("[12/12] grid/joint/seed2: micro accuracy 62.0%, 10 s")
    again = study(tmp_path)
    assert {listed.state for listed in again.listing()} == {"done"}
    again.work(told, start)
    assert len(start.started) == 20
    wider = study(tmp_path, SEARCHED.replace("[0, 1, 2]", "[0, 1, 2, 3]"))
    wider.work(told, start)
    assert len(start.started) == 24, "only the new seed of every row"


def test_failures_are_told_with_the_end_of_the_log_and_tried_again(tmp_path: Path):
    def some_fail(config: RunConfig) -> float | None:
        bad = config.training.lr == 2e-3 and config.method["name"] == "finetune"
        return None if bad or (config.seed == 1 and config.evaluation.split == "test") else accuracies(config)

    start, told = MadeUp(some_fail), Told()
    found = study(tmp_path)
    outcome = found.work(told, start)
    assert len(outcome.failures) == 2 + 4
    failure = outcome.failures[0]
    assert failure.name == "grid/finetune/search/training.lr=0.002"
    assert failure.why == "exit code 2\nit begins\nerror: the loss is nan\n"
    assert found.chosen(found.grid.rows[0]) == {"training.lr": 1e-3}, "a trial that failed is not chosen"
    text = table.block(found.content("lamina compare grid.yaml"))
    assert "**training.lr=0.001: 60.0** · training.lr=0.002: failed" in text
    assert "- `finetune`: 1 run of 3 missing." in text
    start.accuracy = accuracies
    assert study(tmp_path).work(told, start).failures == []
    assert "missing" not in table.block(study(tmp_path).content("x"))


def test_only_some_cells(tmp_path: Path):
    start = MadeUp(accuracies)
    study(tmp_path, only="inflora/seed1").work(Told(), start)
    assert [(c.evaluation.split, c.seed) for c in start.started] == [("val", 0), ("val", 0), ("test", 1)]
    study(tmp_path, only="*/seed?").work(Told(), start)
    assert len(start.started) == 20
    with pytest.raises(ConfigError, match=r"--only 'nothing' fits no cell. .* such as 'grid/finetune/seed0'"):
        study(tmp_path, only="nothing")


def test_other_code_is_another_cell_unless_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start = MadeUp(accuracies)
    study(tmp_path).work(Told(), start)
    monkeypatch.setattr(cells, "code_hash", lambda method: "newer")
    assert {listed.state for listed in study(tmp_path).listing()} == {"new", None}
    kept = study(tmp_path, keep_code=True)
    assert {listed.state for listed in kept.listing()} == {"done"}
    text = table.block(kept.content("x"))
    assert re.search(r"Runs made with other code than this one \(lamina 0[^)]*\): all\.", text)
    assert "Trials of the search made with other code than this one: all." in text
    study(tmp_path, only="*/inflora/*").work(Told(), start)
    text = table.block(study(tmp_path, keep_code=True).content("x"))
    assert re.search(r"this one \(lamina 0[^)]*\): 3 of `finetune`, 3 of `noproj`, 3 of `joint`\.", text)
    assert "search made with other code than this one: 2 of `finetune`, 2 of `noproj`, 2 of `joint`." in text
    study(tmp_path).work(Told(), start)
    assert len(start.started) == 40
    assert "other code" not in table.block(study(tmp_path, keep_code=True).content("x"))
    assert len(list((tmp_path / "cells").glob("inflora-*"))) == 20, "the old ones are kept"


def test_a_file_of_records_stands_for_runs_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = tmp_path / "records" / "grid.jsonl"
    found = study(tmp_path, records=records)
    found.work(Told(), MadeUp(accuracies))
    whole = table.block(found.content("x"))
    lines = records.read_text().splitlines()
    assert len(lines) == 20 == len(set(lines))
    shutil.rmtree(tmp_path / "cells")
    start, again = MadeUp(accuracies), study(tmp_path, records=records)
    assert {listed.state for listed in again.listing()} == {"done"}
    again.work(Told(), start)
    assert start.started == []
    assert table.block(again.content("x")) == whole
    assert records.read_text().splitlines() == lines, "noted again, the same"
    assert {listed.state for listed in study(tmp_path).listing()} == {"new", None}, "only where the file is named"
    wider = study(tmp_path, SEARCHED.replace("[0, 1, 2]", "[0, 1, 2, 3]"), records=records)
    wider.work(Told(), start)
    wider.content("x")
    assert (len(start.started), len(records.read_text().splitlines())) == (4, 24)
    again.content("x")
    assert len(records.read_text().splitlines()) == 24, "what another comparison has added meanwhile stays"
    monkeypatch.setattr(cells, "code_hash", lambda method: "newer")
    assert {listed.state for listed in study(tmp_path, records=records).listing()} == {"new", None}
    kept = study(tmp_path, records=records, keep_code=True)
    assert {listed.state for listed in kept.listing()} == {"done"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no json", "not a file of records"),
        ("[1, 2]", "not a file of records"),
        ("{}", "not a file of records"),
        ('{"cell": "a-b-c"}', "line 1, is damaged: it must hold a record"),
        ('{"cell": "a-b-c", "format": 1}', "line 1, has format 1, and this version of lamina reads format 2"),
        ('{"cell": "a-b-c", "format": 2, "name": 3}', "line 1, is damaged: name = 3"),
    ],
)
def test_what_is_no_file_of_records_is_refused(tmp_path: Path, text: str, why: str):
    records = tmp_path / "grid.jsonl"
    records.write_text(text)
    with pytest.raises(
        RunError, match=rf"grid.jsonl[:,] {re.escape(why)}.* Give the file that an earlier --records wrote"
    ):
        study(tmp_path, records=records)


def test_no_cell_starts_with_other_code_than_the_comparison_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = study(tmp_path, GRID)
    start = MadeUp(accuracies)
    monkeypatch.setattr(cells, "code_hash", lambda method: "edited meanwhile")
    outcome = found.work(Told(), start)
    assert (len(start.started), len(outcome.not_started), outcome.failures) == (0, 12, [])


# ---------------------------------------------------------------------------------------------- tables


def test_the_table_says_what_the_runs_say(tmp_path: Path):
    found = study(tmp_path)
    found.work(Told(), MadeUp(accuracies))
    told = found.content("lamina compare grid.yaml")
    page = table.write(told, found.out)
    text = (found.out / "table.md").read_text()
    assert text.startswith("# Made up\n\nAccuracies in %")
    assert "(seeds 0, 1, 2), measured on test data." in text
    inflora = next(line for line in text.splitlines() if line.startswith("| `inflora`"))
    assert (
        inflora
        == "| `inflora` | "
        + " | ".join(["71.0 ± 1.0"] * 3 + ["0.0 ± 0.0", "71.0 ± 1.0", "50.0 ± 0.0", "+10.0 [+10.0, +10.0]", "3"])
        + " |"
    )
    assert "| `joint` | – | 61.0 ± 1.0 | – | – | – | – | 0.0 [0.0, 0.0] | 3 |" in text
    assert "| `inflora` | 10 | 1.20 k | 3.40 k | 0 B | 524 MB |" in text
    assert "It covers the centre of symmetric differences with probability 75 %." in text
    assert "With 3 pairs that interval is the range of the differences" in text
    for part in (
        "No test example was used",
        "    lamina compare grid.yaml",
        "title: Made up",
        "abacus",
        "accuracy after the last task, averaged over tasks",
    ):
        assert part in text
    html = page.read_text()
    for part in ("<title>Made up</title>", "71.0 ± 1.0", "+10.0 [+10.0, +10.0]", "default-src 'none'", "abacus"):
        assert part in html
    record = json.loads((found.out / "table.json").read_text())
    (stream,) = record["streams"]
    row = stream["rows"][1]
    assert (row["name"], row["method"], row["chosen"]) == ("inflora", "inflora", {"training.lr": 2e-3})
    assert row["figures"]["final_accuracy"]["values"] == pytest.approx([0.7, 0.71, 0.72])
    assert row["difference"]["mean"] == pytest.approx(0.1)
    assert [(run["seed"], run["order"], run["older_code"]) for run in row["runs"]] == [
        (s, None, False) for s in range(3)
    ]
    assert all((Path(run["cell"]) / "run" / "results.json").exists() for run in row["runs"])


def test_the_page_draws_what_the_table_says(tmp_path: Path):
    found = study(tmp_path, GRID, only="*/[fij]*")
    found.work(Told(), MadeUp(accuracies))
    told = found.content("")
    page = table.write(told, found.out).read_text()
    assert [d.title for d in told.sections[0].drawings] == [
        *("Final accuracy", "Accuracy against time", "Accuracy after each task")
    ]
    ranking = told.sections[0].drawings[0].svg
    assert ranking.count('class="dot"') == 9, "a dot for each run"
    assert "finetune: 61.0, interval 60.0 to 62.0" in ranking
    assert [name for name, _ in told.sections[0].matrices] == ["finetune", "inflora"], "joint training has no matrix"
    assert page.count("</svg>") == 5
    for run in told.sections[0].lines[0].row.runs:
        assert run.folder in page


def test_the_classes_that_are_forgotten_most(tmp_path: Path):
    class WithClasses(MadeUp):
        def start_one(self, cell: Started) -> Process:
            process = super().start_one(cell)
            made = record.read(cell.place.run)
            seen = [("cat", 40, 90), ("dog", 80, 70 + 10 * made.seed), ("owl", 50, None)]
            classes = [record.ClassRecord(name=n, correct=c, total=100, correct_when_learnt=w) for n, c, w in seen]
            record.write(made.model_copy(update={"classes": tuple(classes)}), cell.place.run)
            return process

    found = study(tmp_path, GRID, only="*/[fj]*", records=tmp_path / "grid.jsonl")
    found.work(Told(), WithClasses(accuracies))
    page = table.write(found.content(""), found.out).read_text()
    assert dict(found.content("").sections[0].forgotten) == {"finetune": "cat 50.0"}, "the dog got better on average"
    assert "Classes that were forgotten most" in page
    shutil.rmtree(tmp_path / "cells")
    again = study(tmp_path, GRID, only="*/[fj]*", records=tmp_path / "grid.jsonl")
    assert dict(again.content("").sections[0].forgotten) == {"finetune": "cat 50.0"}, "records know it, too"


def test_rows_that_none_beats_in_both():
    assert pareto([(10, 50), (20, 40), (20, 60), (5, 30), (40, 60)]) == [(5, 30), (10, 50), (20, 60)]
    assert pareto([]) == []


def test_the_table_for_other_programs(tmp_path: Path):
    found = study(
        tmp_path, GRID.replace("  inflora: {", '  "50 % of_it & {more}": {method.name: inflora, '), only="*/[f5]*"
    )
    found.work(Told(), MadeUp(accuracies))
    table.write(found.content(""), found.out)
    lines = list(csv.DictReader(io.StringIO((found.out / "table.csv").read_text())))
    assert [(line["row"], line["method"], line["seed"], line["class_order"]) for line in lines] == [
        *(("finetune", "finetune", str(seed), "") for seed in range(3)),
        *(("50 % of_it & {more}", "inflora", str(seed), "") for seed in range(3)),
    ]
    assert [float(line["final_accuracy"]) for line in lines[:3]] == pytest.approx([0.6, 0.61, 0.62])
    assert (found.out / lines[0]["cell"]).exists() or Path(lines[0]["cell"]).exists()
    latex = (found.out / "table.tex").read_text()
    assert r"50 \% of\_it \& \{more\} & " in latex
    assert r"61.0 $\pm$ 1.0" in latex
    rows = [line for line in latex.splitlines() if line.endswith(r" \\")]
    assert len({line.replace(r"\&", "").count("&") for line in rows}) == 1
    assert f"{{l{'r' * rows[0].count('&')}}}" in latex


def test_with_enough_seeds_the_table_tests_the_differences(tmp_path: Path):
    """inflora is 10 points below finetune with every seed, joint training one above or below in turn; noproj is not done."""
    text = GRID.replace("[0, 1, 2]", "[0, 1, 2, 3, 4, 5, 6, 7]") + "orders: seeds\n"
    found = study(tmp_path, text, only="*/[fij]*")
    assert [(c.seed, c.config.stream.order_seed) for c in found.grid.cells(found.grid.rows[0], {})] == [
        (seed, seed) for seed in range(8)
    ]

    def even(config: RunConfig) -> float:
        return (
            0.6 + 0.01 * (-1) ** config.seed
            if config.stream.joint
            else accuracies(config.model_copy(update={"seed": 0}))
        )

    found.work(Told(), MadeUp(even))
    told = found.content("")
    table.write(told, found.out)
    page = (found.out / "table.md").read_text()
    assert "| Minus finetune | p | Runs |" in page
    assert "| −10.0 [−10.0, −10.0] | 0.016 | 8 |" in page, "2 / 2^8, twice as there are two rows"
    assert "| 0.0 [−1.0, +1.0] | 1.00 | 8 |" in page
    assert "over 8 pairs of runs with the same seed and class order" in page
    assert "with probability 95 %" in page
    assert "- **p**: p-value of that difference" in page
    rows = json.loads((found.out / "table.json").read_text())["streams"][0]["rows"]
    assert rows[1]["difference"]["p_holm"] == pytest.approx(2 / 2**7)
    assert rows[1]["difference"]["p"] == pytest.approx(1 / 2**7)


def test_the_spread_of_seeds_and_of_class_orders(tmp_path: Path):
    found = study(tmp_path, GRID.replace("[0, 1, 2]", "[0, 1]") + "orders: [null, 1, 2]\n")
    found.work(Told(), MadeUp(lambda config: accuracies(config) + 0.05 * (config.stream.order_seed or 0)))
    text = table.block(found.content(""))
    assert "over 3 class orders, each with the mean of its seeds" in text
    assert "over seeds and over class orders, in points: `finetune` 0.7 and 5.0, " in text


def test_what_training_can_gain_and_who_gains_it(tmp_path: Path):
    """The first row stands for a frozen backbone. Joint training is 8 points better, or 1; inflora is 10 points worse."""
    text = GRID.replace("baseline: finetune", "headroom: {frozen: finetune, joint: joint}")
    for joint, share, told in (
        (0.68, "−125 %", "Headroom: +8.0 [+8.0, +8.0] points"),
        (0.61, "–", "That is less than 3"),
    ):
        found = study(tmp_path / str(joint), text)
        found.work(
            Told(),
            MadeUp(
                lambda config, joint=joint: (joint + config.seed / 100) if config.stream.joint else accuracies(config)
            ),
        )
        written = found.content("")
        page = table.block(written)
        assert told in page
        (line,) = (line for line in page.splitlines() if line.startswith("| `inflora` | 5"))
        assert line.split(" | ")[7] == share
        table.write(written, found.out)
        rows = json.loads((found.out / "table.json").read_text())["streams"][0]["rows"]
        assert rows[1]["headroom_share"] == (pytest.approx(-1.25) if share != "–" else None)
    bad = problems(write_grid(tmp_path, text.replace("joint: joint}", "joint: jont}")))
    assert "headroom.joint = 'jont': not one of the methods" in bad[0]


def test_a_cost_that_is_not_known_is_left_out(tmp_path: Path):
    """As of a run that shared its features with others, before that was counted."""
    records = tmp_path / "grid.jsonl"
    found = study(tmp_path, GRID, records=records)
    found.work(Told(), MadeUp(accuracies))
    found.content("")
    shutil.rmtree(tmp_path / "cells")
    noted = [json.loads(line) for line in records.read_text().splitlines()]
    for line in noted:
        line["cost"] |= {"seconds": {"total": None}, "peak_memory_mb": None}
    records.write_text("".join(json.dumps(line) + "\n" for line in noted[1:]))
    found, told, start = study(tmp_path, GRID, records=records), Told(), MadeUp(accuracies)
    found.work(told, start)
    assert len(start.started) == 1, "the one that is not in the records"
    text = table.block(found.content(""))
    assert text.count("| 10 | 1.20 k | 3.40 k | 0 B | 524 MB |") == 1
    assert text.count("| – | 1.20 k | 3.40 k | 0 B | – |") == len(found.grid.rows) - 1


def test_language_models_have_a_table_of_their_own_and_a_busy_machine_moves_no_cost(tmp_path: Path):
    records = tmp_path / "grid.jsonl"
    found = study(tmp_path, GRID, records=records)
    found.work(Told(), MadeUp(accuracies))
    first = table.block(found.content(""))
    assert "Language models" not in first
    assert "| Task inference |" in first
    shutil.rmtree(tmp_path / "cells")
    noted = [json.loads(line) for line in records.read_text().splitlines()]
    for number, line in enumerate(noted):
        busy = 9 if number % 3 == 1 else 1
        line["cost"]["seconds"] |= {"total": 10.0 * busy, "train": 5.0 * busy}
        line["task_inference_accuracy"] = []
        line["language"] = {
            "zero_shot": [[1, 4]] * len(line["matrix"]["total"][-1]),
            "perplexity": [8.0, 9.0, 10.0 + number % 3],
            "tokens": 1000,
        }
    records.write_text("".join(json.dumps(line) + "\n" for line in noted))
    found = study(tmp_path, GRID, records=records)
    found.work(Told(), MadeUp(accuracies))
    told = found.content("")
    assert "Task inference" not in told.accuracies, "no run has any"
    assert "Task-aware" in told.accuracies
    finetune = next(line for line in told.sections[0].lines if line.name == "finetune")
    assert (finetune.costs[0], finetune.language[-1]) == ("10", "200"), "the median of three"
    shown = dict(zip(told.language, finetune.language, strict=True))
    assert (shown["Zero-shot"], shown["Perplexity before"], shown["Perplexity after"]) == ("25.0", "8.0", "11.0")
    assert "Forward transfer" not in told.language, "no run predicted tasks before they were learnt"
    html = table.write(told, found.out).read_text()
    for page in (table.block(told), html):
        assert all(part in page for part in (table.LANGUAGE_CAPTION, "Perplexity after", "11.0"))
        assert "Forward transfer" not in page


def test_a_stream_without_runs_says_so_in_a_line(tmp_path: Path):
    text = GRID.replace("seeds", "streams: {begun: {}, planned: {data.per_class: 2}}\nseeds")
    found = study(tmp_path, text, only="begun/")
    found.work(Told(), MadeUp(accuracies))
    told = found.content("")
    assert "## planned\n\nNo run of this stream is done; 12 are planned.\n\n### Columns" in table.block(told)
    page = table.write(told, found.out).read_text()
    assert page.count("<table") == 4, "two of the stream that is begun, its runs, and what it ran on"
    assert "<p>No run of this stream is done; 12 are planned.</p>" in page


def test_a_row_that_is_not_like_the_others_says_so(tmp_path: Path):
    text = SEARCHED.replace("inflora: {method.epsilon: 0.99}", "inflora: {search: {method.epsilon: [0.9, 0.99]}}")
    text = text.replace("  noproj", "  prototype: {search: false}\n  noproj").replace("[0, 1, 2]", "[3]")
    found = study(tmp_path, text)

    class OfAnotherStream(MadeUp):
        def start_one(self, cell: Started) -> Process:
            process, place = super().start_one(cell), cell.place
            if "noproj" not in place.folder.name and "rank: 3" in place.config.read_text():
                made = record.read(place.run)
                other = made.stream.model_copy(update={"fingerprint": "eeeeeeee"})
                cost = made.cost.model_copy(update={"kept_examples": 30, "kept_per_class": 3})
                record.write(made.model_copy(update={"stream": other, "cost": cost}), place.run)
            return process

    found.work(Told(), OfAnotherStream(accuracies))
    told = table.block(found.content("x"))
    for note in (
        "- `inflora`: its search had 4 trials, where most had 2.",
        "- Not searched (settings given, or the defaults): `prototype`.",
        "- `noproj` did not learn the same examples as `finetune`",
        "- `joint`: all tasks at once, as one task. Only micro accuracy can be compared",
        "- `noproj` keeps 30 training examples and trains on them again. Its memory does not count them.",
        "One pair of runs has no spread, so there is no interval.",
    ):
        assert note in told, note
    assert "| `inflora` | 73.0 | 73.0 | 73.0 | 0.0 | 73.0 | 50.0 | +10.0 | 1 |" in told


def test_a_table_goes_into_a_page_between_its_markers(tmp_path: Path):
    found = study(tmp_path, GRID)
    found.work(Told(), MadeUp(accuracies))
    told, page = found.content("x"), tmp_path / "page.md"
    table.write(told, found.out, page)
    assert page.read_text() == f"# Made up\n\n{table.BEGIN}\n\n{table.block(told)}\n{table.END}\n"
    page.write_text(f"# Mine\n\nReading.\n\n{table.BEGIN}\nold\n{table.END}\n\nAfter.\n")
    for _ in range(2):
        table.write(told, found.out, page)
        assert (
            page.read_text() == f"# Mine\n\nReading.\n\n{table.BEGIN}\n\n{table.block(told)}\n{table.END}\n\nAfter.\n"
        )
    (tmp_path / "shared.yaml").write_text("stream.tasks: 2\n")
    shared = study(tmp_path, GRID.replace("methods:", "streams: {one: shared.yaml, two: shared.yaml}\nmethods:", 1))
    assert [name for name, _ in shared.content("x").files].count("shared.yaml") == 1
    page.write_text("# No markers\n")
    with pytest.raises(LaminaError, match=r"page.md: it needs one line <!-- compare -->"):
        table.write(told, found.out, page)
    assert page.read_text() == "# No markers\n"
    page.write_bytes(b"\xff\xfe\x00")
    for other in (page, tmp_path):
        with pytest.raises(LaminaError, match=r"--page .* cannot be read as text"):
            table.check_page(other)


def test_on_a_terminal_what_is_at_work_is_shown():
    written = io.StringIO()
    with GridWatcher("grid", Console(file=written, force_terminal=True, no_color=True, width=120)) as watch:
        watch.say("[2/4] done")
        watch.show(2, 4, 600.0, [("a/finetune/seed0", "task 2/3 [learnt]"), ("a/inflora/seed0", "")])
    for part in ("2/4, about 10 min left", "a/finetune/seed0", "task 2/3 [learnt]", "[2/4] done"):
        assert part in written.getvalue()
    written = io.StringIO()
    with GridWatcher("grid", Console(file=written, force_terminal=True, no_color=True, width=120)) as watch:
        watch.show(3, 4, 20.0, [])
    assert "3/4, about 20 s left" in written.getvalue()
    plain = io.StringIO()
    with GridWatcher("grid", Console(file=plain)) as watch:
        watch.show(2, 4, 600.0, [])
        watch.say("[2/4] done")
    assert plain.getvalue() == "[2/4] done\n"


def test_what_is_left_is_guessed_from_what_is_done():
    known = {"a": [10.0, 20.0], "b": [100.0]}
    assert seconds_left(["a", "a", "b"], known, 1) == 130
    assert seconds_left(["a", "a", "b"], known, 2) == 100, "no less than the longest"
    assert seconds_left(["c"], known, 1) == pytest.approx(130 / 3)
    assert seconds_left(["a"], {}, 1) is None
    assert seconds_left([], known, 1) == 0
    assert [duration(s) for s in (40, 600, 9000)] == ["40 s", "10 min", "2.5 h"]


@pytest.mark.parametrize("option", ["out", "cells"])
def test_a_folder_that_is_a_file_is_refused_at_once(tmp_path: Path, option: str):
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match=rf"--{option} .*inside: .*taken is a file\. Give a folder\."):
        Study(write_grid(tmp_path, "methods: {finetune: {}}\n"), **{option: tmp_path / "taken" / "inside"})


@pytest.mark.parametrize(
    ("runs", "more"),
    [
        ([(0, None), (1, None)], False),
        ([(0, None), (0, 1)], True),
        ([(0, 5), (1, 6)], False),
        ([(0, 1), (1, 1), (0, 2), (1, 2)], True),
    ],
)
def test_what_gives_more_units(runs: list[tuple[int, int | None]], more: bool):
    gain = stats.paired(dict.fromkeys(runs, 0.5), dict.fromkeys(runs, 0.25))
    assert gain is not None
    assert gain.by_order == more


def test_a_cluster_that_takes_all_cells_runs_as_many_as_hold_a_lease(tmp_path: Path):
    told = Told()
    study(tmp_path, "methods: {finetune: {}}\nseeds: [0, 1, 2, 3]\n").work(
        told, MadeUp(lambda config: 0.5, side_by_side=1000)
    )
    first = next(line for line in told.lines if line.startswith("[1/4]"))
    assert "about 30 s left" in first, "of the other three, none holds one"
