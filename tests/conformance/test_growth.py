"""How the cost of every method grows with the number of tasks, on counted bytes and counted operations.

One stream of eight tasks, looked at after 2, 4 and 8. Every task brings the same two classes in a new domain, so whatever
depends on how many classes there are stands still, and only the number of tasks moves.

Shape letters: b batch, d width, r rank, o outputs, i inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.conformance.cases import CASES, EVALUATION, TRAINING, Growth, head_numbers
from tests.tiny import tiny_images, tiny_vit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lamina.config import ConsolidationConfig, MethodConfig
from lamina.data.streams import Stream, domain_plan, make_stream
from lamina.engine import checkpoint
from lamina.engine.loop import Event, Loop
from lamina.learner import Learner
from lamina.methods import METHODS

TASKS = (2, 4, 8)
PARTS = ("branches", "memory", "step", "prediction", "fold", "consolidation")


def law(name: str, part: str) -> Growth:
    """What a method declares of a part of its cost: of steps and predictions to its users, of the rest in its row."""
    return getattr(METHODS[name].needs if part in ("step", "prediction") else CASES[name], part)


class Operations(TorchDispatchMode):
    """Counts what is computed while it is open: of products (two per multiplication and addition, as PyTorch's own counter
    has it) and distances their arithmetic, of everything else the numbers it writes. Views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, packet = func(*args, **(kwargs or {})), func.overloadpacket
        if formula := FORMULAS.get(packet):
            self.count += formula(*args, **(kwargs or {}), out_val=made)
        elif not (func.is_view or packet is aten._unsafe_view):
            tensors = made if isinstance(made, (tuple, list)) else (made,)
            self.count += sum(value.numel() for value in tensors if isinstance(value, Tensor))
        return made


def distances(x_bd: Tensor, y_kd: Tensor, *_: object, out_val: Tensor) -> int:
    """A difference, a power and a sum for every pair and dimension."""
    return 3 * out_val.numel() * x_bd.shape[-1]


aten = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = dict(flop_registry) | {
    aten._cdist_forward: distances,
    # PyTorch's counter knows attention on cards only.
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Cost:
    """After one task."""

    branches: int
    memory: int
    step: int
    """Operations of a training step, the optimiser's included."""
    prediction: int
    """Operations of predicting one example. Of more, CoLoR gathers as many adapters as they happen to use."""
    fold: int
    consolidation: int
    bound: int
    """In bytes: `memory_bound`."""


def eight_tasks() -> Stream:
    """Twenty training examples in a task, which are one batch."""
    data = tiny_images(2 * TASKS[-1] * 14, classes=2, domains=TASKS[-1])
    return make_stream(data, domain_plan(data), "domain", per_class=10)


def costs_of(name: str, folder: Path) -> dict[int, Cost]:
    """By the number of tasks learnt."""
    found: dict[int, Cost] = {}
    steps: dict[int, int] = {}  # operations of the last step of every task

    def counted(*args: Any) -> float:
        with Operations() as counter:
            loss = step(*args)
        steps[loop.position.task] = counter.count
        return loss

    def look(event: Event) -> None:
        if event.accuracy is not None and event.task + 1 in TASKS:
            found[event.task + 1] = cost(loop, steps.get(event.task, 0))

    method = METHODS[name]
    config = method.config_type(**CASES[name].settings | CASES[name].full)
    loop = Loop(
        learner=Learner(tiny_vit(blocks=2), ("k", "v")),
        method=method(config, TASKS[-1]),
        consolidation=consolidation(method.config_type),
        stream=eight_tasks(),
        training=TRAINING.model_copy(update={"batch_size": 20}),
        evaluation=EVALUATION,
        seed=0,
        checkpoints=folder,
        on_event=look,
    )
    step, loop._step = loop._step, counted  # type: ignore[method-assign]
    loop.run()
    return found


def consolidation(config: type[MethodConfig]) -> ConsolidationConfig:
    """The default with this method, with few random features if it has any."""
    section = "consolidation."
    found = {key.removeprefix(section): value for key, value in config.around.items() if key.startswith(section)}
    return ConsolidationConfig(**found | ({"random_features": 64} if "random_features" in found else {}))


def cost(loop: Loop, step: int) -> Cost:
    learner, method = loop.learner, loop.method
    one = loop.stream[0].test.batch(np.arange(1))
    with learner.folded(), Operations() as predicting:
        loop.consolidation.predict(learner, one)
    with Operations() as folding, learner.folded():
        pass
    width, written = learner.backbone.width, 1  # concatenated
    if loop.consolidation.config.classifier == "gram":
        width, written = len(loop.consolidation.memory["classifier/weight_mj"]), 2  # rounded, concatenated
    elif loop.consolidation.config.classifier != "own":
        width, written = loop.consolidation.memory["classifier/weight_jd"].shape[1], 3  # with the bias
    of_outputs = len(learner.outputs) * (2 * width + written)
    return Cost(
        branches=learner.stored_parameters() - head_numbers(learner),
        memory=method.memory_bytes,
        step=step,
        prediction=predicting.count - of_outputs,
        fold=folding.count,
        consolidation=loop.consolidation.memory_bytes,
        bound=method.memory_bound(learner),
    )


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[int, Cost]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "fsync", lambda _: None)
        return cache(lambda name: costs_of(name, tmp_path_factory.mktemp(name)))


