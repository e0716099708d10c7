"""A batch split into two halves gives the features and gradients of the whole, each half in a thread of its own."""

import threading
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_bert, tiny_texts, tiny_vit
from torch import Tensor, nn

from lamina.adapters import LowRank
from lamina.data.streams import class_plan, make_stream
from lamina.learner import Learner
from lamina.speed import accelerate, composed_weight, split_batch
from lamina.speed.split_batch import SplitBatch, Workers
from lamina.types import Batch

Compute = Callable[[Mapping[str, Tensor]], Tensor]
Make = Callable[[Compute], SplitBatch]


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


@pytest.fixture
def weights() -> list[nn.Parameter]:
    return [nn.Parameter(noise((5, 3), "weights")), nn.Parameter(noise((2,), "no part of the features"))]


@pytest.fixture
def split(weights: list[nn.Parameter], monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a SplitBatch around any function of the inputs, for batches of any size."""
    workers = Workers()

    def make(compute: Compute) -> SplitBatch:
        backbone = SimpleNamespace(forward=lambda _, inputs: compute(inputs), module=nn.Identity())
        learner: Any = SimpleNamespace(backbone=backbone, trainable=lambda: dict(enumerate(weights)))
        return SplitBatch(learner, [], workers)

    monkeypatch.setattr(split_batch, "SMALLEST", 2)
    yield make
    workers.close()


def whole(inputs: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """What a backbone's forward is called with."""
    return nn.Identity(), inputs


@pytest.mark.parametrize("size", [2, 7, 8])
def test_halves_make_up_the_whole(size: int, weights: list[nn.Parameter], split: Make):
    """Also for a loss that is no sum over the examples."""

    def compute(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.tanh(inputs["a"] @ weights[0]) * inputs["b"]

    def loss(features_bd: Tensor) -> Tensor:
        return features_bd.std(0).prod() + weights[0].square().sum() + weights[1].sum()

    inputs = {"a": noise((size, 5), "a"), "b": noise((size, 1), "b")}
    whole_bd, split_bd = compute(inputs), split(compute)(*whole(inputs))
    torch.testing.assert_close(split_bd, whole_bd)
    wanted, got = (torch.autograd.grad(loss(features_bd), weights) for features_bd in (whole_bd, split_bd))
    torch.testing.assert_close(got, wanted)


def test_gradients_only_where_they_are_wanted(weights: list[nn.Parameter], split: Make):
    inputs = {"a": noise((4, 5), "a")}
    with torch.no_grad():
        without_bd = split(lambda inputs: inputs["a"] @ weights[0])(*whole(inputs))
    assert not without_bd.requires_grad
    with_bd = split(lambda inputs: inputs["a"])(*whole(inputs))
    (with_bd.sum() + weights[1].sum()).backward()
    assert weights[0].grad is None
    assert torch.equal(weights[1].grad, torch.ones(2))


def test_each_half_has_a_thread_of_its_own_both_ways(weights: list[nn.Parameter], split: Make, threads: int):
    seen: list[tuple[str, str, int]] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            seen.append(("forward", threading.current_thread().name, torch.get_num_threads()))
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            seen.append(("backward", threading.current_thread().name, torch.get_num_threads()))
            return grad

    inputs = {"a": noise((4, 5), "a")}
    split(lambda inputs: Watched.apply(inputs["a"] @ weights[0]))(*whole(inputs)).sum().backward()
    assert len({name for _, name, _ in seen}) == 2
    assert sorted(seen) == sorted(
        (way, name, threads // 2) for way in ("forward", "backward") for _, name, _ in seen[:2]
    )
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (torch.get_num_threads(), found) == (threads, [threads])


def test_what_goes_wrong_in_a_half_is_raised(split: Make):
    with pytest.raises(ZeroDivisionError):
        split(lambda inputs: inputs["a"] / (1 // 0))(*whole({"a": noise((4, 5), "a")}))


def test_threads_that_cannot_be_halved_are_refused():
    torch.set_num_threads(3)
    with pytest.raises(ValueError, match="3 threads cannot be halved"):
        Workers()


# ------------------------------------------------------------------------------------------------- around a learner


def learner_with_a_branch() -> Learner:
    learner = Learner(tiny_vit(), ("k", "v"))
    for name, site in learner.sites.items():
        branch = LowRank.fresh(site.d_out, site.d_in, 2, torch.Generator().manual_seed(1))
        branch.up.data = noise(branch.up.shape, name)
        site.add("new", branch)
    return learner


def pixels(size: int) -> Batch:
    return Batch(inputs={"pixel_values": noise((size, 3, 16, 16), "pixels")}, labels_b=torch.zeros(size).long())


def noted(learner: Learner) -> list[int]:
    """Of how many examples the backbone computes features at a time, from now on. The learner must be plain."""
    sizes, forward = list[int](), learner.backbone.forward

    def noting(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        sizes.append(len(next(iter(inputs.values()))))
        return forward(module, inputs)

    learner.backbone.forward = noting
    return sizes


@pytest.fixture
def faster() -> Iterator[Callable[[Learner], None]]:
    """Accelerates learners until the end of the test."""
    open_: list[Any] = []
    yield lambda learner: open_.append(accelerate(learner))
    for one in open_:
        one.close()


@pytest.mark.parametrize("thin", [0, 10])
def test_a_batch_that_is_large_enough_is_split(thin: int, faster: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(composed_weight, "THIN", thin)
    learner = learner_with_a_branch()
    sizes = noted(learner)
    parameters = [*learner.trainable().values()]
    faster(learner)
    found = []
    for smallest in (10**6, split_batch.SMALLEST):
        monkeypatch.setattr(split_batch, "SMALLEST", smallest)
        features_bd = learner.features(pixels(33))
        found.append([features_bd, *torch.autograd.grad(features_bd.square().sum(), parameters)])
    learner.features(pixels(31))
    assert (sizes[0], sorted(sizes[1:3]), sizes[3:]) == (33, [16, 17], [31])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_branches_may_change_between_batches(faster: Any, monkeypatch: pytest.MonkeyPatch):
    """The composed weight that the halves share is that of now."""
    monkeypatch.setattr(split_batch, "SMALLEST", 2)
    learner, plain = learner_with_a_branch(), learner_with_a_branch()
    faster(learner)
    before_bd = learner.features(pixels(64))
    for made in (learner, plain):
        for parameter in made.trainable().values():
            parameter.data *= 2
    after_bd = learner.features(pixels(64))
    assert not torch.allclose(before_bd, after_bd)
    torch.testing.assert_close(after_bd, plain.features(pixels(64)))


def test_batches_with_routed_adapters_are_not_split(faster: Any):
    learner, adapter_b = learner_with_a_branch(), torch.arange(40) % 2 - 1
    learner.finish("new", fold=False)
    with learner.routing(["new"], adapter_b):
        wanted_bd = learner.features(pixels(40))
    faster(learner)
    with learner.routing(["new"], adapter_b):
        got_bd = learner.features(pixels(40))
    assert torch.equal(got_bd, wanted_bd)
    assert not torch.allclose(got_bd, learner.features(pixels(40)))


def test_watchers_see_the_whole_batch(faster: Any):
    learner, seen = learner_with_a_branch(), list[int]()
    sizes = noted(learner)
    faster(learner)
    with learner.watching({next(iter(learner.groups())): lambda x_bti: seen.append(len(x_bti))}):
        learner.features(pixels(40))
    assert (seen, sizes) == ([40], [40])
    learner.features(pixels(40))
    assert sizes == [40, 20, 20]


@pytest.mark.parametrize(
    "watch",
    [
        lambda part: part.register_forward_pre_hook(lambda *_: None),
        lambda part: part.register_forward_hook(lambda *_: None),
        lambda part: part.register_full_backward_hook(lambda *_: None),
        lambda part: part.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["before", "after", "backward", "before backward"],
)
@pytest.mark.parametrize("path", ["embeddings", "layers.1", "layers.1.attention.k_proj"])
def test_a_backbone_with_any_hook_is_not_split(path: str, watch: Callable[[nn.Module], Any], faster: Any):
    learner = learner_with_a_branch()
    sizes = noted(learner)
    faster(learner)
    handle = watch(learner.backbone.module.get_submodule(path))
    learner.features(pixels(40))
    handle.remove()
    learner.features(pixels(40))
    assert sizes == [40, 20, 20]


def test_moments_of_inputs_are_those_of_whole_batches(faster: Any):
    learner, plain = learner_with_a_branch(), learner_with_a_branch()
    sizes = noted(learner)
    batches = [pixels(31), pixels(33), pixels(40)]
    faster(learner)
    found = learner.input_moments(batches)
    assert sizes == [31, 33, 40]
    for group, wanted_dd in plain.input_moments(batches).items():
        assert torch.equal(found[group], wanted_dd)


def test_padded_texts_are_split_and_keep_their_padding(faster: Any):
    """Both halves are as long as the whole, whose longest text is in one of them."""
    learner, plain = Learner(tiny_bert(), ("k", "v")), Learner(tiny_bert(), ("k", "v"))
    sizes = noted(learner)
    texts = tiny_texts(40)
    batch = make_stream(texts, class_plan(texts, 1), "class")[0].train.batch(np.arange(32))
    faster(learner)
    torch.testing.assert_close(learner.features(batch), plain.features(batch))
    assert sizes == [16, 16]


def test_features_of_several_blocks_are_not_split(faster: Any):
    learner, plain = learner_with_a_branch(), learner_with_a_branch()
    sizes = noted(learner)
    faster(learner)
    torch.testing.assert_close(learner.features(pixels(40), layers=2), plain.features(pixels(40), layers=2))
    assert sizes == [40]


def test_branches_of_each_example_are_not_split(faster: Any):
    learner = learner_with_a_branch()
    wanted_bd = learner.features(pixels(40)).detach()
    faster(learner)
    with learner.per_example("new", 40) as copies:
        got_bd = learner.features(pixels(40))
        gradients = torch.autograd.grad(got_bd.square().sum(), [*copies.values()])
    torch.testing.assert_close(got_bd, wanted_bd)
    assert all(len(gradient) == 40 for gradient in gradients)


def test_threads_are_kept_until_it_is_closed():
    def named() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("lamina-half")}

    learner, before = learner_with_a_branch(), named()
    accelerated = accelerate(learner)
    seen = []
    for _ in range(2):
        learner.features(pixels(40))
        seen.append(named() - before)
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]
    accelerated.close()
    assert not named() - before
    assert len(learner.features(pixels(40))) == 40


@pytest.mark.parametrize("count", [1, 3])
def test_an_odd_number_of_threads_splits_nothing(count: int, faster: Any):
    torch.set_num_threads(count)
    learner = learner_with_a_branch()
    sizes = noted(learner)
    faster(learner)
    learner.features(pixels(40))
    assert sizes == [40]


def test_half_precision_is_not_split(faster: Any):
    learner = Learner(tiny_vit(), ("k", "v"), dtype=torch.bfloat16)
    sizes = noted(learner)
    faster(learner)
    learner.features(pixels(40))
    assert sizes == [40]
