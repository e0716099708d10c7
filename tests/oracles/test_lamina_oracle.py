"""lamina: p(t | x) p(j | t, x), computed one example and one task at a time from the branches and the data alone.

Shape letters: n examples, d width, c outputs of a task.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conformance.cases import EVALUATION, TRAINING
from tests.tiny import tiny_images, tiny_vit
from torch import Tensor

from lamina.data.streams import class_plan, domain_plan, make_stream
from lamina.engine.loop import Loop
from lamina.learner import Learner
from lamina.maths import classifiers
from lamina.maths.calibration import left_out_scores
from lamina.maths.class_statistics import concatenated, of_features
from lamina.maths.ranpac import RATIOS
from lamina.methods.lamina import TAUS, Lamina, LaminaConfig, discriminant_of_all, factors
from lamina.types import Batch, Examples


def run(folder: Path, scenario: str, layers: int, per_class: int = 6) -> Loop:
    data = tiny_images(144, 6, 3)
    plan = class_plan(data, 3) if scenario == "class" else domain_plan(data)
    loop = Loop(
        learner=Learner(tiny_vit(blocks=2), ("q", "v")),
        method=Lamina(LaminaConfig(rank=3, layers=layers, random_features=24), None),
        stream=make_stream(data, plan, scenario, per_class=per_class),
        training=TRAINING,
        evaluation=EVALUATION,
        seed=0,
        checkpoints=folder,
    )
    loop.run()
    return loop


def whole(examples: Examples) -> Batch:
    return examples.batch(np.arange(len(examples)))


def features(loop: Loop, batch: Batch, task: str | None) -> Tensor:
    """With the adapter of a task folded into plain weights by hand, or none."""
    learner = loop.learner
    with torch.no_grad():
        for site in learner.sites.values():
            weight_oi = site.layer.base_oi.clone()
            if task is not None:
                part = site.finished()[task]
                weight_oi += part.up_or @ part.down_ri
            site.layer.weight_oi = weight_oi
        found_bd = learner.features(batch, loop.method.config.layers)
        for site in learner.sites.values():
            site.layer.unfold_live()
    return found_bd.double()


def by_ridge(loop: Loop, train_nd: Tensor, output_n: Tensor, frozen_bd: Tensor) -> Tensor:
    """log softmax of the least squares on random features, at the λ and τ that the method found."""
    kept = loop.method.part("ridge")
    first = loop.stream[0]
    own_nd = train_nd[: len(first.train)]
    spread_d = (own_nd - own_nd.mean(0)).square().mean(0).sqrt()
    phi_nm, phi_bm = (
        (((part - own_nd.mean(0)) / spread_d) @ kept["projection_md"].double().T).clamp_min(0)
        for part in (train_nd, frozen_bd)
    )
    gram_mm, targets_nj = phi_nm.T @ phi_nm, torch.eye(int(output_n.max()) + 1).double()[output_n]
    solutions = [
        torch.linalg.solve(
            gram_mm + ratio * gram_mm.diagonal().mean() * torch.eye(len(gram_mm)).double(), phi_nm.T @ targets_nj
        )
        for ratio in RATIOS
    ]
    nearest = min(solutions, key=lambda weight_mj: float((weight_mj - kept["weight_mj"]).abs().max()))
    torch.testing.assert_close(kept["weight_mj"], nearest, rtol=1e-2, atol=1e-4)
    return (phi_bm @ nearest / kept["temperature"]).log_softmax(1)


def by_discriminant(train_nd: Tensor, output_n: Tensor, counts: list[int], frozen_bd: Tensor, blocks: int) -> Tensor:
    """log softmax of the discriminant of all outputs, at the temperature that is best for the examples of every task, each left
    out of what is known when its task ends. counts: outputs of every task."""
    losses_t, outputs = torch.zeros(len(TAUS)).double(), 0
    for count in counts:
        known_n, new_n = output_n < outputs + count, (output_n >= outputs) & (output_n < outputs + count)
        outputs += count
        statistics = of_features(train_nd[known_n], output_n[known_n], outputs, blocks=blocks)
        left_nj, n = left_out_scores(statistics, train_nd[new_n], output_n[new_n]), int(new_n.sum())
        smooth_nj = torch.eye(outputs).double()[output_n[new_n]] * (1 - 1 / (n + 1)) + 1 / (n + 1) / outputs
        losses_t -= torch.stack([(smooth_nj * (left_nj / tau).log_softmax(1)).sum() for tau in TAUS])
    scores_bj = classifiers.lda(of_features(train_nd, output_n, outputs, blocks=blocks)).scores(frozen_bd)
    return (scores_bj / TAUS[int(losses_t.argmin())]).log_softmax(1)


def tempered(features_nd: Tensor, labels_n: Tensor, classes: int, blocks: int) -> Callable[[Tensor], Tensor]:
    """The discriminant of a task over its temperature, the best of many for examples that are left out."""
    statistics = of_features(features_nd, labels_n, classes, blocks=blocks)
    left_nj, n = left_out_scores(statistics, features_nd, labels_n), len(labels_n)
    smooth_nj = torch.eye(classes).double()[labels_n] * (1 - 1 / (n + 1)) + 1 / (n + 1) / classes
    tau, width = float(left_nj.std(1, correction=0).mean()), 3.0
    for _ in range(3):  # finer and finer
        taus = [tau * 10 ** (width * k / 200) for k in range(-200, 201)]
        tau = min(taus, key=lambda one: -float((smooth_nj * (left_nj / one).log_softmax(1)).sum()))
        width /= 50
    return lambda f_bd: classifiers.lda(statistics).scores(f_bd) / tau


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_scores_are_the_task_times_what_is_within_it(scenario: str, layers: int, tmp_path: Path):
    loop = run(tmp_path, scenario, layers)
    learner, method, stream = loop.learner, loop.method, loop.stream
    train = [whole(task.train) for task in stream]
    local = [
        torch.tensor([task.classes.index(int(y)) for y in b.labels_b]) for task, b in zip(stream, train, strict=True)
    ]
    counts = [len(task.classes) for task in stream]
    starts = [sum(counts[:t]) for t in range(3)]
    train_nd = torch.cat([features(loop, batch, None) for batch in train])
    output_n = torch.cat([labels_n + start for labels_n, start in zip(local, starts, strict=True)])
    within = [
        tempered(features(loop, batch, task.name), labels_n, len(task.classes), layers)
        for task, batch, labels_n in zip(stream, train, local, strict=True)
    ]
    test = [whole(task.test) for task in stream]
    batch = Batch(
        inputs={"pixel_values": torch.cat([part.inputs["pixel_values"] for part in test])},
        labels_b=torch.cat([part.labels_b for part in test]),
    )
    with learner.folded():
        found_bj = method.predict(learner, batch)
        aware = [method.predict_task_aware(learner, batch, task.name) for task in stream]
    bare_bd = features(loop, batch, None)
    frozen_bj = by_ridge(loop, train_nd, output_n, bare_bd)
    frozen_bj = (frozen_bj + by_discriminant(train_nd, output_n, counts, bare_bd, layers)) / 2
    chosen: set[int] = set()
    for b in range(len(batch)):
        log_j = frozen_bj[b].log_softmax(0)
        parts = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        log_t = [float(log_j[part].logsumexp(0)) for part in parts]
        best = int(np.argmax(log_t))
        chosen.add(best)
        for t, part in enumerate(parts):
            f_1d = features(loop, batch.select(torch.arange(len(batch)) == b), stream[t].name)
            block = learner.head.block(stream[t].name)
            head_c = (
                (f_1d[0, -learner.backbone.width :].float() @ block.weight.T + block.bias)
                .detach()
                .double()
                .log_softmax(0)
            )
            router_c = log_j[part] - log_t[t]
            adapted_c = (within[t](f_1d)[0].log_softmax(0) + head_c + router_c) / 3
            adapted_c = adapted_c - adapted_c.logsumexp(0)
            own_c = adapted_c if t == best else router_c
            torch.testing.assert_close(found_bj[b, part].double(), log_t[t] + own_c, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(aware[t][b, part].double(), adapted_c, rtol=1e-3, atol=1e-3)
    assert len(chosen) > 1
    torch.testing.assert_close(found_bj.exp().sum(1), torch.ones(len(batch)), rtol=1e-4, atol=1e-4)


def test_scores_that_are_far_apart_have_finite_factors():
    scores_bj = torch.tensor([[0.0, -1e4, -2e4, -2e4 - 1.0]], dtype=torch.float64)
    log_bt, within_bj = factors(scores_bj, torch.tensor([0, 0, 1, 1]), 2)
    assert log_bt.tolist() == [[0.0, pytest.approx(-2e4 + float(np.log1p(np.exp(-1.0))))]]
    assert within_bj[0, 2:].exp().sum() == pytest.approx(1)
    assert torch.isfinite(within_bj).all()


def test_what_is_learnt_later_changes_no_adapter(tmp_path: Path):
    """Nor what is known of the earlier examples; it only grows."""
    loop = run(tmp_path / "a", "class", 2)
    first = Loop(
        learner=Learner(tiny_vit(blocks=2), ("q", "v")),
        method=Lamina(LaminaConfig(rank=3, layers=2, random_features=24), None),
        stream=loop.stream.first(1),
        training=TRAINING,
        evaluation=EVALUATION,
        seed=0,
        checkpoints=tmp_path / "b",
    )
    first.run()
    then, later = (one.learner.tensors() | one.method.part(f"adapted/{loop.stream[0].name}") for one in (first, loop))
    assert all(torch.equal(later[key], value) for key, value in then.items())
    before, after = (one.method.part("sums")["cross_mj"] for one in (first, loop))
    assert torch.equal(after[:, : before.shape[1]], before)


def test_a_model_without_statistics_goes_on_with_random_features_alone(tmp_path: Path):
    """One that an earlier lamina began."""
    loop = run(tmp_path, "class", 2)
    learner, method, task = loop.learner, loop.method, loop.stream[2]
    batch = whole(loop.stream[0].test)
    method.memory = {key: part for key, part in method.memory.items() if not key.startswith("statistics/")}
    found = torch.randn(6, 2 * learner.backbone.width), torch.arange(6) % len(task.classes)
    method.add_statistics(learner, *found, len(task.classes))
    assert not method.part("statistics")
    assert not method.part("frozen")
    with learner.folded():
        found_bj = method.scores(learner, batch)
        ridge = method.part("ridge")
        scaled_bd = (features(loop, batch, None).float() - ridge["centre_d"]) / ridge["scale_d"]
        phi_bm = (scaled_bd @ ridge["projection_md"].T).relu().double()
    torch.testing.assert_close(found_bj, (phi_bm @ ridge["weight_mj"] / ridge["temperature"]).log_softmax(1))


def test_with_one_example_per_class_random_features_decide_alone(tmp_path: Path):
    loop = run(tmp_path, "domain", 2, per_class=1)
    assert not loop.method.part("frozen")
    assert loop.method.part("statistics")["counts_j"].tolist() == [1] * len(loop.learner.outputs)
    with loop.learner.folded():
        scores_bj = loop.method.scores(loop.learner, whole(loop.stream[0].test))
    assert scores_bj.isfinite().all()
    assert scores_bj.min() > -1e3


def test_examples_that_are_nearly_the_same_do_not_choose_the_temperature_of_later_tasks():
    draws = torch.Generator().manual_seed(0)
    means_jd = torch.randn(8, 24, generator=draws)

    def drawn(outputs: range, spread: float) -> tuple[Tensor, Tensor]:
        label_n = torch.tensor(outputs).repeat_interleave(800)
        return means_jd[label_n] + spread * torch.randn(len(label_n), 24, generator=draws), label_n

    first, then = drawn(range(4), 1e-9), drawn(range(4, 8), 1.0)
    alone_nd, alone_n = then[0], then[1] - 4
    _, usual_t = discriminant_of_all(of_features(alone_nd, alone_n, 4), alone_nd, alone_n)
    statistics = of_features(first[0], first[1], 4)
    _, losses_t = discriminant_of_all(statistics, *first)
    both = concatenated(statistics, of_features(alone_nd, alone_n, 4))
    found, losses_t = discriminant_of_all(both, *then, losses_t)
    assert 0.2 < TAUS[int(losses_t.argmin())] / TAUS[int(usual_t.argmin())] < 5
    assert (found.scores(then[0]).argmax(1) == then[1]).double().mean() > 0.9
    assert found.scores(then[0]).log_softmax(1).min() > -1e3