def obeys(growth: Growth, after: Mapping[int, int]) -> bool:
    """Whether these figures, by the number of tasks, grow so. "bounded" needs a bound beside them: see below."""
    two, four, eight = (after[tasks] for tasks in TASKS)
    return {
        "none": two == four == eight == 0,
        "constant": two == four == eight > 0,
        "linear": eight - four == 2 * (four - two) > 0,
        "bounded": True,
    }[growth]


# ------------------------------------------------------------------------------------------------------ the counter


def test_the_counter_counts_products_attention_and_distances_as_arithmetic_and_all_else_by_what_it_writes():
    x_btd, weight_od, bias_o = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    q_bhte = torch.randn(2, 2, 3, 4)
    expected = {
        "linear": (lambda: F.linear(x_btd, weight_od, bias_o), 2 * 2 * 3 * 5 * 8),
        "product of batches": (lambda: x_btd @ x_btd.mT, 2 * 2 * 3 * 3 * 8),
        "attention": (lambda: F.scaled_dot_product_attention(q_bhte, q_bhte, q_bhte), 2 * 2 * (2 * 2 * 3 * 3 * 4)),
        "distances": (lambda: torch.cdist(x_btd[0], weight_od, 2.0, "donot_use_mm_for_euclid_dist"), 3 * 3 * 5 * 8),
        "a sum of two": (lambda: x_btd + x_btd, 2 * 3 * 8),
        "a view": (lambda: x_btd.flatten(0, 1).T[1:], 0),
    }
    for what, (work, count) in expected.items():
        for context in (torch.no_grad(), torch.enable_grad()):
            with context, Operations() as counter:
                work()
            assert counter.count == count, what


def test_the_counter_sees_what_runs_backwards():
    x_bd, weight_od = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)
    with Operations() as counter:
        F.linear(x_bd, weight_od).sum().backward()
    assert counter.count == 2 * (2 * 3 * 5 * 8) + 1 + 1, "forward and by the weight; the sum and the gradient of it"


def test_what_a_law_says():
    assert obeys("constant", {2: 5, 4: 5, 8: 5})
    assert not obeys("constant", {2: 5, 4: 5, 8: 6})
    assert not obeys("constant", {2: 0, 4: 0, 8: 0})
    assert obeys("linear", {2: 5, 4: 7, 8: 11})
    assert not obeys("linear", {2: 5, 4: 7, 8: 12})
    assert not obeys("linear", {2: 5, 4: 5, 8: 5})
    assert obeys("none", {2: 0, 4: 0, 8: 0})
    assert not obeys("none", {2: 0, 4: 0, 8: 1})


# --------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CASES)
def test_cost_grows_as_documented(name: str, part: str, costs: Callable[[str], dict[int, Cost]]):
    growth, after = law(name, part), {tasks: getattr(found, part) for tasks, found in costs(name).items()}
    assert obeys(growth, after), f"{part} of {name} after 2, 4 and 8 tasks should be {growth}: {after}"


def test_an_lda_keeps_a_mean_a_count_and_an_output_for_every_class_and_task(
    costs: Callable[[str], dict[int, Cost]],
):
    kept = {tasks: found.consolidation for tasks, found in costs("fsa").items()}
    wide = 32
    assert kept[8] - kept[4] == 4 * 2 * (8 * (wide + 1) + 8 * (wide + 1))
    assert kept[4] == 4 * 2 * (8 * (wide + 1) + 8 * (wide + 1)) + 8 * wide**2, "and one scatter"


@pytest.mark.parametrize("name", CASES)
def test_memory_stays_within_its_bound_which_grows_no_faster_than_the_law(
    name: str, costs: Callable[[str], dict[int, Cost]]
):
    bounds = {tasks: found.bound for tasks, found in costs(name).items()}
    assert all(found.memory <= found.bound for found in costs(name).values())
    assert obeys("constant" if CASES[name].memory == "bounded" else CASES[name].memory, bounds), bounds
