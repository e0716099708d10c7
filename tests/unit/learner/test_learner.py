"""The learner: adapter sites by role, what is trained, and a round trip through what is saved.

Shape letters: b batch, t tokens, d width.
"""

import json

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_bert, tiny_fused_vit, tiny_images, tiny_texts, tiny_vit

from lamina.adapters import LowRank
from lamina.errors import ConfigError
from lamina.learner import Learner, Output
from lamina.types import Batch, Task

MAKERS = {"vit": tiny_vit, "fused": tiny_fused_vit, "bert": tiny_bert}
every_backbone = pytest.mark.parametrize("kind", MAKERS)


def batch(kind: str, n: int = 5) -> Batch:
    data = (tiny_texts if kind == "bert" else tiny_images)(24)
    return Batch(inputs=data.table.inputs(np.arange(n), None), labels_b=torch.from_numpy(data.labels_n[:n]))


def branch(site: object, key: str, rank: int = 2, trained: tuple[str, ...] = ("up",)) -> LowRank:
    parts = {"up": noise((site.d_out, rank), site.name, key), "down": 0.2 * noise((rank, site.d_in), site.name, key, 1)}
    return LowRank(
        trained={name: parts[name] for name in trained},
        frozen={name: value for name, value in parts.items() if name not in trained},
    )


def grown(kind: str, dtype: torch.dtype = torch.float32) -> Learner:
    """Two finished branches, one live, two blocks of the head, the older frozen."""
    learner = Learner(MAKERS[kind](), ("q", "v", "fc2"), dtype=dtype)
    for number, name in enumerate(("first task", "second", "live")):
        learner.head.freeze()
        if number:
            learner.head.add(name, [number, 0])
        for site in learner.sites.values():
            site.add(name, branch(site, name, 1 + number, ("up", "down") if number == 2 else ("up",)))
        if number < 2:
            learner.finish(name)
    return learner


@every_backbone
def test_a_new_learner_is_the_backbone(kind: str):
    plain, learner = MAKERS[kind](), Learner(MAKERS[kind]())
    with torch.no_grad():
        torch.testing.assert_close(learner.features(batch(kind)), plain.features(batch(kind).inputs))
    assert {site.role for site in learner.sites.values()} == {"k", "v"}
    assert learner.trainable() == {}
    assert learner.tensors() == {}
    assert learner.stored_parameters() == 0


@every_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_saved_rebuilds_the_learner(kind: str, dtype: torch.dtype):
    saved = grown(kind, dtype)
    outline, tensors = json.loads(json.dumps(saved.outline())), saved.tensors()
    learner = Learner(MAKERS[kind](), ("q", "v", "fc2"), dtype=dtype)
    learner.restore(outline, {name: value.clone() for name, value in tensors.items()}, LowRank)
    assert learner.outline() == saved.outline()
    assert list(learner.tensors()) == list(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in learner.tensors().items())
    assert list(learner.trainable()) == list(saved.trainable())
    assert learner.outputs == saved.outputs
    assert all(torch.equal(layer.weight_oi, saved.layers[path].weight_oi) for path, layer in learner.layers.items())
    ours, theirs = (x.head(x.features(batch(kind))) for x in (learner, saved))
    assert torch.equal(ours, theirs)
    assert ours.dtype == torch.float32


def test_a_missing_tensor_is_refused():
    saved = grown("vit")
    tensors = saved.tensors()
    for key in (next(iter(tensors)), *list(tensors)[-3:]):
        with pytest.raises(KeyError, match=key):
            Learner(tiny_vit(), ("q", "v", "fc2")).restore(
                saved.outline(), {name: value for name, value in tensors.items() if name != key}, LowRank
            )


@every_backbone
def test_trainable_parameters_are_named_by_their_location(kind: str):
    learner = grown(kind)
    names = set(learner.trainable())
    assert "block0.q/live/up" in names
    assert "block1.fc2/live/down" in names
    assert {"head/live/weight", "head/live/bias"} <= names
    assert not any("second" in name or "first" in name for name in names)
    assert len(names) == 2 * len(learner.sites) + 2
    assert len({id(value) for value in learner.trainable().values()}) == len(names)


