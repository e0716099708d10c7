"""Task arithmetic against a slow and obvious version of its sum, and what its paper promises (Chitale et al., 2023).

Shape letters: o outputs, i inputs, r rank, n tasks or examples, b batch, d width.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_bert, tiny_images, tiny_texts, tiny_vit

from lamina.adapters import LowRank
from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import PlannedTask, Stream, class_plan, make_stream
from lamina.engine.loop import Interrupted, Loop
from lamina.errors import TrainingError
from lamina.learner import Learner
from lamina.learner.head import class_scores
from lamina.methods.taskarithmetic import (
    MEMORY,
    MERGED,
    TaskArithmetic,
    TaskArithmeticConfig,
    feature_divergence,
    padded,
)
from lamina.rng import bits, seed_of

TRAINING = TrainingConfig(epochs=2, batch_size=16, lr=0.02, head_lr=0.05, schedule="cosine")
PLAN = (
    PlannedTask(name="first", classes=(0, 3), domains=(0,)),
    PlannedTask(name="second", classes=(1, 2), domains=None),
    PlannedTask(name="a known class, and a new one", classes=(4, 0), domains=(1,)),
)


def images() -> Stream:
    return make_stream(tiny_images(150, classes=5, domains=2), PLAN, "mixed")


def make(folder: Path, stream: Stream, batch_size: int = 250, watch: Any = None, **settings: Any) -> Loop:
    settings = {"rank": 2, "memory_per_class": 0, "memory_rank": 2, "memory_epochs": 2} | settings
    return Loop(
        learner=Learner((tiny_vit if stream.kind == "image" else tiny_bert)(blocks=1), ("q", "fc1")),
        method=TaskArithmetic(TaskArithmeticConfig(**settings)),
        stream=stream,
        training=TRAINING,
        evaluation=EvaluationConfig(batch_size=batch_size),
        seed=5,
        checkpoints=folder,
        should_stop=watch or (lambda: False),
    )


def run(folder: Path, stream: Stream, batch_size: int = 250, **settings: Any) -> Loop:
    loop = make(folder, stream, batch_size, **settings)
    loop.run()
    return loop


def change(loop: Loop, site: str, branch: str = MERGED) -> torch.Tensor:
    part = loop.learner.sites[site].finished()[branch]
    return part.up_or @ part.down_ri


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """The change each task makes when it is the only one, λ = 1: by task, then by site."""
    found = {}
    for task in images():
        loop = run(tmp_path_factory.mktemp("alone"), replace(images(), tasks=(task,)), scale=1.0)
        found[task.name] = {site: change(loop, site).double().numpy() for site in loop.learner.sites}
    return found


# --------------------------------------------------------------------------------------------------------- merging


def test_the_deployed_update_is_the_scaled_sum_of_what_each_task_learns_alone(
    alone: dict[str, dict[str, np.ndarray]], tmp_path: Path
):
    """Independent training and merging in one: nothing of the other tasks enters an update."""
    loop = run(tmp_path, images(), scale=0.4)
    for site in loop.learner.sites:
        expected_oi = 0.4 * sum(alone[task.name][site] for task in images())
        found_oi = change(loop, site).numpy()
        np.testing.assert_allclose(found_oi, expected_oi, atol=2e-6 * np.abs(expected_oi).max())
        layer = loop.learner.sites[site].layer
        torch.testing.assert_close(layer.weight_oi - layer.base_oi, change(loop, site), atol=1e-6, rtol=0)


def test_a_running_sum_is_the_concatenation_of_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PEFT's "cat", the one merge of factors that is exact: A stacked, B side by side."""
    trained: list[dict[str, tuple[torch.Tensor, ...]]] = []

    def end(self: TaskArithmetic, learner: Learner, task: Any, batches: Any) -> None:
        factors = {name: site.live()[task.name].factors() for name, site in learner.sites.items()}
        trained.append({name: tuple(factor.detach().clone() for factor in pair) for name, pair in factors.items()})
        inner(self, learner, task, batches)

    inner = TaskArithmetic.end
    monkeypatch.setattr(TaskArithmetic, "end", end)
    summed = run(tmp_path, images(), scale=0.25)
    for site in summed.learner.sites:
        ups, downs = ([factors[site][part] for factors in trained] for part in (0, 1))
        cat_oi = torch.cat([0.25 * up for up in ups], 1) @ torch.cat(downs, 0)
        torch.testing.assert_close(change(summed, site), cat_oi, atol=1e-6, rtol=1e-5)
        crossed_oi = 0.25 * sum(ups) @ sum(downs)  # "linear": has the products of different tasks in it
        assert (crossed_oi - cat_oi).norm() > 0.1 * cat_oi.norm()
        assert summed.learner.sites[site].finished()[MERGED].up_or.shape[1] == 3 * 2


