"""ComposedLinear: live branches inside the weight or beside it are those of the plain layer, in value and gradient.

Shape letters: o outputs, i inputs, r rank, b batch, t tokens.
"""

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import noise, tiny_branch, tiny_linear
from torch import Tensor

from lamina.adapters import AdaptedLinear, LowRank, OutputRange, all_folded
from lamina.speed import composed_weight
from lamina.speed.composed_weight import ComposedLinear, shared_weights
from lamina.speed.instance import replace

ALL = OutputRange(0, 6)
BOTH = pytest.mark.parametrize("thin", [0, 10], ids=["factors", "dense"])
"""Whether gradients of the factors are computed directly, or by way of the dense weight's."""


def layer_of(
    *cut: OutputRange, bias: bool = True, dtype: torch.dtype = torch.float32, composed: bool = True
) -> AdaptedLinear:
    """A layer with a folded branch and a live one, both factors trained, for each of these ranges."""
    layer = AdaptedLinear(tiny_linear(bias=bias), dtype)
    layer.add("before", tiny_branch("before"))
    layer.finish("before")
    for number, outputs in enumerate(cut):
        branch = tiny_branch(str(number), o=outputs.stop - outputs.start, trained=("up", "down"))
        layer.add(str(number), branch, outputs)
    return compose(layer) if composed else layer


def compose(layer: AdaptedLinear) -> AdaptedLinear:
    replace(layer, "with_live", ComposedLinear(layer))
    return layer


def learnt(layer: AdaptedLinear, x_bti: Tensor) -> dict[str, Tensor | None]:
    """Returns the output, and the gradients of the input and of every factor."""
    x_bti = x_bti.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y_bto = layer(x_bti)
    (y_bto * noise((*y_bto.shape[:-1], 6), "towards").to(y_bto.dtype)).sum().backward()
    return {"y": y_bto.detach(), "x": x_bti.grad} | {name: p.grad for name, p in layer.named_parameters()}


