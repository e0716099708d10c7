"""MoRAM (Lu et al., 2026) against its equations, written out as loops: one token and one atom at a time.

Shape letters: b batch, d width, t tokens, o outputs, i inputs, r rank, p atoms, c classes.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_bert, tiny_fused_vit, tiny_images, tiny_texts, tiny_vit
from tests.unit.backbones.languages import LANGUAGES
from torch import Tensor, nn

from lamina.backbones import Backbone, load
from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import class_plan, make_stream
from lamina.engine.loop import Loop
from lamina.engine.rehearsal import Kept
from lamina.learner import LanguageLearner, Learner
from lamina.methods.moram import MoRAM, MoRAMConfig, mixing_weights
from lamina.types import Batch

MAKERS = {"vit": tiny_vit, "fused": tiny_fused_vit, "bert": tiny_bert}
RANK, TEMPERATURE, THRESHOLD = 3, 0.2, 0.3
TRAINING = TrainingConfig(epochs=2, batch_size=16, lr=5e-3, head_lr=0.05)


def make_loop(folder: Path, kind: str = "vit", tasks: int = 3, **settings: Any) -> Loop:
    data = (tiny_texts if kind == "bert" else tiny_images)(24 * tasks, classes=2 * tasks)
    config = MoRAMConfig(**{"rank": RANK, "temperature": TEMPERATURE, "threshold": THRESHOLD} | settings)
    return Loop(
        learner=Learner(MAKERS[kind](blocks=2), ("q", "v")),
        method=MoRAM(config),
        stream=make_stream(data, class_plan(data, tasks), "class"),
        training=TRAINING,
        evaluation=EvaluationConfig(),
        seed=0,
        checkpoints=folder,
    )


def in_task(folder: Path, number: int, kind: str = "vit", **settings: Any) -> Loop:
    """In the middle of this task (counted from 0); all factors have moved."""
    loop = make_loop(folder, kind, **settings)
    for k, task in enumerate(loop.stream.tasks[: number + 1]):
        torch.manual_seed(k)
        loop.method.begin(loop.learner, task, loop.pass_over("begin", task))
        with torch.no_grad():
            for name, factor in loop.learner.trainable().items():
                factor.copy_(0.3 * noise(tuple(factor.shape), name))
        if k < number:
            loop.method.end(loop.learner, task, loop.pass_over("end", task))
    return loop


def weights_by_hand(projections_p: np.ndarray, budget: int, temperature: float, threshold: float) -> list[float]:
    length = math.sqrt(sum(float(one) ** 2 for one in projections_p))
    relevance = [float(one) / length for one in projections_p]
    order = sorted(range(len(relevance)), key=lambda atom: -relevance[atom])
    active = order[:budget]
    total = sum(math.exp(relevance[atom] / temperature) for atom in active)
    return [
        math.exp(relevance[atom] / temperature) / total
        if atom in active and (not threshold or relevance[atom] >= threshold)
        else 0.0
        for atom in range(len(relevance))
    ]


class SlowLinear(nn.Module):
    """A linear layer with a list of atoms (key, value) for each range of its outputs."""

    def __init__(self, linear: nn.Linear, budget: int, threshold: float) -> None:
        super().__init__()
        self.linear, self.budget, self.threshold = linear, budget, threshold
        self.banks: list[tuple[slice, list[tuple[np.ndarray, np.ndarray]]]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).detach().double().numpy()
        for token in np.ndindex(*x.shape[:-1]):
            x_i = x[token].detach().double().numpy()
            for outputs, bank in self.banks:
                projections_p = np.array([key_i @ x_i for key_i, _ in bank])
                weights = weights_by_hand(projections_p, self.budget, TEMPERATURE, self.threshold)
                for weight, projection, (_, value_o) in zip(weights, projections_p, bank, strict=True):
                    y[token][outputs] += weight * projection * value_o
        return torch.from_numpy(y).to(x.dtype)


def with_atoms(made: Backbone, learner: Learner, budget: int, threshold: float) -> Backbone:
    """Returns a plain backbone whose linear layers have the atoms of the learner."""
    slow: dict[str, SlowLinear] = {}
    for site in learner.sites.values():
        path = site.where.path
        if path not in slow:
            slow[path] = SlowLinear(made.module.get_submodule(path), budget, threshold)
        bank = []
        parts = [(part.up_or, part.down_ri) for part in site.finished().values()]
        parts += [(branch.trained()["up"], branch.trained()["down"]) for branch in site.live().values()]
        for up_or, down_ri in parts:
            for atom in range(len(down_ri)):
                key_i, value_o = down_ri[atom], up_or[:, atom]
                bank.append((key_i.detach().double().numpy(), value_o.detach().double().numpy()))
        slow[path].banks.append((slice(site.outputs.start, site.outputs.stop), bank))
    for path, layer in slow.items():
        parent, _, leaf = path.rpartition(".")
        setattr(made.module.get_submodule(parent), leaf, layer)
    return made


def slow_features(loop: Loop, kind: str, batch: Batch, budget: int, threshold: float) -> Tensor:
    with torch.no_grad():
        return with_atoms(MAKERS[kind](blocks=2), loop.learner, budget, threshold).features(batch.inputs)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("budget", [1, 2, 5, 9])
def test_the_weights_are_a_softmax_over_the_most_relevant_atoms(budget: int, threshold: float):
    projections_btp = noise((2, 3, 6), "projections")
    found_btp = mixing_weights(projections_btp, budget, 0.1, threshold)
    for token in np.ndindex(2, 3):
        expected_p = weights_by_hand(projections_btp[token].numpy(), budget, 0.1, threshold)
        np.testing.assert_allclose(found_btp[token], expected_p, atol=1e-6)
    assert ((found_btp > 0).sum(-1) <= budget).all()
    if not threshold:
        torch.testing.assert_close(found_btp.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_features_are_those_of_a_loop_over_tokens_and_atoms(kind: str, number: int, tmp_path: Path):
    loop = in_task(tmp_path, number, kind)
    batch = loop.stream[number].train.batch(np.arange(4))
    wanted = {threshold: slow_features(loop, kind, batch, RANK, threshold) for threshold in (0.0, THRESHOLD)}
    assert (wanted[0.0] - wanted[THRESHOLD]).abs().max() > 1e-3, "the threshold matters"
    with torch.no_grad():
        torch.testing.assert_close(loop.method.features(loop.learner, batch), wanted[THRESHOLD], atol=1e-4, rtol=1e-4)
        with loop.method.in_training(loop.learner):
            torch.testing.assert_close(loop.learner.features(batch), wanted[0.0], atol=1e-4, rtol=1e-4)
    assert not any(layer.mixtures for layer in loop.learner.layers.values())


@pytest.mark.parametrize("budget", [2, 5])
def test_the_loss_is_the_tasks_cross_entropy_without_a_threshold(budget: int, tmp_path: Path):
    loop = in_task(tmp_path, 2, budget=budget)
    task = loop.stream[2]
    batch = task.train.batch(np.arange(6))
    features_bd = slow_features(loop, "vit", batch, budget, 0.0)
    logits_bc = loop.learner.head.block(task.name)(features_bd).detach()
    columns = [task.classes.index(label) for label in batch.labels_b.tolist()]
    total = sum(float(-logits_bc[row].log_softmax(0)[column]) for row, column in enumerate(columns))
    assert loop.method.loss(loop.learner, batch, task).item() == pytest.approx(total / 6, rel=1e-4)


def test_gradients_are_those_of_finite_differences_and_reach_the_new_atoms_only(tmp_path: Path):
    """With all atoms active. A smaller budget makes the loss jump where an atom enters or leaves it."""
    loop = in_task(tmp_path, 1, budget=2 * RANK)
    task = loop.stream[1]
    batch = task.train.batch(np.arange(8))
    parameters = {name: value for name, value in loop.learner.trainable().items() if not name.startswith("head/")}
    assert {name.split("/")[1] for name in parameters} == {task.name}
    loop.method.loss(loop.learner, batch, task).backward()
    for name, value in parameters.items():
        direction = noise(tuple(value.shape), f"direction {name}")
        steepness = float((value.grad * direction).sum())
        start, losses = value.detach().clone(), []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                value.copy_(start + step * direction)
                losses.append(loop.method.loss(loop.learner, batch, task).item())
                value.copy_(start)
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(steepness, rel=0.05, abs=2e-3), name


def test_within_the_budget_weights_have_the_gradient_of_their_formula():
    projections_btp, direction_btp = noise((2, 3, 6), "projections").requires_grad_(), noise((2, 3, 6), "direction")
    (found_btp,) = torch.autograd.grad(
        (mixing_weights(projections_btp, 4, 0.1, 0.0) * direction_btp).sum(), projections_btp
    )
    active_btp = mixing_weights(projections_btp, 4, 0.1, 0.0).detach() > 0
    relevance_btp = projections_btp / projections_btp.square().sum(-1, keepdim=True).sqrt()
    raw_btp = (relevance_btp / 0.1).exp() * active_btp
    (wanted_btp,) = torch.autograd.grad(
        (raw_btp / raw_btp.sum(-1, keepdim=True) * direction_btp).sum(), projections_btp
    )
    torch.testing.assert_close(found_btp, wanted_btp, atol=1e-5, rtol=1e-4)
    assert found_btp[~active_btp].any(), "by the normalisation, keys outside the budget matter too"


def test_an_atom_that_no_token_selects_gets_no_gradient(tmp_path: Path):
    loop = in_task(tmp_path, 0, budget=2)
    with torch.no_grad():
        for site in loop.learner.sites.values():
            site.live()[loop.stream[0].name].trained()["down"][-1] = 0
    loop.method.loss(loop.learner, loop.stream[0].train.batch(np.arange(8)), loop.stream[0]).backward()
    for site in loop.learner.sites.values():
        grad_or = site.live()[loop.stream[0].name].trained()["up"].grad
        assert not grad_or[:, -1].any()
        assert grad_or[:, :-1].any()


def test_new_keys_that_an_input_does_not_match_leave_it_alone():
    """As long as enough old atoms are relevant, new ones with orthogonal keys change no weight."""
    old_btp = noise((1, 4, 3), "old").abs() + 0.1
    new_btp = torch.cat([old_btp, torch.zeros(1, 4, 5)], -1)
    before, after = (mixing_weights(projections, 3, 0.05, 0.2) for projections in (old_btp, new_btp))
    assert torch.equal(after[..., :3], before)
    assert not after[..., 3:].any()


def test_weights_depend_on_the_direction_of_a_token_and_small_temperatures_choose_one_atom():
    projections_btp = noise((2, 5, 6), "projections")
    weights = partial(mixing_weights, projections_btp, 4)
    torch.testing.assert_close(mixing_weights(7 * projections_btp, 4, 0.1, 0.2), weights(0.1, 0.2))
    chosen_btp = weights(1e-4, 0.0)
    assert torch.equal(chosen_btp.argmax(-1), projections_btp.argmax(-1))
    assert (chosen_btp.max(-1).values > 0.99).all()


def test_a_single_atom_is_plain_lora_in_training_and_is_gated_by_its_sign_in_predictions(tmp_path: Path):
    loop = in_task(tmp_path, 0, rank=1)
    batch = loop.stream[0].train.batch(np.arange(4))
    with torch.no_grad():
        plain_bd = loop.learner.features(batch)
        with loop.method.in_training(loop.learner):
            torch.testing.assert_close(loop.learner.features(batch), plain_bd, atol=1e-5, rtol=1e-5)
        assert (loop.method.features(loop.learner, batch) - plain_bd).abs().max() > 1e-3
    assert mixing_weights(torch.tensor([[[0.5], [-0.5]]]), 2, 0.03, 0.2).flatten().tolist() == [1.0, 0.0]


def test_the_first_task_starts_without_effect_and_later_ones_compete_from_their_first_step(tmp_path: Path):
    """New values are zero, but new keys are not: they take part in normalisation and budget before anything is learnt."""
    loop = make_loop(tmp_path)
    first, second = loop.stream.tasks[:2]
    batch = first.train.batch(np.arange(6))
    with torch.no_grad():
        bare_bd = loop.learner.features(batch)
        loop.method.begin(loop.learner, first, loop.pass_over("begin", first))
        assert torch.equal(loop.method.features(loop.learner, batch), bare_bd)
        for name, factor in loop.learner.trainable().items():
            factor.copy_(0.3 * noise(tuple(factor.shape), name))
        learnt_bd = loop.method.features(loop.learner, batch)
        loop.method.end(loop.learner, first, loop.pass_over("end", first))
        assert torch.equal(loop.method.features(loop.learner, batch), learnt_bd), "finishing changes nothing"
        loop.method.begin(loop.learner, second, loop.pass_over("begin", second))
        assert (loop.method.features(loop.learner, batch) - learnt_bd).abs().max() > 1e-4


def test_a_language_model_learns_and_ranks_options_through_the_mixture(tmp_path: Path):
    """Loss and log-likelihoods of options, one sequence at a time."""
    LANGUAGES["llama"].raw().save_pretrained(tmp_path / "llama")
    learner = LanguageLearner(load(str(tmp_path / "llama")), ("q", "v"))
    method = MoRAM(MoRAMConfig(rank=RANK, temperature=TEMPERATURE, threshold=THRESHOLD))
    first, second = make_loop(tmp_path, "bert").stream.tasks[:2]
    ids_bt = torch.tensor([[5, 9, 7, 8, 20, 33], [4, 6, 11, 12, 0, 0]])
    mask_bt = (ids_bt > 0).long()
    questions = {"input_ids": ids_bt, "attention_mask": mask_bt}
    questions["option_ids"] = torch.tensor([[[7, 2, 0], [9, 30, 2]], [[7, 2, 0], [9, 30, 2]]])
    questions["option_mask"] = (questions["option_ids"] > 0).long()
    asked = Batch(inputs=questions, labels_b=torch.tensor([0, 1]))
    with torch.no_grad():
        with learner.bare():
            bare_bm = learner.option_scores(asked)
        with method.predicting(learner, asked):
            assert torch.equal(learner.option_scores(asked), bare_bm), "before the first task"
    for task in (first, second):
        method.begin(learner, task, lambda **_: iter(()))
        with torch.no_grad():
            for name, factor in learner.trainable().items():
                factor.copy_(0.3 * noise(tuple(factor.shape), name))
        if task is first:
            method.end(learner, task, lambda **_: iter(()))

    def log_p(threshold: float, ids: list[int]) -> Tensor:
        plain = with_atoms(load(str(tmp_path / "llama")), learner, RANK, threshold)
        ids_1t = torch.tensor([ids])
        with torch.no_grad():
            hidden_1td = plain.hidden({"input_ids": ids_1t, "attention_mask": torch.ones_like(ids_1t)})
            log_tv = plain.token_logits(hidden_1td[0]).log_softmax(1)
        return torch.stack([log_tv[k, token] for k, token in enumerate(ids[1:])])

    completion_bt = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    taught = Batch(
        inputs={"input_ids": ids_bt, "attention_mask": mask_bt, "completion_mask": completion_bt},
        labels_b=asked.labels_b,
    )
    tokens = torch.cat([log_p(0.0, [5, 9, 7, 8, 20, 33])[-3:], log_p(0.0, [4, 6, 11, 12])[-2:]])
    assert method.loss(learner, taught, second).item() == pytest.approx(-tokens.mean().item(), rel=1e-4)
    prompts, options = ([5, 9, 7, 8, 20, 33], [4, 6, 11, 12]), ([7, 2], [9, 30, 2])
    wanted = [[log_p(THRESHOLD, prompt + option)[-len(option) :].sum() for option in options] for prompt in prompts]
    with torch.no_grad(), method.predicting(learner, asked):
        found_bm = learner.option_scores(asked)
    torch.testing.assert_close(found_bm, torch.tensor(wanted), atol=1e-4, rtol=1e-4)
    assert (found_bm - bare_bm).abs().max() > 1e-2
    assert not method.selects, "the task's identity would change nothing"


def test_rehearsal_computes_old_examples_through_the_mixture(tmp_path: Path):
    loop = in_task(tmp_path, 1)
    kept, task = Kept(loop.stream.tasks[:1], 2), loop.stream[1]
    mixed = kept.mixed(task.train.batch(np.arange(4)), 0, task.name, 0)
    total = kept.loss(
        loop.learner,
        partial(loop.method.loss, loop.learner, task=task),
        partial(loop.method.in_training, loop.learner),
    )(mixed)
    with loop.method.in_training(loop.learner):
        old = loop.learner.loss_of_all(mixed, balanced=True)
    own = loop.method.loss(loop.learner, mixed.select(slice(4)), task)
    assert total.item() == pytest.approx((own + old).item(), rel=1e-5)
    assert abs(loop.learner.loss_of_all(mixed, balanced=True).item() - old.item()) > 1e-3, "not through a plain branch"


def test_it_grows_by_the_atoms_of_a_task_and_stores_nothing_else(tmp_path: Path):
    loop = make_loop(tmp_path)
    loop.run()
    per_task = sum((site.d_in + site.d_out) * RANK for site in loop.learner.sites.values()) + 2 * (32 + 1)
    assert [entry.stored_parameters for entry in loop.state.lineage] == [t * per_task for t in (1, 2, 3)]
    assert not loop.method.memory
    for layer in loop.learner.layers.values():
        assert torch.equal(layer.weight_oi, layer.base_oi), "nothing is folded"
