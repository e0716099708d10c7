"""The law that allows a training step to be recorded once and replayed (speed/cuda_graph.py): between two steps of a task
nothing that a loss depends on changes but numbers in tensors, which stay where they are.

Without a GPU, a step is recorded as the list of PyTorch's operations, which sees as little of Python as a CUDA graph does. With
one, a run from recordings must be near one without. All runs have the layers of `lamina.speed`.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.cases import HOME, TRAINING, make_loop
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lamina.config import RehearsalConfig
from lamina.engine.loop import Loop
from lamina.learner import Learner
from lamina.methods import METHODS
from lamina.speed import accelerate, around, cuda_graph
from lamina.types import Batch

TRAINED = sorted(name for name, method in METHODS.items() if method.trains)
LONG = TRAINING.model_copy(update={"epochs": 4, "batch_size": 8})


class Tape(TorchDispatchMode):
    """The operations of a step, autograd's included, to be repeated with other inputs. Tensors that are neither inputs nor
    computed in the step are read where they lie.

    (`torch.fx`'s `make_fx` records the same, but takes seconds.)
    """

    def __init__(self, step: Callable[..., list[Tensor]], *inputs: Tensor) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []
        self.inputs = inputs
        with self:
            self.outputs = step(*inputs)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        made = operation(*given[0], **given[1])
        self.calls.append((operation, given, made))
        return made

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        now = {id(old): new for old, new in zip(self.inputs, inputs, strict=True)}

        def today(value: Any) -> Any:
            return now.get(id(value), value)

        with torch.no_grad():
            for operation, given, made in self.calls:
                args, kwargs = tree_map(today, given)
                again = operation(*args, **kwargs)
                now |= {id(old): new for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True)}
        return [now[id(output)] for output in self.outputs]


def in_use(learner: Learner) -> list[Tensor]:
    """Returns the frozen tensors that a forward reads."""
    weights = [layer.weight_oi for layer in learner.layers.values()]
    return [*learner.backbone.module.parameters(), *learner.backbone.module.buffers(), *weights]


@pytest.mark.parametrize("per_class", [0, 2])
@pytest.mark.parametrize("name", TRAINED)
def test_a_recorded_step_remains_the_step(name: str, per_class: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if per_class and not METHODS[name].trains_on(1):
        pytest.skip("a method that trains on the first task only rehearses nothing")
    replayed: list[int] = []

    class Recorded(cuda_graph.GraphedGradients):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.graph: Tape | None = None
            self.places: list[int] = []

        def __call__(self, batch: Batch) -> Tensor:
            def step(pixels_bchw: Tensor, labels_b: Tensor) -> list[Tensor]:
                loss = self.loss(Batch(inputs={"pixel_values": pixels_bchw}, labels_b=labels_b))
                return [loss, *torch.autograd.grad(loss, self.parameters, allow_unused=True)]

            loss, given = self._plain(batch), (batch.inputs["pixel_values"], batch.labels_b)
            places = [value.data_ptr() for value in in_use(learnt.learner)]
            if len(batch) == self.recorded and self.graph is None:
                self.graph, self.places = Tape(step, *given), places
            elif len(batch) == self.recorded:
                wanted = [loss, *(p.grad for p in self.parameters)]
                for number, (got, want) in enumerate(zip(self.graph(*given), wanted, strict=True)):
                    torch.testing.assert_close(
                        got, want, rtol=1e-4, atol=1e-6, msg=lambda text, n=number: f"{n}: {text}"
                    )
                assert places == self.places
                replayed.append(learnt.position.task)
            return loss

    monkeypatch.setattr(around, "GraphedGradients", Recorded)
    monkeypatch.setattr(around, "worth_recording", lambda *_: True)
    learnt = make_loop(name, HOME, tmp_path, training=LONG, rehearsal=RehearsalConfig(per_class=per_class))
    learnt.steps = accelerate(learnt.learner)
    learnt.run()
    assert set(replayed) == {number for number in range(3) if METHODS[name].trains_on(number)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("per_class", [0, 2])
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_from_recordings_is_near_one_without(
    name: str, per_class: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if per_class and not METHODS[name].trains_on(1):
        pytest.skip("a method that trains on the first task only rehearses nothing")

    def run(folder: str) -> Loop:
        notes: list[str] = []
        training = LONG.model_copy(update={"optimizer": "sgd", "momentum": 0.0})
        rehearsal = RehearsalConfig(per_class=per_class)
        made = make_loop(name, HOME, tmp_path / folder, device="cuda", training=training, rehearsal=rehearsal)
        made.on_event = lambda event: notes.append(event.note) if event.note else None
        with closing(accelerate(made.learner)) as made.steps:
            made.run()
        assert notes == []
        return made

    recordings: list[object] = []
    record = cuda_graph._Recording.__init__
    monkeypatch.setattr(
        cuda_graph._Recording, "__init__", lambda self, *a: (recordings.append(self), record(self, *a))[1]
    )
    without = run("without")
    assert recordings == []
    monkeypatch.setattr(cuda_graph, "ENOUGH", 1)
    monkeypatch.setattr(cuda_graph, "FASTER", float("inf"))
    recorded = run("recorded")
    assert len(recordings) == sum(METHODS[name].trains_on(number) for number in range(len(recorded.stream)))
    losses = [torch.tensor([loss.value for loss in made.state.losses]) for made in (recorded, without)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