def how(layer: AdaptedLinear, tokens: int) -> str:
    return type(layer(noise((tokens, 5), "x").to(layer.weight_oi.dtype)).grad_fn).__name__


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cut", [(ALL,), (OutputRange(2, 6),), (ALL, OutputRange(1, 3), OutputRange(4, 6))])
@pytest.mark.parametrize(
    ("thin", "tokens", "way"),
    [(0, 12, "_composed"), (10, 12, "mm"), (10, 3, "_beside")],
    ids=lambda value: str(value),
)
def test_values_and_gradients_are_those_of_the_plain_layer(
    thin: int, tokens: int, way: str, cut: tuple[OutputRange, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
):
    """12 tokens are more than the 5 inputs of the layer, 3 are fewer."""
    monkeypatch.setattr(composed_weight, "THIN", thin)
    layer, x_bti = layer_of(*cut, bias=bias), noise((tokens // 3, 3, 5), "x")
    assert way in how(layer, tokens).lower()
    ours, plain = learnt(layer, x_bti), learnt(layer_of(*cut, bias=bias, composed=False), x_bti)
    assert None not in ours.values()
    assert len(ours) == 2 + 2 * len(cut)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [(ALL,), (ALL, OutputRange(1, 3), OutputRange(4, 6))])
def test_branches_beside_the_layer_are_what_autograd_makes_of_the_formula(
    cut: tuple[OutputRange, ...], dtype: torch.dtype, multiple: int, monkeypatch: pytest.MonkeyPatch
):
    """In float64. multiple: what ranks are padded to."""
    monkeypatch.setattr(composed_weight, "_multiple", lambda _: multiple)
    layer, exact = layer_of(*cut, dtype=dtype), layer_of(*cut, dtype=dtype, composed=False)
    assert "_Beside" in how(layer, 3)
    x_bti = noise((1, 3, 5), "x").to(dtype)
    for buffer in ("weight_oi", "bias_o"):
        setattr(exact, buffer, getattr(exact, buffer).double())
    ours, wanted = learnt(layer, x_bti), learnt(exact, x_bti.double())
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for name, value in wanted.items():
        assert (ours[name].double() - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("tokens", [9, 3], ids=["inside", "beside"])
def test_a_frozen_down_gets_no_gradient_and_keeps_no_input(tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(composed_weight, "THIN", 0)

    def kept(branch: LowRank) -> list[tuple[int, ...]]:
        layer, shapes = compose(AdaptedLinear(tiny_linear())), list[tuple[int, ...]]()
        layer.add("now", branch)

        def note(value: Tensor) -> Tensor:
            shapes.append(tuple(value.shape))
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            y_bo = layer(noise((tokens, 5), "x"))
        y_bo.sum().backward()
        assert branch.up.grad is not None
        assert (branch.down.grad is not None) == ("down" in branch.trained())
        return shapes

    assert (tokens, 5) not in kept(tiny_branch("its down is frozen"))
    assert (tokens, 5) in kept(tiny_branch("both are trained", trained=("up", "down")))


@BOTH
def test_in_bf16_training_uses_the_very_weights_of_prediction(thin: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(composed_weight, "THIN", thin)
    layer, x_bi = compose(AdaptedLinear(tiny_linear(), torch.bfloat16)), noise((9, 5), "x").bfloat16()
    layer.add("now", tiny_branch("now", trained=("up", "down")))
    training_bo = layer(x_bi)
    with all_folded({"layer": layer}):
        assert torch.equal(layer(x_bi), training_bo)
    (training_bo * noise((9, 6), "towards")).sum().backward()
    exact = tiny_branch("now", trained=("up", "down"))
    (x_bi.float() @ (exact.up @ exact.down).T * noise((9, 6), "towards")).sum().backward()
    for name, parameter in exact.named_parameters():
        got = layer.get_parameter(f"live.now.{name}").grad
        torch.testing.assert_close(got, parameter.grad, rtol=0.05, atol=0.05)


def test_beside_the_layer_bf16_keeps_updates_that_its_weight_could_not_hold():
    layer = compose(AdaptedLinear(tiny_linear(bias=False), torch.bfloat16))
    layer.weight_oi = torch.ones(6, 5, dtype=torch.bfloat16)
    x_bi = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.bfloat16).repeat(3, 1)
    layer.add("now", LowRank(trained={"up": torch.full((6, 1), 1e-3), "down": x_bi[:1].float()}))
    torch.testing.assert_close(layer(x_bi), torch.full((3, 6), 4e-3, dtype=torch.bfloat16))


def test_without_live_branches_it_is_the_layer():
    layer, x_bi = layer_of(), noise((9, 5), "x")
    assert torch.equal(layer(x_bi), F.linear(x_bi, layer.weight_oi, layer.bias_o))
    layer = layer_of(ALL)
    with all_folded({"layer": layer}):
        assert torch.equal(layer(x_bi), F.linear(x_bi, layer.weight_oi, layer.bias_o))


@BOTH
@pytest.mark.parametrize("tokens", [12, 3])
def test_forwards_share_a_weight_and_can_be_differentiated_apart(
    thin: int, tokens: int, monkeypatch: pytest.MonkeyPatch
):
    """As split batches do: gradients go to the leaves first, and from there to the factors."""
    monkeypatch.setattr(composed_weight, "THIN", thin)
    layer, x_bi = layer_of(ALL, OutputRange(1, 3)), noise((tokens, 5), "x")
    wanted = torch.autograd.grad(layer(x_bi).square().sum(), [*layer.parameters()])
    composed = vars(layer)["with_live"]
    with shared_weights([composed]) as leaves:
        outputs = [layer(half_bi) for half_bi in x_bi.chunk(2)]
        assert [leaf.is_leaf for leaf in leaves] == [True] * (thin > 0)
    assert composed.shared_oi is None
    found = [torch.zeros_like(parameter) for parameter in layer.parameters()]
    for y_bo in outputs:
        inputs = [*leaves, *layer.parameters()]
        (*of_leaves,) = torch.autograd.grad(y_bo.square().sum(), inputs, allow_unused=True)
        for leaf, weight_oi in leaves.items():
            of_factors = torch.autograd.grad(weight_oi, [*layer.parameters()], of_leaves[0], retain_graph=True)
            assert leaf.grad is None
            of_leaves[1:] = of_factors
        found = [a + b for a, b in zip(found, of_leaves[len(leaves) :], strict=True)]
    torch.testing.assert_close(found, [*wanted], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(outputs), layer(x_bi))


def test_a_shared_weight_is_given_up_after_a_failure():
    layer = layer_of(ALL)
    composed = vars(layer)["with_live"]
    with pytest.raises(RuntimeError, match="inside"), shared_weights([composed]):
        raise RuntimeError("inside")
    assert composed.shared_oi is None
