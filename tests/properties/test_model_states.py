"""Random sequences of learning, refusing, rolling back, crashing and reopening keep a model's invariants."""

import contextlib
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.models import CLASSES, backbone, content, images, small

from lamina.engine import checkpoint
from lamina.errors import MethodError, ModelError
from lamina.export import export_merged, export_onnx, export_peft, export_tasks
from lamina.model import GateRefused, Model, store

HOME = Path(tempfile.mkdtemp(prefix="lamina-states-"))
BASE: list[Path] = []


class Crash(BaseException):
    """The process is gone."""


def world() -> tuple[Path, Path]:
    """A backbone and data, made once."""
    if not BASE:
        BASE.extend([backbone(HOME / "vit"), images(HOME / "images.parquet", train=4, test=2)])
    return BASE[0], BASE[1]


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Any:
    yield
    shutil.rmtree(HOME, ignore_errors=True)


class States(RuleBasedStateMachine):
    """What a model should hold is kept beside it, in plain lists."""

    @initialize(method=st.sampled_from(("finetune", "inflora", "lamina")))
    def create(self, method: str) -> None:
        base, self.data = world()
        self.path = Path(tempfile.mkdtemp(dir=HOME)) / "model"
        quick = {"training.epochs": 1, "probes.per_class": 1, "gate.task_drop": None, "gate.negative_flips": None}
        small(self.path, base, method, quick)
        self.learnt: list[tuple[str, tuple[str, ...]]] = []
        self.ever: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        self.version = self.number = 0
        self.outputs: dict[str, dict[str, torch.Tensor]] = {}

    classes = st.lists(st.sampled_from(CLASSES), min_size=1, max_size=3, unique=True).map(
        lambda found: tuple(sorted(found))
    )

    def name(self) -> str:
        self.number += 1
        return f"task {self.number}"

    def accepted(self, name: str, classes: tuple[str, ...]) -> None:
        self.learnt = [*self.learnt, (name, classes)]
        self.ever[name] = self.learnt
        self.version += 1

    @precondition(lambda self: len(self.learnt) < 4)
    @rule(classes=classes)
    def learn(self, classes: tuple[str, ...]) -> None:
        name = self.name()
        Model(self.path).learn(self.data, name=name, classes=classes, discard=True)
        self.accepted(name, classes)

    @precondition(lambda self: 0 < len(self.learnt) < 4)
    @rule(classes=classes, force=st.booleans())
    def learn_what_the_gate_refuses(self, classes: tuple[str, ...], force: bool) -> None:
        name, model = self.name(), Model(self.path)
        strict = {"gate.new_accuracy": 1.0, "training.lr": 1e-9, "training.head_lr": 1e-9}
        try:
            model.learn(self.data, name=name, classes=classes, settings=strict, discard=True)
        except GateRefused:
            if not force:
                return
            learnt = model.learn(self.data, name=name, classes=classes, settings=strict, force=True)
            assert learnt.card.forced
        self.accepted(name, classes)

    @precondition(lambda self: len(self.learnt) < 4)
    @rule(classes=classes, at=st.sampled_from(("write", "facts", "training")))
    def crash_and_go_on(self, classes: tuple[str, ...], at: str) -> None:
        name = self.name()
        with pytest.MonkeyPatch.context() as patch:

            def crash(*_: Any, **__: Any) -> None:
                raise Crash

            add = store.Store.add

            def add_half(*arguments: Any) -> None:
                patch.setattr(checkpoint, "fsync", crash)
                add(*arguments)

            if at == "training":
                patch.setattr("lamina.engine.loop.Loop.descend", crash)
            elif at == "write":
                patch.setattr(store.Store, "add", add_half)
            else:
                patch.setattr(store.Store, "write_facts", crash)
            with pytest.raises(Crash):
                Model(self.path).learn(self.data, name=name, classes=classes, discard=True)
        self.holds()
        Model(self.path).learn(self.data, name=name, classes=classes, discard=True)
        self.accepted(name, classes)

    @precondition(lambda self: bool(self.ever))
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([None, *self.ever]))
        Model(self.path).rollback(name)
        self.learnt = self.ever[name] if name is not None else []
        self.version += 1

    @precondition(lambda self: bool(self.learnt))
    @rule(out=st.sampled_from(("whole", "adapter")))
    def export(self, out: str) -> None:
        """It reads the model, and what it writes was compared with it."""
        where = Path(tempfile.mkdtemp(dir=HOME)) / out
        before = content(self.path)
        write = export_merged if out == "whole" else partial(export_peft, with_base=True)
        if Model(self.path).facts.config.method["name"] == "lamina":  # it has no single update
            write = export_onnx if out == "whole" else partial(export_tasks, with_base=True)
        if out == "adapter" and all(len(classes) == 1 for _, classes in self.learnt):
            with contextlib.suppress(MethodError):  # tasks of one class may move no weight
                write(self.path, where)
        else:
            write(self.path, where)
            assert (where / "export.json").is_file()
        assert content(self.path) == before

    @rule()
    def forget_kept(self) -> None:
        Model(self.path).forget_kept()
        assert list(self.path.glob("tasks/*/probes.safetensors")) == []

    @precondition(lambda self: bool(self.learnt))
    @rule()
    def learn_a_name_again(self) -> None:
        with pytest.raises(ModelError, match="already"):
            Model(self.path).learn(self.data, name=self.learnt[-1][0], discard=True)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "path"):
            return
        model = Model(self.path)
        assert model.version == self.version
        assert [(task.name, task.classes) for card in model.cards for task in card.tasks] == self.learnt
        if not self.learnt:
            return
        predictor = model.predictor()
        assert {output.task for output in predictor.learner.outputs} == {name for name, _ in self.learnt}
        assert set(predictor.labels) == {label for _, classes in self.learnt for label in classes}
        # A version never changes, however it was come to.
        weights = {name: value.clone() for name, value in predictor.learner.tensors().items()}
        before = self.outputs.setdefault(self.learnt[-1][0], weights)
        assert before.keys() == weights.keys()
        assert all(torch.equal(before[name], value) for name, value in weights.items())
        predictor.close()


quick = settings(
    max_examples=8,
    stateful_step_count=7,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a shorter sequence takes minutes to find
)
TestStates = States.TestCase
TestStates.settings = quick
