"""A fused block is that of transformers: values, gradients, and whatever watches or changes what passes through it."""

import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tests.tiny import raw_vit, scatter, tiny_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.vit.modeling_vit import ViTLayer

from lamina.adapters import LowRank
from lamina.backbones import class_token, load
from lamina.learner import Learner, Watcher
from lamina.speed import accelerate
from lamina.speed.fused_block import fuse
from lamina.types import Batch

ROLES = ("q", "k", "v", "out", "fc1", "fc2")


def batch_of(size: int = 16, count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels_bchw = torch.randn(count, 3, size, size, generator=generator)
    return Batch(inputs={"pixel_values": pixels_bchw}, labels_b=torch.zeros(count, dtype=torch.long))


def learner_of(
    targets: tuple[str, ...] = ("k", "v"),
    *,
    fused: bool,
    size: int = 16,
    shortcut: bool = True,
    dtype: torch.dtype = torch.float32,
    frozen: tuple[str, ...] = (),
    branches: int = 1,
) -> Learner:
    """With branches that do something. shortcut: the last block need compute the class token only. fused: its blocks are, for
    good."""
    learner = Learner(tiny_vit(size=size), targets, dtype=dtype)
    module = learner.backbone.module
    if shortcut:
        for part in (module.layers[-1].attention.o_proj, module.layers[-1].layernorm_after):
            part.register_forward_pre_hook(class_token)
    for layer in module.layers if fused else ():
        fuse(layer)
    generator = torch.Generator().manual_seed(2)
    for site in learner.sites.values():
        for number in range(branches):
            rank = 2 + number
            factors = {
                "up": torch.randn(site.d_out, rank, generator=generator) / 10,
                "down": torch.randn(rank, site.d_in, generator=generator) / 10,
            }
            trained = {name: value for name, value in factors.items() if name not in frozen}
            site.add(f"task-{number}", LowRank(trained=trained, frozen={name: factors[name] for name in frozen}))
    return learner


def learnt(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """Returns the features, and the gradient of everything that learns."""
    features_bd = learner.features(batch)
    towards_bd = torch.randn(features_bd.shape, generator=torch.Generator().manual_seed(3))
    (features_bd * towards_bd).sum().backward()
    return {"features": features_bd.detach()} | {
        name: p.grad for name, p in learner.trainable().items() if p.grad is not None
    }


@pytest.mark.parametrize("size", [16, 48], ids=["5 tokens", "37 tokens"])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("targets", [("k", "v"), ROLES, *((role,) for role in ROLES)], ids=" ".join)
def test_values_and_gradients_are_those_of_the_plain_block(targets: tuple[str, ...], shortcut: bool, size: int):
    ours, plain = (
        learnt(learner_of(targets, fused=fused, size=size, shortcut=shortcut), batch_of(size))
        for fused in (True, False)
    )
    assert len(plain) == 1 + 2 * 3 * len(targets)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["down", "up"])
def test_what_is_not_learnt_gets_no_gradient(frozen: str):
    ours, plain = (
        learnt(learner_of(ROLES, fused=fused, frozen=(frozen,), branches=2), batch_of()) for fused in (True, False)
    )
    assert len(plain) == 1 + 2 * 3 * 6
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("without", [("k_proj", "v_proj"), ("k_proj",), ("v_proj",)], ids=" ".join)
def test_a_layer_without_bias_stays_without(without: tuple[str, ...]):
    found = []
    for fused in (True, False):
        learner = learner_of(("q",), fused=fused)
        for layer in learner.backbone.module.layers:
            layer.mlp.fc2.bias = None
            for name in without:
                layer.attention.get_submodule(name).bias = None
        found.append(learnt(learner, batch_of()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [("k", "v"), ("fc2",), ROLES], ids=" ".join)
def test_it_takes_no_more_operations_than_the_plain_block(targets: tuple[str, ...]):
    """Nothing is computed below the first layer that learns; in the last block only the class token has queries."""
    counts = []
    for fused in (True, False):
        learner = learner_of(targets, fused=fused)
        with FlopCounterMode(display=False) as counter:
            learnt(learner, batch_of(count=12))
        counts.append(counter.get_total_flops())
    assert counts[0] < counts[1]


def test_in_bf16_it_is_as_near_to_float32_as_the_plain_block():
    exact = learnt(learner_of(ROLES, fused=False), batch_of(count=16))
    ours, plain = (
        learnt(learner_of(ROLES, fused=fused, dtype=torch.bfloat16), batch_of(count=16)) for fused in (True, False)
    )

    def distance(found: dict[str, Tensor]) -> Tensor:
        return torch.stack([(found[name] - exact[name]).norm() / exact[name].norm() for name in exact])

    assert distance(ours).max() < 0.1
    assert distance(ours).mean() < 1.2 * distance(plain).mean()


def test_an_accelerated_backbone_has_fused_blocks_in_bf16_and_gives_them_back():
    learner = Learner(load("nano", image_size=32), dtype=torch.bfloat16)
    pixels_bchw = torch.randn(2, 3, 32, 32).bfloat16().requires_grad_()
    layers = learner.backbone.module.layers

    def blocks() -> int:
        return _made_by(learner.backbone.features({"pixel_values": pixels_bchw}), "_BlockBackward")

    assert blocks() == 0
    accelerated = accelerate(learner)
    assert blocks() == len(layers)
    assert all(type(layer) is ViTLayer for layer in layers)
    accelerated.close()
    assert blocks() == 0
    assert not any("forward" in vars(layer) for layer in layers)


def _made_by(value: Tensor, name: str) -> int:
    """How many functions of this name the graph of a tensor has."""
    found, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ == name for node in found)


def test_another_activation_is_left_to_transformers(tmp_path):
    raw_vit().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert load(str(tmp_path)).fusible
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_act": "relu"}))
    assert not load(str(tmp_path)).fusible


def _turn(_: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    return given[0].flip(-1)


def _turn_what_it_made(_: nn.Module, __: tuple[Tensor, ...], made: Tensor) -> Tensor:
    return made.flip(-1)


@pytest.mark.parametrize(
    "path", ["attention.q_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2", "layernorm_before"]
)
@pytest.mark.parametrize("before", [True, False])
def test_what_changes_a_part_is_obeyed(path: str, before: bool):
    found = []
    for fused in (True, False):
        learner = learner_of(fused=fused)
        part = learner.backbone.module.layers[1].get_submodule(path)
        if before:
            part.register_forward_pre_hook(_turn)
        else:
            part.register_forward_hook(_turn_what_it_made)
        found.append(learnt(learner, batch_of()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    unchanged = learnt(learner_of(fused=True), batch_of())
    assert (unchanged["features"] - found[0]["features"]).abs().max() > 0.1


@pytest.mark.parametrize("path", ["attention.k_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"])
def test_a_watcher_is_shown_the_input_of_a_linear_layer(path: str):
    """The blocks stay fused, in the last one with the class token only."""
    seen: list[list[Tensor]] = [[], []]
    for own, fused in zip(seen, (True, False), strict=True):
        learner = learner_of(fused=fused)
        for layer in learner.backbone.module.layers:
            watcher = Watcher(lambda x_bti, own=own: own.append(x_bti.detach().clone()))
            layer.get_submodule(path).register_forward_pre_hook(watcher)
        assert _made_by(learner.features(batch_of()), "_BlockBackward") == 3 * fused
    assert len(seen[0]) == 3
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["attention.k_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2", "layernorm_after"])
def test_other_hooks_of_a_part_are_called(path: str):
    """Their block is computed as transformers computes it, the others stay fused."""
    seen: list[list[Tensor]] = [[], []]
    for own, fused in zip(seen, (True, False), strict=True):
        learner = learner_of(fused=fused)
        part = learner.backbone.module.layers[1].get_submodule(path)
        part.register_forward_pre_hook(lambda _, given, own=own: own.append(given[0].detach().clone()))
        assert _made_by(learner.features(batch_of()), "_BlockBackward") == 2 * fused
    assert len(seen[0]) == 1
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_hooks_of_a_gradient_are_called():
    seen: list[list[Tensor]] = [[], []]
    for own, fused in zip(seen, (True, False), strict=True):
        learner = learner_of(ROLES, fused=fused)
        part = learner.backbone.module.layers[1].mlp.fc2
        part.register_full_backward_hook(lambda _, __, given, own=own: own.append(given[0].clone()))
        learnt(learner, batch_of())
    assert len(seen[0]) == 1
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_watchers_of_a_group_are_shown_its_input_once():
    shown: list[list[Tensor]] = [[], []]
    for own, fused in zip(shown, (True, False), strict=True):
        learner = learner_of(ROLES, fused=fused)
        with learner.watching(dict.fromkeys(learner.groups(), own.append)):
            learner.features(batch_of())
    assert len(shown[0]) == 3 * 4
    torch.testing.assert_close(*shown, rtol=1e-4, atol=1e-5)


def _moments(learner: Learner) -> dict[str, Tensor]:
    return learner.input_moments([batch_of()])


def _per_example(learner: Learner) -> dict[str, Tensor]:
    with learner.per_example("task-0", 6) as copies:
        learner.features(batch_of()).square().sum().backward()
    return {name: copy.grad for name, copy in copies.items() if copy.grad is not None}


def _routed(learner: Learner) -> dict[str, Tensor]:
    learner.finish("task-0", fold=False)
    with learner.routing(["task-0"], torch.tensor([0, -1, 0, -1, 0, 0])):
        return {"features": learner.features(batch_of())}


def _bare(learner: Learner) -> dict[str, Tensor]:
    with learner.bare():
        return {"features": learner.features(batch_of())}


def _folded(learner: Learner) -> dict[str, Tensor]:
    with learner.folded():
        return {"features": learner.features(batch_of())}


def _layered(learner: Learner) -> dict[str, Tensor]:
    return {"features": learner.features(batch_of(), layers=3)}


@pytest.mark.parametrize("do", [_moments, _per_example, _routed, _bare, _folded, _layered])
def test_what_learners_do_with_a_backbone_is_the_same(do: Callable[[Learner], dict[str, Tensor]]):
    ours, plain = (do(learner_of(fused=fused)) for fused in (True, False))
    assert plain
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_a_mask_is_left_to_transformers():
    hidden_btd = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    mask_b11t = torch.tensor([[0.0, 0.0, 0.0, -1e9, -1e9], [0.0] * 5])[:, None, None]
    found = []
    for fused in (True, False):
        layer = learner_of(fused=fused).backbone.module.layers[0]
        found.append(layer(hidden_btd, mask_b11t))
    torch.testing.assert_close(*found)
    assert (layer(hidden_btd, None) - found[0]).abs().max() > 0.01


def test_a_graph_may_be_gone_through_again_where_it_is_kept():
    learner = learner_of(ROLES, fused=True)
    hidden_btd = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(6)).requires_grad_()
    made_btd = learner.backbone.module.layers[0](hidden_btd, None)
    (first,) = torch.autograd.grad(made_btd.square().sum(), hidden_btd, retain_graph=True)
    (again,) = torch.autograd.grad(made_btd.square().sum(), hidden_btd)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(made_btd.square().sum(), hidden_btd)


def test_a_block_of_deit_is_one_of_these():
    from transformers import DeiTConfig, DeiTModel

    config = DeiTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    layer = scatter(DeiTModel(config, add_pooling_layer=False)).eval().requires_grad_(False).layers[0]
    found = []
    for fused in (True, False):
        hidden_btd = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(7)).requires_grad_()
        undo = fuse(layer) if fused else lambda: None
        made_btd = layer(hidden_btd, None)
        undo()
        assert _made_by(made_btd, "_BlockBackward") == fused
        found.append([made_btd, *torch.autograd.grad(made_btd.square().sum(), hidden_btd)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_without_gradients_there_is_no_graph():
    learner = learner_of(fused=True)
    with torch.no_grad():
        assert learner.features(batch_of()).grad_fn is None
    ours = partial(learner.features, batch_of())
    with torch.no_grad():
        still = ours()
    assert torch.equal(still, ours())
