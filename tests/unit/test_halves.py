"""A batch in two halves side by side: the same features and gradients as in one piece, in threads of their own."""

import threading
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_bert, tiny_texts, tiny_vit
from torch import Tensor, nn

from lamina import adapters
from lamina import learner as learners
from lamina.adapters import LowRank
from lamina.data.streams import class_plan, make_stream
from lamina.learner import Learner
from lamina.speed.split_batch import Halves
from lamina.types import Batch


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
def halves() -> Iterator[Halves]:
    made = Halves()
    yield made
    made.close()


def themselves(weights: list[nn.Parameter]) -> dict[Tensor, Tensor]:
    return {weight: weight for weight in weights}


@pytest.mark.parametrize("size", [2, 7, 8])
def test_they_are_the_whole(size: int, weights: list[nn.Parameter], halves: Halves):
    """Also for a loss that is no sum over the examples."""

    def compute(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.tanh(inputs["a"] @ weights[0]) * inputs["b"]

    def loss(features_bd: Tensor) -> Tensor:
        return features_bd.std(0).prod() + weights[0].square().sum() + weights[1].sum()

    inputs = {"a": noise((size, 5), "a"), "b": noise((size, 1), "b")}
    whole_bd, halved_bd = compute(inputs), halves(compute, inputs, themselves(weights))
    torch.testing.assert_close(halved_bd, whole_bd)
    wanted, got = (torch.autograd.grad(loss(features_bd), weights) for features_bd in (whole_bd, halved_bd))
    torch.testing.assert_close(got, wanted)


def test_gradients_only_where_they_are_wanted(weights: list[nn.Parameter], halves: Halves):
    with torch.no_grad():
        without_bd = halves(lambda inputs: inputs["a"] @ weights[0], {"a": noise((4, 5), "a")}, themselves(weights))
    assert not without_bd.requires_grad
    with_bd = halves(lambda inputs: inputs["a"], {"a": noise((4, 5), "a")}, themselves(weights))
    (with_bd.sum() + weights[1].sum()).backward()
    assert weights[0].grad is None
    assert torch.equal(weights[1].grad, torch.ones(2))


def test_a_gradient_goes_on_from_what_a_leaf_is_a_copy_of(weights: list[nn.Parameter], halves: Halves):
    x_ni = noise((4, 5), "a")
    doubled = 2 * weights[0]
    leaf = doubled.detach().requires_grad_()
    halves(lambda inputs: (inputs["a"] @ leaf).square(), {"a": x_ni}, {leaf: doubled}).sum().backward()
    wanted = torch.autograd.grad((x_ni @ (2 * weights[0])).square().sum(), weights[0])
    torch.testing.assert_close(weights[0].grad, wanted[0])
    assert leaf.grad is None


def test_each_half_has_a_thread_of_its_own_both_ways(weights: list[nn.Parameter], halves: Halves, threads: int):
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
    halves(lambda inputs: Watched.apply(inputs["a"] @ weights[0]), inputs, themselves(weights)).sum().backward()
    assert len({name for _, name, _ in seen}) == 2
    assert sorted(seen) == sorted(
        (way, name, threads // 2) for way in ("forward", "backward") for _, name, _ in seen[:2]
    )
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (torch.get_num_threads(), found) == (threads, [threads])


def test_what_goes_wrong_in_a_half_is_raised(halves: Halves):
    with pytest.raises(ZeroDivisionError):
        halves(lambda inputs: inputs["a"] / (1 // 0), {"a": noise((4, 5), "a")}, {})


def test_threads_that_cannot_be_halved_are_refused():
    torch.set_num_threads(3)
    with pytest.raises(ValueError, match="3 threads cannot be halved"):
        Halves()


# ------------------------------------------------------------------------------------------------- in a learner


def learner_with_a_branch() -> Learner:
    learner = Learner(tiny_vit(), ("k", "v"))
    for name, site in learner.sites.items():
        branch = LowRank.fresh(site.d_out, site.d_in, 2, torch.Generator().manual_seed(1))
        branch.up.data = noise(branch.up.shape, name)
        site.add("new", branch)
    return learner


def pixels(size: int) -> Batch:
    return Batch(inputs={"pixel_values": noise((size, 3, 16, 16), "pixels")}, labels_b=torch.zeros(size).long())


def noted(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many examples the backbone computes features at a time, from now on."""
    sizes, features = list[int](), learner.backbone.features
    monkeypatch.setattr(
        learner.backbone, "features", lambda inputs: sizes.append(len(next(iter(inputs.values())))) or features(inputs)
    )
    return sizes


@pytest.mark.parametrize("thin", [0, 10])
def test_a_learner_halves_what_is_large_enough(thin: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapters, "THIN", thin)
    learner = learner_with_a_branch()
    sizes = noted(learner, monkeypatch)
    parameters = [*learner.trainable().values()]
    wanted_bd = learner.features(pixels(33))
    wanted = torch.autograd.grad(wanted_bd.square().sum(), parameters)
    sizes.clear()
    with learner.in_halves():
        got_bd = learner.features(pixels(33))
        got = torch.autograd.grad(got_bd.square().sum(), parameters)
        learner.features(pixels(31))
    learner.features(pixels(33))
    assert sorted(sizes[:2]) == [16, 17]
    assert sizes[2:] == [31, 33]
    torch.testing.assert_close(got_bd, wanted_bd)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_branches_may_change_between_batches(monkeypatch: pytest.MonkeyPatch):
    """The sum of a weight and its branches, which the halves share, is that of now."""
    monkeypatch.setattr(learners, "SMALLEST", 2)
    learner = learner_with_a_branch()
    with learner.in_halves():
        before_bd = learner.features(pixels(64))
        for parameter in learner.trainable().values():
            parameter.data *= 2
        after_bd = learner.features(pixels(64))
    assert not torch.allclose(before_bd, after_bd)
    torch.testing.assert_close(after_bd, learner.features(pixels(64)))


def test_examples_that_chose_their_experts_stay_in_one_piece():
    learner, expert_b = learner_with_a_branch(), torch.arange(40) % 2 - 1
    learner.finish("new", fold=False)
    with learner.routing(["new"], expert_b):
        wanted_bd = learner.features(pixels(40))
    with learner.in_halves(), learner.routing(["new"], expert_b):
        got_bd = learner.features(pixels(40))
    assert torch.equal(got_bd, wanted_bd)
    assert not torch.allclose(got_bd, learner.features(pixels(40)))


def test_who_watches_a_batch_sees_the_whole_of_it():
    learner, seen = learner_with_a_branch(), list[int]()
    with learner.in_halves():
        with learner.watching({next(iter(learner.groups())): lambda x_bti: seen.append(len(x_bti))}):
            learner.features(pixels(40))
        assert learner.halves is not None
    assert seen == [40]


def test_moments_of_inputs_are_summed_in_halves(monkeypatch: pytest.MonkeyPatch):
    learner = learner_with_a_branch()
    sizes = noted(learner, monkeypatch)
    batches = [pixels(31), pixels(33), pixels(40)]
    found = [learner.input_moments(batches) for _ in range(3)]
    assert sorted(sizes[:5]) == [16, 17, 20, 20, 31]
    monkeypatch.setattr(learners, "SMALLEST", 10**6)
    for group, wanted_dd in learner.input_moments(batches).items():
        torch.testing.assert_close(found[0][group], wanted_dd, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[1][group], found[0][group])
        assert torch.equal(found[2][group], found[0][group])
    with learner.in_halves():
        learner.input_moments(batches)
        assert learner.halves is not None


def test_padded_texts_are_summed_in_one_piece(monkeypatch: pytest.MonkeyPatch):
    """What is padded in one half need not be in the other."""
    learner = Learner(tiny_bert(), ("k", "v"))
    sizes = noted(learner, monkeypatch)
    texts = tiny_texts(40)
    learner.input_moments([make_stream(texts, class_plan(texts, 1), "class")[0].train.batch(np.arange(32))])
    assert sizes == [32]


def test_nothing_within_what_is_in_one_piece_is_halved(monkeypatch: pytest.MonkeyPatch):
    learner = learner_with_a_branch()
    sizes = noted(learner, monkeypatch)
    with learner.in_halves():
        with learner.in_one_piece():
            with learner.in_halves():
                learner.features(pixels(40))
            learner.input_moments([pixels(40)])
        assert sizes == [40, 40]
        learner.features(pixels(40))
    assert sizes == [40, 40, 20, 20]


def test_branches_of_each_example_stay_in_one_piece():
    learner = learner_with_a_branch()
    wanted_bd = learner.features(pixels(40))
    with learner.in_halves(), learner.per_example("new", 40):
        got_bd = learner.features(pixels(40))
    torch.testing.assert_close(got_bd, wanted_bd)


def test_threads_are_kept_until_the_learner_is_closed_or_their_number_changes(threads: int):
    def named() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("lamina-half")}

    learner, before, seen = learner_with_a_branch(), named(), list[set[threading.Thread]]()
    for count in (threads, threads, 2):
        torch.set_num_threads(count)
        with learner.in_halves():
            learner.features(pixels(40))
        seen.append(named() - before)
    assert [len(new) for new in seen] == [2, 2, 2]
    assert seen[0] == seen[1]
    assert not seen[1] & seen[2]
    learner.close()
    assert not named() - before


@pytest.mark.parametrize("count", [1, 3])
def test_an_odd_number_of_threads_computes_a_batch_in_one_piece(count: int):
    torch.set_num_threads(count)
    learner = learner_with_a_branch()
    with learner.in_halves():
        assert learner.halves is None
        learner.features(pixels(40))


def test_half_precision_is_computed_in_one_piece():
    learner = Learner(tiny_vit(), ("k", "v"), dtype=torch.bfloat16)
    with learner.in_halves():
        assert learner.halves is None
