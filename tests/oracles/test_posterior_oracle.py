"""Posterior: p(t | x) p(j | t, x), computed one example and one task at a time from the branches and the data alone.

Shape letters: n examples, d width, c outputs of a task.
"""

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
from lamina.maths.class_statistics import of_features
from lamina.methods.posterior import Posterior, PosteriorConfig, factors
from lamina.types import Batch, Examples


def run(folder: Path, scenario: str, layers: int) -> Loop:
    data = tiny_images(144, 6, 3)
    plan = class_plan(data, 3) if scenario == "class" else domain_plan(data)
    loop = Loop(
        learner=Learner(tiny_vit(blocks=2), ("q", "v")),
        method=Posterior(PosteriorConfig(rank=3, layers=layers), None),
        stream=make_stream(data, plan, scenario, per_class=6),
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
    router = classifiers.lda(
        of_features(
            torch.cat([features(loop, batch, None) for batch in train]),
            torch.cat([labels_n + start for labels_n, start in zip(local, starts, strict=True)]),
            sum(counts),
            blocks=layers,
        )
    )
    within = [
        classifiers.lda(of_features(features(loop, batch, task.name), labels_n, len(task.classes), blocks=layers))
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
    frozen_bj = router.scores(features(loop, batch, None))
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
            adapted_c = (within[t].scores(f_1d)[0].log_softmax(0) + head_c) / 2
            adapted_c = adapted_c - adapted_c.logsumexp(0)
            own_c = adapted_c if t == best else log_j[part] - log_t[t]
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
    """The bits of a task-aware prediction stay, and the statistics that infer the task only grow."""
    loop = run(tmp_path / "a", "class", 2)
    first = Loop(
        learner=Learner(tiny_vit(blocks=2), ("q", "v")),
        method=Posterior(PosteriorConfig(rank=3, layers=2), None),
        stream=loop.stream.first(1),
        training=TRAINING,
        evaluation=EVALUATION,
        seed=0,
        checkpoints=tmp_path / "b",
    )
    first.run()
    batch, task = whole(loop.stream[0].test), loop.stream[0]
    with loop.learner.folded(), first.learner.folded():
        later_bj = loop.method.predict_task_aware(loop.learner, batch, task.name)
        then_bj = first.method.predict_task_aware(first.learner, batch, task.name)
    assert torch.equal(later_bj[:, : len(task.classes)], then_bj)
    means_jd = loop.method.memory["statistics/means_jd"]
    assert torch.equal(means_jd[: len(task.classes)], first.method.memory["statistics/means_jd"])
