"""CoLoR against a slow and obvious version: one input at a time, one plain model per expert, loops over centroids.

Shape letters: b batch, n examples, d width, k centroids, r rows of the head.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import tiny_bert, tiny_fused_vit, tiny_images, tiny_texts, tiny_vit

from lamina.backbones import Backbone
from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import domain_plan, make_stream
from lamina.engine.loop import Loop
from lamina.learner import Learner
from lamina.learner.head import class_scores
from lamina.methods.color import CoLoR, CoLoRConfig, nearest_task
from lamina.types import Batch, Task

MAKERS = {"vit": tiny_vit, "fused": tiny_fused_vit, "bert": tiny_bert}
DOMAINS = 3


class Watched(CoLoR):
    """Keeps what every learnt task answers when told, after each task."""

    def __init__(self, config: CoLoRConfig, tasks: list[Task]) -> None:
        super().__init__(config)
        self.tasks = tasks
        self.told: list[list[torch.Tensor]] = []

    def end(self, learner: Learner, task: Task, batches) -> None:
        super().end(learner, task, batches)
        learnt = self.tasks[: len(learner.head.tasks)]
        with learner.folded():
            self.told.append([self.predict_task_aware(learner, whole(t), t.name) for t in learnt])


def whole(task: Task) -> Batch:
    return task.test.batch(np.arange(len(task.test)))


def run(folder: Path, kind: str = "vit", **settings: object) -> Loop:
    data = (tiny_texts if kind == "bert" else tiny_images)(72, 2, DOMAINS)
    stream = make_stream(data, domain_plan(data), "domain")
    learner = Learner(MAKERS[kind](blocks=2), ("q", "v"))
    loop = Loop(
        learner=learner,
        method=Watched(CoLoRConfig(rank=2, clusters=3, **settings), list(stream)),
        stream=stream,
        training=TrainingConfig(epochs=1, lr=0.1, batch_size=12),
        evaluation=EvaluationConfig(),
        seed=0,
        checkpoints=folder,
    )
    loop.run()
    return loop


def plain_model(kind: str, learner: Learner, task: str | None) -> Backbone:
    """The pre-trained model, its weights plus the changes of one task's expert."""
    made = MAKERS[kind](blocks=2)
    for site in learner.sites.values():
        if task is not None:
            expert = site.finished()[task]
            weight_oi = made.module.get_submodule(site.where.path).weight.data
            weight_oi[site.outputs.start : site.outputs.stop] += expert.up_or @ expert.down_ri
    return made


def answer(kind: str, loop: Loop, inputs: dict[str, torch.Tensor]) -> tuple[str, np.ndarray]:
    """The task taken, and the scores (r,), of one input."""
    learner, config, memory = loop.learner, loop.method.config, loop.method.memory
    tasks = [task.name for task in loop.stream]
    first = tasks[0] if config.identify == "first expert" else None
    with torch.no_grad():
        seen_d = plain_model(kind, learner, first).features(inputs)[0].numpy()
        seen_d = seen_d / np.sqrt((seen_d**2).sum())
        best, taken = np.inf, ""
        for task in tasks:
            for centroid_d in memory[f"centroids/{task}"].numpy():
                gap_d = centroid_d - seen_d
                away = np.abs(gap_d).sum() if config.distance == "l1" else np.sqrt((gap_d**2).sum())
                if away < best:
                    best, taken = away, task
        features_1d = plain_model(kind, learner, taken).features(inputs)
        rows = [learner.head.block(task)(features_1d)[0] for task in tasks]
    nothing = [torch.full_like(r, -torch.inf) for r in rows]
    return taken, torch.cat([r if t == taken else n for t, r, n in zip(tasks, rows, nothing, strict=True)]).numpy()


def mixed(loop: Loop) -> Batch:
    """Test examples of all tasks, in no order of tasks."""
    examples = loop.stream.joint()[0].test
    return examples.batch(np.random.default_rng(0).permutation(len(examples)))


@pytest.mark.parametrize(
    ("kind", "distance", "identify"),
    [
        ("vit", "l2", "pretrained"),
        ("vit", "l1", "first expert"),
        ("fused", "l1", "pretrained"),
        ("fused", "l2", "first expert"),
        ("bert", "l2", "first expert"),
    ],
)
def test_predictions_are_those_of_one_plain_model_per_input(kind: str, distance: str, identify: str, tmp_path: Path):
    loop = run(tmp_path, kind, distance=distance, identify=identify)
    batch = mixed(loop)
    with loop.learner.folded():
        scores_br = loop.method.predict(loop.learner, batch)
    taken = []
    for b in range(len(batch)):
        task, expected_r = answer(kind, loop, {k: v[b : b + 1] for k, v in batch.inputs.items()})
        np.testing.assert_allclose(scores_br[b].numpy(), expected_r, atol=2e-5, rtol=1e-4)
        taken.append(task)
    assert len(set(taken)) >= 2, "the batch must mix experts"
    finite_b = class_scores(scores_br, loop.learner.outputs, [0, 1]).isfinite().all(1)
    assert finite_b.all(), "every class has a row in every task of this stream"