def test_the_order_of_the_tasks_does_not_matter(tmp_path: Path):
    forward = run(tmp_path / "forward", images(), memory_per_class=3)
    backward = run(tmp_path / "back", replace(images(), tasks=images().tasks[::-1]), memory_per_class=3)
    assert [output.task for output in forward.learner.outputs] != [output.task for output in backward.learner.outputs]
    ours, theirs = forward.method.memory, backward.method.memory
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("weight/") for key in ours)
    for key, value in ours.items():
        if key.startswith("sum/"):
            torch.testing.assert_close(value, theirs[key], atol=1e-12, rtol=1e-12)
        else:
            assert torch.equal(value, theirs[key]), key
    for site in forward.learner.sites:
        torch.testing.assert_close(change(forward, site), change(backward, site), atol=1e-6, rtol=1e-5)
    batch = images()[0].test.batch(np.arange(len(images()[0].test)))
    with forward.learner.folded(), backward.learner.folded():
        scores = [
            class_scores(loop.method.predict(loop.learner, batch), loop.learner.outputs, range(5))
            for loop in (forward, backward)
        ]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-3)


def test_every_task_starts_from_the_pre_trained_model(tmp_path: Path):
    loop = run(tmp_path, images(), memory_per_class=3)
    learner, task = loop.learner, replace(images()[1], name="one more")
    deployed = {name: value.clone() for name, value in learner.tensors().items() if name.startswith("head/")}
    torch.manual_seed(1)
    loop.method.begin(learner, task, lambda **_: iter(()))
    for site in learner.sites.values():
        assert site.finished() == {}
        assert torch.equal(site.layer.weight_oi, site.layer.base_oi)
        assert list(site.live()) == ["one more"]
    for name, value in deployed.items():
        _, old, part = name.split("/")
        assert torch.equal(learner.tensors()[name], loop.method.memory[f"{part}/{old}"])
        assert not torch.equal(learner.tensors()[name], value), "the fine-tuning had moved it"


def test_stopped_again_and_again_it_ends_in_the_same_bits(tmp_path: Path):
    """Under a setting that the laws of all methods do not try."""
    whole, stops = run(tmp_path / "whole", images(), memory_per_class=2, kl=0.3), 0
    while True:
        asked = iter(range(10**6))
        loop = make(
            tmp_path / "pieces",
            images(),
            watch=lambda a=asked, n=stops: next(a) >= 3 + n % 3,
            memory_per_class=2,
            kl=0.3,
        )
        loop.restore()
        try:
            loop.run()
            break
        except Interrupted:
            stops += 1
    assert stops > 3
    for ours, theirs in ((whole.method.memory, loop.method.memory), (whole.learner.tensors(), loop.learner.tensors())):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


# ------------------------------------------------------------------------------------------------------------ head


def test_without_fine_tuning_outputs_are_those_of_their_own_task(tmp_path: Path):
    loop = run(tmp_path, images(), scale=0.4)
    for task in images():
        for part in ("weight", "bias"):
            trained = loop.method.memory[f"{part}/{task.name}"]
            assert torch.equal(loop.learner.tensors()[f"head/{task.name}/{part}"], trained)


# ------------------------------------------------------------------------------------------------------------ loss


