"""Prototypes and second moments against sums written out by hand.

Shape letters: n examples, t tokens, d width, c classes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_bert, tiny_images, tiny_texts, tiny_vit

from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import Stream, class_plan, domain_plan, make_stream
from lamina.engine.loop import Loop
from lamina.errors import DataError
from lamina.learner import Learner
from lamina.learner.head import class_scores
from lamina.learner.moments import SecondMoment
from lamina.methods.prototype import Prototype, PrototypeConfig
from lamina.types import Examples


def learn(stream: Stream, metric: str, folder: Path) -> Loop:
    loop = Loop(
        learner=Learner(tiny_vit(blocks=1)),
        method=Prototype(PrototypeConfig(metric=metric)),
        stream=stream,
        training=TrainingConfig(),
        evaluation=EvaluationConfig(batch_size=7),
        seed=0,
        checkpoints=folder,
    )
    loop.run()
    return loop


def features(loop: Loop, examples: Examples) -> np.ndarray:
    with torch.no_grad():
        rows = [loop.learner.features(examples.batch(np.array([i])))[0].numpy() for i in range(len(examples))]
    return np.array(rows, np.float64)


def similarity(metric: str, feature_d: np.ndarray, mean_d: np.ndarray) -> float:
    if metric == "cosine":
        return float(feature_d @ mean_d / np.linalg.norm(feature_d) / np.linalg.norm(mean_d))
    return -float(np.linalg.norm(feature_d - mean_d))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_every_answer_is_the_nearest_mean(metric: str, scenario: str, tmp_path: Path):
    data = tiny_images(120, classes=5, domains=2)
    plan = class_plan(data, 3) if scenario == "class" else domain_plan(data)
    stream = make_stream(data, plan, scenario)
    loop = learn(stream, metric, tmp_path)
    means = [  # of each class in each task, in the order of the rows
        (label, np.mean(features(loop, task.train)[task.train.labels_n == label], axis=0))
        for task in stream
        for label in task.classes
    ]
    assert [row.label for row in loop.learner.outputs] == [label for label, _ in means]
    wrong = 0
    for task in stream:
        batch = task.test.batch(np.arange(len(task.test)))
        with loop.learner.folded():
            scores_br = loop.method.predict(loop.learner, batch)
        answer_b = class_scores(scores_br, loop.learner.outputs, range(5)).argmax(1)
        for i, feature_d in enumerate(features(loop, task.test)):
            by_hand = [similarity(metric, feature_d, mean_d) for _, mean_d in means]
            assert int(answer_b[i]) == means[int(np.argmax(by_hand))][0]
            assert np.argsort(scores_br[i].numpy()).tolist() == np.argsort(by_hand).tolist()
            if metric == "cosine":
                np.testing.assert_allclose(scores_br[i].numpy(), by_hand, atol=1e-5)
            wrong += int(answer_b[i]) != task.test.labels_n[i]
    assert loop.matrix.correct_ij[-1].sum() == sum(len(task.test) for task in stream) - wrong


def test_the_two_metrics_differ(tmp_path: Path):
    data = tiny_images(96)
    stream = make_stream(data, class_plan(data, 2), "class")
    weights = [learn(stream, m, tmp_path / m).learner.head.block("task-01").weight for m in ("cosine", "euclidean")]
    torch.testing.assert_close(weights[0], torch.nn.functional.normalize(weights[1], dim=1))
    assert not torch.allclose(*weights)


def test_a_class_without_an_example_is_named():
    data = tiny_images(96)
    stream = make_stream(data, class_plan(data, 2), "class")
    task = stream[0]
    learner, method = Learner(tiny_vit(blocks=1)), Prototype(PrototypeConfig())
    only_first = task.train.select(task.train.labels_n == task.classes[0])

    def batches(*, augmented: bool):
        yield only_first.batch(np.arange(len(only_first)))

    with pytest.raises(DataError, match=rf"'task-01' has no training example of class ids \[{task.classes[1]}\]"):
        method.begin(learner, task, batches)


# --------------------------------------------------------------------------------------------------------- second moments


def test_a_second_moment_is_the_mean_outer_product_over_real_tokens():
    moment, sum_dd, count = SecondMoment(), np.zeros((5, 5)), 0
    for batch in range(3):
        inputs_btd, mask_bt = noise((4, 6, 5), "moment", batch), (noise((4, 6), "mask", batch) > 0).long()
        masked = batch != 1
        moment.add(inputs_btd, mask_bt if masked else None)
        for b in range(4):
            for t in range(6):
                if not masked or mask_bt[b, t]:
                    sum_dd += np.outer(inputs_btd[b, t].double(), inputs_btd[b, t].double())
                    count += 1
    assert moment.count == count < 72
    np.testing.assert_allclose(moment.mean_dd.numpy(), sum_dd / count, rtol=1e-5, atol=1e-6)
    assert moment.mean_dd.dtype == torch.float64
    with pytest.raises(ValueError, match="no input was seen"):
        _ = SecondMoment().mean_dd


@pytest.mark.parametrize("kind", ["image", "text"])
def test_moments_of_a_learner_count_every_real_token_and_no_padding(kind: str):
    data = (tiny_images if kind == "image" else tiny_texts)(40)
    learner = Learner((tiny_vit if kind == "image" else tiny_bert)(blocks=2), ("k", "v", "fc2"))
    stream = make_stream(data, class_plan(data, 1), "class")
    train = stream[0].train
    batches = [train.batch(np.arange(start, min(start + 7, len(train)))) for start in range(0, len(train), 7)]
    moments = learner.input_moments(batches)
    assert moments.keys() == learner.groups().keys() == {f"block{b}.{g}" for b in (0, 1) for g in ("attention", "fc2")}
    for group, sites in learner.groups().items():
        seen: list[torch.Tensor] = []
        handle = sites[0].layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        outer, count = 0.0, 0
        for batch in batches:
            seen.clear()
            with torch.no_grad():
                learner.features(batch)
            mask_bt = batch.inputs.get("attention_mask", torch.ones(seen[0].shape[:2]))
            for example_td, mask_t in zip(seen[0].double(), mask_bt, strict=True):
                for token_d, real in zip(example_td, mask_t, strict=True):
                    if real:
                        outer, count = outer + torch.outer(token_d, token_d), count + 1
        handle.remove()
        torch.testing.assert_close(moments[group], outer / count, rtol=1e-4, atol=1e-5)
    if kind == "text":
        assert count < sum(batch.inputs["attention_mask"].numel() for batch in batches)
