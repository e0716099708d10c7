"""Guards: what makes a comparison worthless stands at the top of its page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.end_to_end.conftest import paint
from tests.grids import MadeUp, Told, record_of, write_grid
from torch import Tensor

from lamina import record
from lamina.compare import Study, guards, table
from lamina.compare.runners import Started
from lamina.config import RunConfig
from lamina.config.schema import StreamConfig
from lamina.data.leaks import Leaks
from lamina.engine.evaluate import depends_on_batch
from lamina.learner import Learner
from lamina.record import BatchRecord
from lamina.runs.side_by_side import Process
from lamina.types import Batch


class Leaky(MadeUp):
    """Runs whose predictions depend on the batch."""

    def start_one(self, cell: Started) -> Process:
        process = super().start_one(cell)
        made = record.read(cell.place.run)
        record.write(made.model_copy(update={"batch": BatchRecord(examples=6, dependent=2)}), cell.place.run)
        return process


def test_leaks_stand_at_the_top(tmp_path: Path):
    for split, images in (("train", 6), ("test", 4)):
        paint(tmp_path / "data" / split, 3, images)  # the test images of the first class are training images
    text = f"base: {{data.source: {tmp_path / 'data'}, stream.tasks: 3}}\nmethods: {{finetune: {{}}}}\n"
    study = Study(write_grid(tmp_path, text), out=tmp_path / "out", cells=tmp_path / "cells")
    told = Told()
    study.work(told, Leaky(lambda config: 0.5))
    assert told.lines[1].startswith(
        "Leak in the data (stream grid): 4 of 12 test examples are also training examples (such as "
    )
    content = study.content("")
    page = table.write(content, study.out).read_text()
    text = (study.out / "table.md").read_text()
    head = text.partition("Accuracies in %")[0]
    assert "**Leak in the data (stream grid): 4 of 12 test examples are also training examples" in head
    assert (
        "**Leak through the batch: 2 of 6 predictions of `finetune` on grid have scores that depend on the other examples.**"
        in head
    )
    assert page.index("Leak in the data") < page.index("<table")
    facts = dict(content.facts)
    assert facts["Test examples among the training examples"] == "grid: 4 exact, 0 near, of 12"
    assert facts["Predictions that depend on the batch"] == "2 of 6 tried in 1 run"
    assert facts["Pre-training"].startswith("nano: trained on 98,000 training images of Tiny ImageNet")


@pytest.mark.parametrize(
    ("stream", "domains"),
    [
        ({"scenario": "class", "domains": ["a"]}, None),
        ({"scenario": "domain", "domains": ["a", "b"]}, ("a", "b")),
        ({"scenario": "mixed", "plan": [{"name": "1", "classes": ["x"], "domains": ["b"]}]}, ["b"]),
        ({"scenario": "mixed", "plan": [{"name": "1", "classes": ["x"]}]}, None),
    ],
)
def test_the_domains_that_a_stream_learns_from(stream: dict[str, Any], domains: object):
    assert guards._domains(StreamConfig.model_validate(stream)) == domains


def test_a_leak_is_said_by_domain():
    found = Leaks(tests=1000, exact=0, near=7, examples=(("a", "b"),), domains={"news": 2, "films": 5})
    assert list(guards.warnings("texts", found, {})) == [
        "Leak in the data (stream texts): 7 of 1,000 test examples are nearly the same as one of the training examples (such "
        "as a, like b). By domain: 5 in films, 2 in news."
    ]


def test_what_was_found_is_kept_until_the_data_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def search(source: object, domains: object) -> Leaks:
        calls.append("search")
        return Leaks(tests=3, exact=1, near=None, examples=(("a", "b"),))

    monkeypatch.setattr(guards, "leaks", search)
    monkeypatch.setattr(guards, "has_near", lambda source: False)
    paint(tmp_path / "data", 2, 5)
    config = RunConfig.model_validate({"data": {"source": str(tmp_path / "data")}})
    first = guards.look(config, tmp_path / "kept")
    assert guards.look(config, tmp_path / "kept") == first
    assert len(calls) == 1
    monkeypatch.setattr(guards, "has_near", lambda source: True)
    guards.look(config, tmp_path / "kept")
    assert len(calls) == 2, "now near copies can be found, too"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Leaks(tests=10, exact=0, near=0), None),
        (Leaks(tests=10, exact=0, near=None), None),
        (Leaks(tests=10, exact=0, near=None, searched=True), None),
        (
            Leaks(tests=10, exact=0, near=2, examples=(("a", "b"),)),
            "2 of 10 test examples are nearly the same as one of the ",
        ),
        (
            Leaks(tests=10, exact=3, near=2, examples=(("a", "b"),)),
            "3 of 10 test examples are also training examples, and 2 ",
        ),
    ],
)
def test_leaks_in_words(found: Leaks, said: str | None):
    warnings = list(guards.warnings("s", found, {}))
    assert bool(warnings) == bool(said)
    assert said is None or said in warnings[0]
    made = record_of(RunConfig.model_validate({}), 0.5)
    told = dict(guards.facts({"s": found}, [made]))
    why = "images below 16 pixels" if found.searched else "pip install 'lamina[guards]'"
    near = f"near copies not looked for ({why})" if found.near is None else f"{found.near} near"
    assert told["Test examples among the training examples"] == f"s: {found.exact} exact, {near}, of 10"


# ---------------------------------------------------------------------------------------------- the batch


class Scores:
    """Predicts from the pixels; a leaky one subtracts the mean over the batch."""

    uses_task = False

    def __init__(self, leaky: bool) -> None:
        self.leaky = leaky

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        scores_bj = batch.inputs["pixel_values"].flatten(1)[:, :4].float()
        return scores_bj - scores_bj.mean(0) if self.leaky else scores_bj * (1 + 1e-4 * len(scores_bj))

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        return self.predict(learner, batch)


class Unfolded:
    """In place of a learner."""

    @contextmanager
    def folded(self) -> Iterator[None]:
        yield


class Some:
    """In place of examples: their numbers."""

    def __init__(self, rows_n: np.ndarray) -> None:
        self.rows_n = rows_n

    def __len__(self) -> int:
        return len(self.rows_n)

    def select(self, positions_n: np.ndarray) -> "Some":
        return Some(self.rows_n[positions_n])


@pytest.mark.parametrize(("leaky", "dependent"), [(False, 0), (True, 5)])
def test_predictions_that_depend_on_the_batch_are_seen(leaky: bool, dependent: int):
    values_nj = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def batches(some: Some) -> list[Batch]:
        return [
            Batch(inputs={"pixel_values": values_nj[some.rows_n]}, labels_b=torch.zeros(len(some), dtype=torch.long))
        ]

    assert depends_on_batch(Unfolded(), Scores(leaky), Some(np.arange(5)), batches) == dependent


def test_impossible_outputs_do_not_count():
    class Masked(Scores):
        def predict(self, learner: Learner, batch: Batch) -> Tensor:
            return torch.cat([super().predict(learner, batch), torch.full((len(batch), 1), -torch.inf)], 1)

    def batches(some: Some) -> list[Batch]:
        return [
            Batch(inputs={"pixel_values": torch.ones(len(some), 4)}, labels_b=torch.zeros(len(some), dtype=torch.long))
        ]

    assert depends_on_batch(Unfolded(), Masked(False), Some(np.arange(3)), batches) == 0
