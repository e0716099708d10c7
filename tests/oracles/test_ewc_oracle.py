"""EWC against a slow and obvious version of its Fisher and its penalty (Kirkpatrick et al., PNAS 2017).

The oracle runs one example at a time through the model as it is, with an ordinary backward pass for each.

Shape letters: o outputs, i inputs, r rank, b batch, c classes, n examples.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_bert, tiny_fused_vit, tiny_images, tiny_texts, tiny_vit

from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import Stream, class_plan, domain_plan, make_stream
from lamina.engine.loop import Loop
from lamina.learner import Learner, drawn
from lamina.methods.base import SHARED
from lamina.methods.ewc import EWC, EWCConfig, distance, fisher_positions
from lamina.methods.finetune import Finetune, FinetuneConfig
from lamina.rng import bits, seed_of, uniform
from lamina.types import Task

TRAINING = TrainingConfig(epochs=3, batch_size=16, lr=0.02, head_lr=0.05, schedule="cosine")
MAKERS = {"vit": tiny_vit, "fused": tiny_fused_vit, "bert": tiny_bert}


def run(method: Any, stream: Stream, folder: Path, training: TrainingConfig = TRAINING) -> Loop:
    loop = Loop(
        learner=Learner(tiny_vit(blocks=2), ("q", "k")),
        method=method,
        stream=stream,
        training=training,
        evaluation=EvaluationConfig(),
        seed=3,
        checkpoints=folder,
    )
    loop.run()
    return loop


def ready(kind: str) -> tuple[Learner, EWC, Task]:
    """A learner in the middle of its first task, its adapter moved away from zero."""
    data = (tiny_texts if kind == "bert" else tiny_images)(120)
    task = make_stream(data, class_plan(data, 2), "class")[1]
    learner, method = Learner(MAKERS[kind](blocks=2), ("q", "v", "fc1")), EWC(EWCConfig(rank=2, fisher_samples=37))
    torch.manual_seed(11)
    method.begin(learner, task, lambda **_: iter(()))
    for name, factor in learner.trainable().items():
        factor.data += 0.2 * noise(tuple(factor.shape), name)
    return learner, method, task


def one_by_one(learner: Learner, task: Task, positions: np.ndarray, labels: list[int]) -> dict[str, np.ndarray]:
    """1/n Σ_i (∂ log p(y_i | x_i) / ∂θ)², a loop over examples."""
    factors = {f"{s.name}/{part}": f for s in learner.sites.values() for part, f in s.live()[SHARED].named_parameters()}
    sums = {name: np.zeros(tuple(factor.shape)) for name, factor in factors.items()}
    for position, label in zip(positions, labels, strict=True):
        logits_c = learner.task_logits(task.train.batch(np.array([position])), task.name)[0]
        log_likelihood = logits_c[label] - logits_c.exp().sum().log()
        for name, gradient in zip(factors, torch.autograd.grad(log_likelihood, list(factors.values())), strict=True):
            sums[name] += gradient.double().numpy() ** 2
    return {name: total / len(positions) for name, total in sums.items()}


# ------------------------------------------------------------------------------------------------------ the Fisher


def spread(task: Task, count: int) -> list[int]:
    """The examples taken for the Fisher: every class in the order of a hash of its rows, classes by the share taken of each."""
    seed, queue = seed_of("fisher examples", torch.initial_seed()), []
    hashes = bits(task.train.rows_n, seed)
    for label in task.classes:
        own = sorted(np.flatnonzero(task.train.labels_n == label), key=lambda n: hashes[n])
        queue += [((rank + 0.5) / len(own), hashes[n], int(n)) for rank, n in enumerate(own)]
    return sorted(n for _, _, n in sorted(queue)[:count])


@pytest.mark.parametrize("kind", MAKERS)
def test_the_empirical_fisher_is_the_mean_of_squared_gradients_of_single_examples(kind: str):
    learner, method, task = ready(kind)
    method.config = EWCConfig(rank=2, fisher_samples=37, fisher="empirical")
    n = len(task.train)
    assert n > 37, "some examples must be left out"
    positions = spread(task, 37)
    labels = [task.classes.index(int(task.train.labels_n[p])) for p in positions]
    found, expected = method.fisher(learner, task), one_by_one(learner, task, positions, labels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=2e-3, atol=1e-4 * value.max(), err_msg=name)
    averaged = squared_mean_gradient(learner, task, positions)
    assert sum(v.sum() for v in averaged.values()) < 0.5 * sum(v.sum() for v in expected.values())


def squared_mean_gradient(learner: Learner, task: Task, positions: np.ndarray) -> dict[str, np.ndarray]:
    """What the Fisher must not be."""
    batch = task.train.batch(positions)
    labels = torch.tensor([task.classes.index(int(label)) for label in batch.labels_b])
    loss = torch.nn.functional.cross_entropy(learner.task_logits(batch, task.name), labels)
    factors = {name: p for name, p in learner.trainable().items() if not name.startswith("head/")}
    gradients = torch.autograd.grad(loss, list(factors.values()))
    return {name: gradient.numpy() ** 2 for name, gradient in zip(factors, gradients, strict=True)}


@pytest.mark.parametrize("order", ["alternating", "sorted"])
def test_the_fisher_of_some_examples_is_about_that_of_all_whatever_their_order(order: str):
    """Every fourth of 300 examples with alternating labels would be of one class only."""
    data = tiny_images(400, classes=4)
    task = make_stream(data, class_plan(data, 1), "class")[0]
    positions = np.arange(300) if order == "alternating" else np.argsort(task.train.labels_n, kind="stable")
    task = replace(task, train=task.train.select(positions))
    assert len(set(task.train.labels_n[::4].tolist())) == (1 if order == "alternating" else 4)
    learner, method = Learner(tiny_vit(blocks=1), ("k", "v")), EWC(EWCConfig(rank=2, fisher="empirical"))
    torch.manual_seed(4)
    method.begin(learner, task, lambda **_: iter(()))
    for name, factor in learner.trainable().items():
        factor.data += 0.2 * noise(tuple(factor.shape), name)
    fishers = []
    for count in (75, 300):
        method.config = EWCConfig(rank=2, fisher="empirical", fisher_samples=count)
        fishers.append(torch.cat([value.flatten() for value in method.fisher(learner, task).values()]))
    assert torch.nn.functional.cosine_similarity(*fishers, dim=0) > 0.99


def test_fisher_samples_have_the_shares_of_the_classes_and_do_not_follow_the_order():
    labels_n = np.array([0] * 60 + [1] * 30 + [2] * 10)
    data = tiny_images(120, classes=3)
    examples = replace(
        make_stream(data, class_plan(data, 1), "class")[0].train, rows_n=np.arange(100), labels_n=labels_n
    )
    chosen = fisher_positions(examples, 20, seed=7)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert np.bincount(labels_n[chosen]).tolist() == [12, 6, 2]
    shuffled = np.random.default_rng(0).permutation(100)
    again = fisher_positions(examples.select(shuffled), 20, seed=7)
    assert sorted(shuffled[again].tolist()) == chosen.tolist(), "the same examples in another order"
    assert fisher_positions(examples, 20, seed=8).tolist() != chosen.tolist()
    assert fisher_positions(examples, 1000, seed=7).tolist() == list(range(100))


def test_the_true_fisher_is_of_labels_drawn_from_the_models_own_answer():
    learner, method, task = ready("vit")
    positions = spread(task, 37)
    uniforms = uniform(task.train.rows_n[positions], seed_of("fisher", torch.initial_seed()))
    labels = []
    for position, u in zip(positions, uniforms, strict=True):
        with torch.no_grad():
            logits_c = learner.task_logits(task.train.batch(np.array([position])), task.name)[0].double()
        shares = torch.softmax(logits_c, 0).tolist()
        labels.append(next(label for label in range(len(shares)) if u <= sum(shares[: label + 1]) + 1e-12))
    given = [task.classes.index(int(task.train.labels_n[p])) for p in positions]
    assert labels != given
    found, expected = method.fisher(learner, task), one_by_one(learner, task, positions, labels)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=2e-3, atol=1e-4 * value.max(), err_msg=name)


def test_labels_are_drawn_independently_of_the_choice_of_examples(monkeypatch: pytest.MonkeyPatch):
    data = tiny_images(2000, classes=4)
    task = make_stream(data, class_plan(data, 1), "class")[0]
    learner, method = Learner(tiny_vit(blocks=1), ("v",)), EWC(EWCConfig(rank=2, fisher_samples=80))
    method.begin(learner, task, lambda *, augmented: iter(()))
    seen: list[torch.Tensor] = []

    def noted(log_bc: torch.Tensor, uniform_b: torch.Tensor) -> torch.Tensor:
        seen.append(uniform_b)
        return drawn(log_bc, uniform_b)

    monkeypatch.setattr("lamina.learner.learner.drawn", noted)
    method.fisher(learner, task)
    uniforms = torch.cat(seen)
    assert len(uniforms) == 80
    assert 0.35 < uniforms.mean() < 0.65
    assert uniforms.max() > 0.9


def test_labels_are_drawn_with_the_probabilities_of_the_answer():
    shares_c = torch.tensor([0.2, 0.0, 0.7, 0.1])
    uniform_b = torch.from_numpy(uniform(np.arange(20000), 5))
    labels_b = drawn(shares_c.log().expand(20000, 4), uniform_b)
    counts_c = torch.bincount(labels_b, minlength=4) / 20000
    assert counts_c[1] == 0
    torch.testing.assert_close(counts_c, shares_c, atol=0.01, rtol=0)
    edges_b = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert drawn(torch.full((2, 3), 1 / 3).log(), edges_b).tolist() == [0, 2]


def test_taking_the_fisher_leaves_the_learner_as_it_was():
    learner, method, task = ready("fused")
    before, parameters = learner.outline(), learner.trainable()
    method.fisher(learner, task)
    assert learner.outline() == before
    assert all(learner.trainable()[name] is parameter for name, parameter in parameters.items())
    assert all(parameter.grad is None for parameter in parameters.values())


# ----------------------------------------------------------------------------------------------------- the penalty


def test_the_penalty_is_the_weighted_square_of_the_way_from_the_last_task():
    memory = {f"{what}/{name}": noise((3, 2), what, name) for what in ("fisher", "anchor") for name in ("a/up", "b/up")}
    factors = {name: noise((3, 2), name).requires_grad_() for name in ("a/up", "b/up")}
    found = distance(factors, memory)
    by_hand = 0.0
    for name, factor in factors.items():
        for j in range(3):
            for k in range(2):
                away = factor[j, k].item() - memory[f"anchor/{name}"][j, k].item()
                by_hand += memory[f"fisher/{name}"][j, k].item() * away**2
    assert found.item() == pytest.approx(by_hand, rel=1e-5)
    found.backward()
    expected = 2 * memory["fisher/a/up"] * (factors["a/up"] - memory["anchor/a/up"])
    torch.testing.assert_close(factors["a/up"].grad, expected.detach())


def test_the_loss_is_cross_entropy_and_from_the_second_task_half_the_weight_times_the_penalty():
    learner, method, task = ready("vit")
    batch = task.train.batch(np.arange(8))
    labels = torch.tensor([task.classes.index(int(label)) for label in batch.labels_b])
    fitting = torch.nn.functional.cross_entropy(learner.task_logits(batch, task.name), labels).item()
    assert method.loss(learner, batch, task).item() == pytest.approx(fitting), "the first task"
    method.end(learner, task, lambda **_: iter(()))
    assert method.loss(learner, batch, task).item() == pytest.approx(fitting), "nothing has moved yet"
    adapter = [value for name, value in learner.trainable().items() if not name.startswith("head/")]
    for factor in adapter:
        factor.data += 0.1
    moved = torch.nn.functional.cross_entropy(learner.task_logits(batch, task.name), labels).item()
    penalty = 0.1**2 * sum(value.sum().item() for name, value in method.memory.items() if name.startswith("fisher/"))
    assert penalty > 0
    method.config = EWCConfig(rank=2, strength=50.0)
    assert method.loss(learner, batch, task).item() == pytest.approx(moved + 25 * penalty, rel=1e-4)


def test_memory_is_the_sum_of_fishers_and_the_last_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = tiny_images(72, classes=6)
    found: list[dict[str, torch.Tensor]] = []
    inner = EWC.fisher
    monkeypatch.setattr(EWC, "fisher", lambda self, *args: (found.append(inner(self, *args)), found[-1])[1])
    loop = run(EWC(EWCConfig(rank=2)), make_stream(data, class_plan(data, 3), "class"), tmp_path)
    assert len(found) == 3
    for site in loop.learner.sites.values():
        for part, factor in site.live()[SHARED].named_parameters():
            name = f"{site.name}/{part}"
            torch.testing.assert_close(
                loop.method.memory[f"fisher/{name}"], found[0][name] + found[1][name] + found[2][name]
            )
            assert torch.equal(loop.method.memory[f"anchor/{name}"], factor.detach())
            assert (found[2][name] > 0).any()


def test_without_weight_it_is_sequential_lora_bit_for_bit(tmp_path: Path):
    data = tiny_images(96)
    stream = make_stream(data, class_plan(data, 2), "class")
    ours = run(EWC(EWCConfig(rank=3, strength=0)), stream, tmp_path / "ewc").learner.tensors()
    plain = run(Finetune(FinetuneConfig(rank=3)), stream, tmp_path / "finetune").learner.tensors()
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_the_heavier_the_penalty_the_less_moves_until_nothing_does(tmp_path: Path):
    """How far the second task goes where the first is sensitive, at one and the same learning rate."""
    data = tiny_images(96, classes=4, domains=2)
    stream = make_stream(data, domain_plan(data), "domain")
    training = TRAINING.model_copy(update={"epochs": 8})
    alone = replace(stream, tasks=stream.tasks[:1])
    start = run(EWC(EWCConfig(rank=2)), alone, tmp_path / "first", training).method.memory
    ways = []
    for strength in (0.0, 1e2, 1e4, 1e8):
        loop = run(EWC(EWCConfig(rank=2, strength=strength)), stream, tmp_path / str(strength), training)
        factors = {
            f"{site.name}/{part}": factor.detach()
            for site in loop.learner.sites.values()
            for part, factor in site.live()[SHARED].named_parameters()
        }
        ways.append(distance(factors, start).item())
    assert all(after < before for before, after in pairwise(ways))
    assert ways[-1] < 5e-3 * ways[0], "what is left are Adam's last steps, which no weight makes smaller"