def test_a_branch_can_exclude_tensors_from_weight_decay():
    class Steady(LowRank):
        undecayed = ("down",)

    learner = Learner(tiny_fused_vit(), ("q", "v"), blocks=(1,))
    for site, kind in zip(learner.sites.values(), (Steady, LowRank), strict=True):
        site.add("a", kind(trained=branch(site, "a").trained() | branch(site, "a").frozen()))
    assert learner.undecayed() == {"block1.q/a/down"} <= learner.trainable().keys()
    learner.finish("a")
    assert learner.undecayed() == set()


@every_backbone
def test_sites_of_one_group_read_the_same_input(kind: str):
    learner = Learner(MAKERS[kind](), ("q", "k", "v", "fc1"))
    seen: dict[str, torch.Tensor] = {}
    for name, site in learner.sites.items():
        site.layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    learner.features(batch(kind))
    for group, sites in learner.groups().items():
        assert len({seen[site.name].data_ptr() for site in sites if site.name in seen}) == 1
        assert len(sites) == (3 if group.endswith("attention") else 1)


def test_a_layer_of_several_roles_is_adapted_role_by_role():
    """Branches for q, k and v of one layer give the features of the summed weights."""
    learner, x = Learner(tiny_fused_vit(), ("q", "k", "v")), batch("fused")
    before_bd = learner.features(x)
    weights = {path: layer.base_oi.clone() for path, layer in learner.layers.items()}
    for site in learner.sites.values():
        site.add("t", branch(site, "t"))
        up_or, down_ri = branch(site, "t").factors()
        weights[site.where.path][site.outputs.start : site.outputs.stop] += (up_or @ down_ri).detach()
    plain = tiny_fused_vit()
    for path, weight_oi in weights.items():
        plain.module.get_submodule(path).weight.data.copy_(weight_oi)
    expected_bd = plain.features(x.inputs)
    assert not torch.allclose(expected_bd, before_bd, atol=1e-2)
    torch.testing.assert_close(learner.features(x), expected_bd, atol=1e-4, rtol=1e-4)
    with learner.folded():
        torch.testing.assert_close(learner.features(x), expected_bd, atol=1e-4, rtol=1e-4)


def test_task_logits_are_those_of_the_tasks_own_outputs():
    learner, x = grown("vit"), batch("vit")
    scores_bj = learner.head(learner.features(x))
    torch.testing.assert_close(learner.task_logits(x, "second"), scores_bj[:, :2])
    torch.testing.assert_close(learner.task_logits(x, "live"), scores_bj[:, 2:])


def test_stored_parameters_are_counted_by_hand():
    learner = grown("vit")
    per_rank = sum(site.d_in + site.d_out for site in learner.sites.values())
    assert learner.stored_parameters() == (1 + 2 + 3) * per_rank + 4 * (32 + 1)