@pytest.mark.parametrize("identify", ["pretrained", "first expert"])
def test_what_a_task_answers_when_told_stays_the_same_bits(identify: str, tmp_path: Path):
    told = run(tmp_path, identify=identify).method.told
    assert len(told) == DOMAINS
    for j in range(DOMAINS):
        for later in told[j + 1 :]:
            rows = told[j][j].shape[1]
            assert torch.equal(later[j][:, :rows], told[j][j])
            assert (later[j][:, rows:] == -torch.inf).all()
    spread = [told[-1][j][:, 2 * j : 2 * j + 2] for j in range(DOMAINS)]
    assert all(block.isfinite().all() for block in spread)


@pytest.mark.parametrize("identify", ["pretrained", "first expert"])
def test_second_passes(identify: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One for every input; in CoLoR++ only for those that are not the first task's."""
    loop = run(tmp_path, identify=identify)
    learner, method, batch = loop.learner, loop.method, mixed(loop)
    passed: list[int] = []
    inner = learner.features
    monkeypatch.setattr(learner, "features", lambda part, *rest: (passed.append(len(part)), inner(part, *rest))[1])
    with learner.folded():
        scores_br = method.predict(learner, batch)
        alone_br = torch.cat(
            [
                method.predict(
                    learner,
                    Batch(
                        inputs={k: v[b : b + 1] for k, v in batch.inputs.items()}, labels_b=batch.labels_b[b : b + 1]
                    ),
                )
                for b in range(len(batch))
            ]
        )
    torch.testing.assert_close(alone_br, scores_br, atol=1e-5, rtol=1e-5)
    others = int((scores_br[:, 0] == -torch.inf).sum())
    assert 0 < others < len(batch)
    again = others if identify == "first expert" else len(batch)
    assert passed[:2] == [len(batch), again]
    assert sum(passed[2:]) == len(batch) + again


def test_an_expert_at_work_is_not_disturbed_by_a_live_branch(tmp_path: Path):
    """Predicting in the middle of a task, whose expert has moved already."""
    loop = run(tmp_path)
    learner, method, batch = loop.learner, loop.method, mixed(loop)
    with torch.no_grad():
        before_br = method.predict(learner, batch)
    for site in learner.sites.values():
        branch = type(method).branch_type.fresh(site.d_out, site.d_in, 2, torch.Generator().manual_seed(0))
        branch.up.data.fill_(1.0)
        site.add("live", branch)
    learner.head.add("live", [0, 1])
    with torch.no_grad():
        apart_br = method.predict(learner, batch)
    with learner.folded():
        folded_br = method.predict(learner, batch)
    for now_br in (apart_br, folded_br):
        assert torch.equal(now_br[:, :-2], before_br)
        assert (now_br[:, -2:] == -torch.inf).all()


@pytest.mark.parametrize("identify", ["pretrained", "first expert"])
def test_centroids_are_means_of_the_directions_nearest_to_them(identify: str, tmp_path: Path):
    loop = run(tmp_path, identify=identify)
    first = loop.stream[0].name if identify == "first expert" else None
    model = plain_model("vit", loop.learner, first)
    for task in loop.stream:
        centroids_kd = loop.method.memory[f"centroids/{task.name}"].double().numpy()
        assert centroids_kd.shape == (3, 32)
        with torch.no_grad():
            seen_nd = model.features(task.train.batch(np.arange(len(task.train))).inputs).double().numpy()
        seen_nd /= np.linalg.norm(seen_nd, axis=1, keepdims=True)
        nearest_n = ((seen_nd[:, None] - centroids_kd) ** 2).sum(2).argmin(1)
        means_kd = np.stack([seen_nd[nearest_n == k].mean(0) for k in range(3)])
        np.testing.assert_allclose(centroids_kd, means_kd, atol=1e-5)
        assert np.linalg.norm(centroids_kd, axis=1).min() < 0.999, "means of directions are not made directions"


def test_the_two_distances_differ():
    centroids = [torch.tensor([[0.0, 3.0]]), torch.tensor([[9.0, 9.0], [2.0, 2.0]])]
    x_bd = torch.tensor([[0.0, 0.0], [2.0, 3.0]])
    assert nearest_task(x_bd, centroids, "l1").tolist() == [0, 1]
    assert nearest_task(x_bd, centroids, "l2").tolist() == [1, 1]
