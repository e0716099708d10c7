"""Numbers that are not finite are refused where they arise, with a message that names what is not finite."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conformance.cases import EVALUATION, TRAINING, make_method, stream
from tests.tiny import tiny_vit

from lamina.config import ConsolidationConfig
from lamina.data.streams import Stream
from lamina.engine.loop import Loop
from lamina.errors import TrainingError
from lamina.learner import Learner
from lamina.types import Augment, Ints, Table

RIDGE = ConsolidationConfig(merging="ema", drift="linear", classifier="ridge", random_features=64)


class Spoilt:
    """A table in which one pixel of one row has this value."""

    def __init__(self, table: Table, row: int, value: float) -> None:
        self.table, self.row, self.value = table, row, value

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, torch.Tensor]:
        pixels_bchw = self.table.inputs(rows, augment)["pixel_values"].clone()
        pixels_bchw[torch.from_numpy(np.asarray(rows) == self.row), 0, 3, 3] = self.value
        return {"pixel_values": pixels_bchw}

    def lengths(self, rows: Ints) -> Ints:
        return self.table.lengths(rows)


def spoilt(value: float) -> Stream:
    """The second task has the pixel."""
    found = stream("image", "class")
    task = found[1]
    table = Spoilt(task.train.table, int(task.train.rows_n[1]), value)
    tasks = (found[0], replace(task, train=replace(task.train, table=table)), found[2])
    return replace(found, tasks=tasks)


def loop(name: str, folder: Path, stream: Stream, **settings: Any) -> Loop:
    training = TRAINING.model_copy(update=settings.pop("training", {}))
    return Loop(
        learner=Learner(tiny_vit(blocks=2), ("k", "v")),
        method=make_method(name),
        stream=stream,
        training=training,
        evaluation=EVALUATION,
        seed=0,
        checkpoints=folder,
        **settings,
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30], ids=str)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("inflora", {}),
        ("duallora", {}),
        ("finetune", {"consolidation": RIDGE}),
        ("prototype", {}),
        ("prototype", {"consolidation": RIDGE.model_copy(update={"merging": "none"})}),
        ("color", {}),
        ("taskarithmetic", {}),
        ("lamina", {}),
        ("fsa", {"consolidation": ConsolidationConfig(classifier="gram", random_features=16)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_an_input_that_is_not_finite_is_refused_and_never_measured(
    name: str, settings: dict[str, Any], value: float, tmp_path: Path
):
    """1e30 is finite, but its square is not. A layer norm may swallow it; then everything that is kept must be finite."""
    run = loop(name, tmp_path, spoilt(value), **settings)
    with pytest.raises(TrainingError, match=r"not finite|loss is nan") if value != 1e30 else suppress(TrainingError):
        run.run()
    assert run.matrix.tasks == 1 or value == 1e30
    if run.matrix.tasks > 1:
        kept = run.learner.tensors() | run.method.memory | run.consolidation.memory
        assert all(torch.isfinite(part).all() for part in kept.values())


@pytest.mark.parametrize(
    ("name", "what"),
    [("inflora", r"inputs of block0\.attention"), ("duallora", r"probes of block0\.v")],
)
def test_moments_name_what_is_not_finite(name: str, what: str, tmp_path: Path):
    with pytest.raises(TrainingError, match=rf"{what}.* not finite .*check the data"):
        loop(name, tmp_path, spoilt(np.nan)).run()


@pytest.mark.parametrize("lr", [1e20, 1e38])
@pytest.mark.parametrize("steps", ["one", "many"])
@pytest.mark.parametrize("name", ["color", "inflora", "finetune", "taskarithmetic", "lamina"])
def test_training_that_blows_up_is_refused_even_in_its_last_step(name: str, steps: str, lr: float, tmp_path: Path):
    """With a single step no loss shows it: the adapters are finite and far too large."""
    training = {"lr": lr, "epochs": 1 if steps == "one" else 3, "batch_size": 64 if steps == "one" else 8}
    with pytest.raises(TrainingError, match=r"finite|loss is"):
        loop(name, tmp_path, stream("image", "class"), training=training).run()