def test_the_divergence_is_from_the_pre_trained_to_the_tuned_features():
    before_bd, after_bd = noise((4, 6), "before"), noise((4, 6), "after")
    by_hand = []
    for before, after in zip(before_bd.tolist(), after_bd.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, before)) for x in before]
        q = [math.exp(x) / sum(map(math.exp, after)) for x in after]
        by_hand.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert feature_divergence(before_bd, after_bd).item() == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert feature_divergence(before_bd, before_bd).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_weighs_cross_entropy_and_divergence(tmp_path: Path):
    task = images()[0]
    learner, batch = Learner(tiny_vit(blocks=1), ("q", "fc1")), task.train.batch(np.arange(9))
    plain, method = (TaskArithmetic(TaskArithmeticConfig(rank=2, kl=kl)) for kl in (0.0, 0.4))
    with torch.no_grad():
        before_bd = learner.features(batch)
    method.begin(learner, task, lambda **_: iter(()))
    for site in learner.sites.values():
        site.live()[task.name].up.data += 0.3 * noise((site.d_out, 2), site.name)
    divergence = feature_divergence(before_bd, learner.features(batch))
    assert divergence > 1e-3
    expected = 0.6 * plain.loss(learner, batch, task) + 0.4 * divergence
    found = method.loss(learner, batch, task)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, list(learner.trainable().values())),
        torch.autograd.grad(expected, list(learner.trainable().values())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_training_with_the_divergence_stays_closer_to_the_pre_trained_features(tmp_path: Path):
    task = images()[1]
    batch, found = task.train.batch(np.arange(len(task.train))), []
    for kl in (0.0, 0.9):
        loop = run(tmp_path / str(kl), replace(images(), tasks=(task,)), kl=kl, scale=1.0)
        with torch.no_grad():
            after_bd = loop.learner.features(batch)
            with loop.learner.bare():
                found.append(feature_divergence(loop.learner.features(batch), after_bd).item())
    assert found[1] < 0.5 * found[0]


# ---------------------------------------------------------------------------------------------------------- memory


def test_it_keeps_as_many_examples_of_each_class_of_each_task_however_they_are_batched(tmp_path: Path):
    large, small = (run(tmp_path / str(size), images(), size, memory_per_class=4).method.memory for size in (250, 7))
    assert large.keys() == small.keys()
    assert all(torch.equal(large[key], small[key]) for key in large)
    for task in images():
        labels_n, pixels = large[f"labels/{task.name}"], large[f"pixel_values/{task.name}"]
        assert sorted(labels_n.tolist()) == sorted(label for label in task.classes for _ in range(4))
        assert pixels.dtype == torch.float16
        everything = task.train.batch(np.arange(len(task.train)))
        kept = [
            next(n for n, x in enumerate(everything.inputs["pixel_values"].half()) if torch.equal(x, pixel))
            for pixel in pixels
        ]
        assert len(set(kept)) == len(kept)
        assert everything.labels_b[kept].tolist() == labels_n.tolist()
        seed = seed_of("memory", seed_of(5, "end", task.name))
        hashes = [int(bits(np.array([row]), seed)[0]) for row in task.train.rows_n]
        for label in task.classes:
            own = sorted(np.flatnonzero(task.train.labels_n == label), key=lambda n: hashes[n])
            assert own != sorted(own)
            assert {n for n in kept if everything.labels_b[n] == label} == set(own[:4])


def test_texts_are_kept_with_their_masks_and_put_together(tmp_path: Path):
    data = tiny_texts(72)
    stream = make_stream(data, class_plan(data, 2), "class")
    loop = run(tmp_path, stream, memory_per_class=3)
    memory = loop.method.memory
    for task in stream:
        ids_nt, mask_nt = (memory[f"{part}/{task.name}"] for part in ("input_ids", "attention_mask"))
        assert ids_nt.dtype == mask_nt.dtype == torch.int32
        assert ids_nt.shape == mask_nt.shape == (6, 8)
        assert torch.equal(ids_nt * mask_nt, ids_nt)
    parts = [torch.tensor([[3, 4]]), torch.tensor([[5, 6, 7], [8, 0, 0]])]
    assert padded(parts).tolist() == [[3, 4, 0], [5, 6, 7], [8, 0, 0]]


def test_with_no_memory_there_is_no_fine_tuning_and_with_it_all_classes_are_learnt_together(tmp_path: Path):
    without = run(tmp_path / "without", images())
    tuned = run(tmp_path / "tuned", images(), memory_per_class=8, memory_epochs=20, memory_lr=3e-3)
    assert not any(key.startswith(("labels/", "pixel_values/", "seed/")) for key in without.method.memory)
    losses = []
    for loop in (without, tuned):
        learner, memory = loop.learner, tuned.method.memory
        assert all((MEMORY in site.finished()) == (loop is tuned) for site in learner.sites.values())
        total, classes = 0.0, [0, 1, 2, 3, 4]
        for task in images():
            batch = replace(
                task.train.batch(np.arange(1)), inputs={"pixel_values": memory[f"pixel_values/{task.name}"].float()}
            )
            with learner.folded():
                scores_bc = class_scores(learner.head(learner.features(batch)), learner.outputs, classes)
            total += torch.nn.functional.cross_entropy(scores_bc, memory[f"labels/{task.name}"]).item()
        losses.append(total / 3)
    assert losses[1] < 0.5 * losses[0]
    for site in without.learner.sites:
        assert torch.equal(change(without, site), change(tuned, site)), (
            "the merge lies below the fine-tuning, untouched"
        )


def test_a_fine_tuning_that_diverges_says_what_to_change(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"epoch \d+ of the fine-tuning .* smaller method.memory_lr \(now 1e\+30\)"):
        run(tmp_path, images(), memory_per_class=2, memory_lr=1e30, memory_epochs=50)


@pytest.mark.parametrize("kept", [0, 2])
def test_memory_is_what_its_bound_says(kept: int):
    """Through `begin` and `end` alone, without training."""
    learner = Learner(tiny_vit(blocks=1), ("q", "fc1"))
    method = TaskArithmetic(TaskArithmeticConfig(rank=2, memory_per_class=kept, memory_epochs=1))
    sizes = []
    for number, task in enumerate(images()):
        torch.manual_seed(number)
        method.begin(learner, task, lambda **_: iter(()))
        for site in learner.sites.values():
            branch = site.live()[task.name]
            assert isinstance(branch, LowRank)
            branch.up.data += noise((site.d_out, 2), seed_of(site.name, number))
        method.end(learner, task, lambda **_: iter(()))
        assert method.memory_bytes == method.memory_bound(learner)
        sizes.append(sum(v.numel() for k, v in method.memory.items() if k.startswith("sum/")))
    assert sizes[2] == sizes[0] > 0