@every_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_copies_per_example_give_one_gradient_per_example(kind: str, dtype: torch.dtype):
    learner, x = grown(kind, dtype), batch(kind)
    outline, weights = learner.outline(), {path: layer.weight_oi.clone() for path, layer in learner.layers.items()}
    before_bd = learner.features(x).detach()
    with learner.per_example("live", 5) as copies:
        after_bd = learner.features(x)
        gradients = dict(zip(copies, torch.autograd.grad(after_bd.square().sum(), list(copies.values())), strict=True))
    close = {"atol": 1e-4, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(after_bd.detach(), before_bd, **close)
    factors = {name.replace("/live/", "/"): p for name, p in learner.trainable().items() if "/live/" in name}
    factors = {name: factor for name, factor in factors.items() if not name.startswith("head/")}
    assert copies.keys() == factors.keys()
    assert learner.outline() == outline
    assert all(torch.equal(layer.weight_oi, weights[path]) for path, layer in learner.layers.items())
    assert torch.equal(learner.features(x), before_bd)
    if dtype == torch.float32:
        for b in range(5):
            one = Batch(
                inputs={part: value[b : b + 1] for part, value in x.inputs.items()}, labels_b=x.labels_b[b : b + 1]
            )
            expected = torch.autograd.grad(learner.features(one).square().sum(), list(factors.values()))
            for name, gradient in zip(factors, expected, strict=True):
                torch.testing.assert_close(gradients[name][b], gradient, **close)


def test_copies_are_gone_after_a_failure():
    learner = grown("fused")
    with pytest.raises(RuntimeError, match="4"), learner.per_example("live", 5):
        learner.features(batch("fused", 4))
    assert all(not layer.mixtures for layer in learner.layers.values())
    assert all("live" in site.live() for site in learner.sites.values())


@every_backbone
@pytest.mark.parametrize("folded", [False, True])
def test_the_weight_in_use_is_what_the_layer_computes_with(kind: str, folded: bool):
    """Of an adapted layer, with finished and live branches, and of one that is not adapted."""
    learner, x_bti = grown(kind), noise((2, 3, 32), "x")
    for layer in learner.layers.values():
        if folded:
            layer.fold_live()
    for role in ("q", "k", "v", "out"):
        site = next(site for site in learner.backbone.sites if (site.block, site.role) == (1, role))
        outputs = slice(*site.outputs) if site.outputs else slice(None)
        y_bto = learner.backbone.module.get_submodule(site.path)(x_bti)[..., outputs]
        weight_oi, bias_o = learner.linear(1, role)
        torch.testing.assert_close(x_bti @ weight_oi.T + bias_o, y_bto, atol=1e-5, rtol=1e-5)
        assert not weight_oi.requires_grad


@every_backbone
def test_a_watched_group_shows_its_input_once_before_it_computes(kind: str):
    learner, shown = Learner(MAKERS[kind](), ("k", "v")), []
    computed: list[str] = []
    for layer in {id(site.layer): site.layer for site in learner.groups()["block1.attention"]}.values():
        layer.register_forward_hook(lambda *_: computed.append("computed"))

    def watch(x_btd: torch.Tensor) -> None:
        assert not torch.is_grad_enabled()
        shown.append((x_btd, len(computed)))

    with learner.watching({"block1.attention": watch}):
        for _ in range(2):
            learner.features(batch(kind))
    learner.features(batch(kind))
    per_forward = 1 if kind == "fused" else 2
    assert [count for _, count in shown] == [0, per_forward]
    assert all(x_btd.shape[0] == 5 and x_btd.shape[2] == 32 for x_btd, _ in shown)
    with pytest.raises(RuntimeError, match="inside"), learner.watching({"block1.attention": watch}):
        raise RuntimeError("inside")
    learner.features(batch(kind))
    assert len(shown) == 2


def test_nothing_is_differentiated_inside_folded():
    learner = grown("vit")
    with learner.folded():
        assert not learner.features(batch("vit")).requires_grad
    assert learner.features(batch("vit")).requires_grad


@pytest.mark.parametrize(("targets", "blocks"), [(("k", "w"), None), (("k",), (0, 3)), (("k",), (-1,))])
def test_sites_that_do_not_exist_are_refused(targets: tuple, blocks: tuple | None):
    with pytest.raises(ConfigError, match=r"'tiny_vit' has blocks 0 to 2 with roles .*'fc1'.*backbone.targets or"):
        Learner(tiny_vit(), targets, blocks)


def test_only_the_chosen_blocks_are_adapted():
    assert set(Learner(tiny_vit(), ("k",), (0, 2)).sites) == {"block0.k", "block2.k"}


def test_a_task_begins_with_a_block_of_outputs_and_an_initialised_branch_in_every_site():
    """Branches are a function of purpose, seed and site; what was there before is frozen."""
    task = Task(name="now", classes=(4, 2), train=None, val=None, test=None)
    learners = [grown("vit") for _ in range(3)]
    for learner, purpose in zip(learners, ("inflora", "inflora", "olora"), strict=True):
        torch.manual_seed(1)
        learner.add_lora(task, 3, purpose)
    ours, same, other = learners
    assert ours.outputs[-2:] == [Output("now", 4), Output("now", 2)]
    assert [name for name in ours.trainable() if name.startswith("head/")] == ["head/now/weight", "head/now/bias"]
    for name, site in ours.sites.items():
        up_or, down_ri = site.live()["now"].factors()
        assert (up_or.shape, down_ri.shape) == ((site.d_out, 3), (3, site.d_in))
        assert up_or.count_nonzero() == 0
        assert torch.equal(down_ri, same.sites[name].live()["now"].factors()[1])
        assert not torch.equal(down_ri, other.sites[name].live()["now"].factors()[1])


def test_after_a_reset_nothing_is_left():
    learner = grown("vit")
    learner.reset()
    assert learner.tensors() == {}
    assert learner.outputs == []
    assert torch.equal(learner.features(batch("vit")), Learner(tiny_vit(), ("q", "v", "fc2")).features(batch("vit")))
