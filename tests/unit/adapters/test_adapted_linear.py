"""AdaptedLinear: folding can be repeated and undone to the bit, branches change their own outputs only, misfits are refused.

Shape letters: o outputs, i inputs, r rank, b batch.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import noise, tiny_branch, tiny_linear
from torch import Tensor, nn

from lamina.adapters import AdaptedLinear, LowRank, Mixture, OutputRange, all_folded, bare, inject

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def product(branch: LowRank) -> Tensor:
    up_or, down_ri = branch.factors()
    return (up_or @ down_ri).detach()


@BOTH
def test_an_adapted_layer_without_branches_is_the_layer(dtype: torch.dtype):
    layer, plain = AdaptedLinear(tiny_linear(), dtype), tiny_linear().to(dtype)
    x_bi = noise((7, 5), "x").to(dtype)
    assert torch.equal(layer(x_bi), plain(x_bi))
    assert (layer.d_out, layer.d_in) == (6, 5)
    assert layer.base_oi.dtype == torch.float32
    assert torch.equal(layer.base_oi, tiny_linear().weight)
    assert list(layer.parameters()) == []
    assert AdaptedLinear(tiny_linear(bias=False)).bias_o is None


@BOTH
def test_folding_gives_the_same_bits_however_often_and_is_undone(dtype: torch.dtype):
    layer = AdaptedLinear(tiny_linear(), dtype)
    for key in "abc":
        layer.add(key, tiny_branch(key))
        layer.finish(key)
    weight_oi = layer.weight_oi.clone()
    expected_oi = tiny_linear().weight + 0
    for key in "abc":
        expected_oi = expected_oi + product(tiny_branch(key))
    assert torch.equal(weight_oi, expected_oi.to(dtype)), "from the pristine base, in float32, then rounded"
    layer.add("live", tiny_branch("d"))
    for _ in range(3):
        with all_folded({"layer": layer}):
            assert torch.equal(layer.weight_oi, (expected_oi + product(tiny_branch("d"))).to(dtype))
        assert torch.equal(layer.weight_oi, weight_oi)
        layer.refold()
        assert torch.equal(layer.weight_oi, weight_oi)
    with pytest.raises(RuntimeError, match="inside"), all_folded({"layer": layer}):
        raise RuntimeError("inside")
    assert torch.equal(layer.weight_oi, weight_oi)
    assert torch.equal(layer.base_oi, tiny_linear().weight)
    layer.drop("live")
    layer.drop("b")
    without_oi = tiny_linear().weight + product(tiny_branch("a")) + product(tiny_branch("c"))
    assert torch.equal(layer.weight_oi, without_oi.to(dtype)), "of all branches but the one taken away, anew"
    layer.drop("a")
    layer.drop("c")
    assert torch.equal(layer.weight_oi, tiny_linear().weight.to(dtype)), "without its branches it is the base again"


def test_the_forward_is_the_sum_over_branches_live_or_finished():
    layer, x_bi = AdaptedLinear(tiny_linear()), noise((7, 5), "x")
    branches = [tiny_branch("a"), tiny_branch("b", rank=3)]
    layer.add("a", branches[0])
    layer.add("b", branches[1])
    expected_bo = x_bi @ (tiny_linear().weight + product(branches[0]) + product(branches[1])).T + tiny_linear().bias
    torch.testing.assert_close(layer(x_bi), expected_bo)
    with all_folded({"layer": layer}):
        torch.testing.assert_close(layer(x_bi), expected_bo)
    layer.finish("a")
    torch.testing.assert_close(layer(x_bi), expected_bo)
    assert list(layer.live) == ["b"]
    layer.finish("b")
    torch.testing.assert_close(layer(x_bi), expected_bo)
    assert list(layer.finished) == ["a", "b"]


@BOTH
def test_live_branches_are_what_autograd_makes_of_the_formula(dtype: torch.dtype):
    """In float64, of branches for all and for some outputs."""
    cut = (OutputRange(0, 6), OutputRange(1, 3), OutputRange(4, 6))
    layer, x_bi = AdaptedLinear(tiny_linear(), dtype), noise((7, 5), "x").to(dtype)
    for number, outputs in enumerate(cut):
        branch = tiny_branch(str(number), o=outputs.stop - outputs.start, trained=("up", "down"))
        layer.add(str(number), branch, outputs)
    factors = [*layer.parameters()]

    def formula(x_bi: Tensor, *factors_n: Tensor) -> Tensor:
        weight_oi = layer.weight_oi.double()
        for (start, stop), up_or, down_ri in zip(cut, factors_n[::2], factors_n[1::2], strict=True):
            weight_oi = weight_oi + F.pad(up_or @ down_ri, (0, 0, start, 6 - stop))
        return x_bi @ weight_oi.T + layer.bias_o.double()

    def found(compute: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        y_bo = compute(given[0])
        towards_bo = noise((7, 6), "towards").to(y_bo.dtype)
        return [y_bo, *torch.autograd.grad((y_bo * towards_bo).sum(), given)]

    ours = found(layer, x_bi.clone().requires_grad_(), *factors)
    exact = [value.detach().double().requires_grad_() for value in (x_bi, *factors)]
    wanted = found(lambda x: formula(x, *exact[1:]), *exact)
    for got, want in zip(ours, wanted, strict=True):
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_a_branch_for_some_outputs_changes_no_other():
    layer, x_bi = AdaptedLinear(tiny_linear()), noise((7, 5), "x")
    before_bo = layer(x_bi)
    layer.add("k", tiny_branch("k", o=2), OutputRange(2, 4))
    branch = tiny_branch("k", o=2)
    expected_bo = before_bo.clone()
    expected_bo[:, 2:4] += x_bi @ product(branch).T
    torch.testing.assert_close(layer(x_bi), expected_bo)
    assert torch.equal(layer(x_bi)[:, [0, 1, 4, 5]], before_bo[:, [0, 1, 4, 5]])
    layer.finish("k")
    torch.testing.assert_close(layer(x_bi), expected_bo)
    assert torch.equal(layer.weight_oi[[0, 1, 4, 5]], tiny_linear().weight[[0, 1, 4, 5]])


def test_gradients_reach_what_is_trained_and_nothing_else():
    layer = AdaptedLinear(tiny_linear())
    layer.add("a", tiny_branch("a"))
    layer.add("b", LowRank.fresh(6, 5, 2, torch.Generator().manual_seed(0)))
    layer(noise((3, 5), "x")).square().sum().backward()
    gradients = {name: value.grad is not None for name, value in layer.named_parameters()}
    assert gradients == {"live.a.up": True, "live.b.up": True, "live.b.down": True}
    assert not layer.weight_oi.requires_grad


def test_a_branch_keeps_a_copy_in_float32():
    up_or, down_ri = noise((6, 2), "u").bfloat16(), noise((2, 5), "d").bfloat16()
    branch = LowRank(trained={"up": up_or}, frozen={"down": down_ri})
    up_or.zero_()
    assert torch.count_nonzero(branch.up) > 0
    assert (branch.up.dtype, branch.down.dtype) == (torch.float32, torch.float32)
    assert ([*branch.trained()], [*branch.frozen()]) == (["up"], ["down"])
    assert [name for name, _ in branch.named_parameters()] == ["up"]


def test_how_factors_lie_in_memory_makes_no_bit_of_a_difference():
    """As after a restart, where all are contiguous."""
    up_or, down_ri = noise((7, 48), "u").T, noise((32, 7), "d").T
    weights = []
    for laid_out in (lambda factor: factor, lambda factor: factor.contiguous()):
        layer = AdaptedLinear(tiny_linear(48, 32))
        branch = LowRank(trained={"up": laid_out(up_or)}, frozen={"down": laid_out(down_ri)})
        assert all(factor.is_contiguous() for factor in branch.factors())
        layer.add("a", branch)
        layer.finish("a")
        weights.append(layer.weight_oi)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("up", "down", "outputs"),
    [((5, 2), (2, 5), None), ((6, 2), (2, 6), None), ((6, 2), (3, 5), None), ((6, 2), (2, 5), OutputRange(0, 3))],
    ids=["rows of up", "columns of down", "ranks", "outputs"],
)
def test_wrong_shapes_are_refused(up: tuple, down: tuple, outputs: OutputRange | None):
    layer = AdaptedLinear(tiny_linear())
    branch = LowRank(trained={"up": torch.zeros(up), "down": torch.zeros(down)})
    with pytest.raises(ValueError, match=r"branch 'a' maps \(\d, 2\) x \([23], \d\), the layer \(\d, 5\)"):
        layer.add("a", branch, outputs)
    assert len(layer.live) == 0


def test_a_name_is_used_once():
    layer = AdaptedLinear(tiny_linear())
    layer.add("a", tiny_branch("a"))
    with pytest.raises(ValueError, match="'a' exists already"):
        layer.add("a", tiny_branch("a"))
    layer.finish("a")
    with pytest.raises(ValueError, match="'a' exists already"):
        layer.add("a", tiny_branch("a"))


def test_a_fresh_branch_is_initialised_as_in_lora():
    """up zero; down uniform in +-1/sqrt(d_in), so with variance 1/(3 d_in); a function of the generator."""
    fresh = [LowRank.fresh(8, 400, 50, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.count_nonzero(fresh[0].up) == 0
    assert fresh[0].up.shape == (8, 50)
    down_ri = fresh[0].down.detach()
    assert down_ri.shape == (50, 400)
    assert down_ri.abs().max() <= 400**-0.5
    assert down_ri.abs().max() > 0.99 * 400**-0.5
    n = down_ri.numel()
    assert abs(down_ri.mean()) < 5 * (1 / 1200 / n) ** 0.5
    assert down_ri.var() == pytest.approx(1 / 1200, rel=5 * (0.8 / n) ** 0.5)
    assert torch.equal(down_ri, fresh[1].down)
    assert not torch.equal(down_ri, fresh[2].down)
    assert [*fresh[0].trained()] == ["up", "down"]


def test_injection_replaces_a_linear_layer_in_place():
    module = nn.Sequential(nn.ModuleDict({"inner": tiny_linear()}), nn.ReLU())
    adapted = inject(module, "0.inner")
    assert module[0]["inner"] is adapted
    with pytest.raises(TypeError, match=r"1 is a ReLU, only nn.Linear can be adapted"):
        inject(module, "1")
    with pytest.raises(TypeError, match=r"0.inner is a AdaptedLinear"):
        inject(module, "0.inner")


# ----------------------------------------------------------------------------------------------- routed adapters


def routed(
    count: int, outputs: OutputRange | None = None, dtype: torch.dtype = torch.float32
) -> tuple[AdaptedLinear, Mixture]:
    layer = AdaptedLinear(tiny_linear(), dtype)
    outputs = outputs or OutputRange(0, 6)
    for k in range(count):
        layer.add(f"e{k}", tiny_branch(f"e{k}", o=outputs.stop - outputs.start), outputs)
        layer.finish(f"e{k}", fold=False)
    kept = [layer.finished[f"e{k}"] for k in range(count)]
    ups_eor, downs_eri = torch.stack([k.up_or for k in kept]), torch.stack([k.down_ri for k in kept])
    return layer, Mixture(outputs, ups_eor.to(dtype), downs_eri.to(dtype), torch.tensor([]))


def test_a_routed_adapter_has_no_effect_until_it_is_selected_and_is_never_folded():
    layer, _ = routed(2)
    x_bti = noise((3, 4, 5), "x")
    assert torch.equal(layer(x_bti), tiny_linear()(x_bti))
    with all_folded({"layer": layer}):
        assert torch.equal(layer(x_bti), tiny_linear()(x_bti))


@pytest.mark.parametrize("outputs", [OutputRange(0, 6), OutputRange(2, 5)], ids=["all outputs", "some outputs"])
@pytest.mark.parametrize("folded", [False, True])
def test_each_example_gets_the_adapter_selected_for_it(outputs: OutputRange, folded: bool):
    layer, mixture = routed(3, outputs)
    x_bti, position_b = noise((5, 4, 5), "x"), torch.tensor([2, -1, 0, 0, 1])
    layer.mixtures["k"] = mixture._replace(router=position_b)
    if folded:
        layer.fold_live()
    for x_ti, position, y_to in zip(x_bti, position_b.tolist(), layer(x_bti), strict=True):
        weight_oi = tiny_linear().weight.clone()
        if position >= 0:
            count = outputs.stop - outputs.start
            weight_oi[outputs.start : outputs.stop] += product(tiny_branch(f"e{position}", o=count))
        torch.testing.assert_close(y_to, x_ti @ weight_oi.T + tiny_linear().bias)


@BOTH
def test_gates_weigh_the_adapters_example_by_example(dtype: torch.dtype):
    layer, mixture = routed(3, dtype=dtype)
    x_bti, gates_be = noise((2, 4, 5), "x").to(dtype), torch.tensor([[0.5, 0.0, 2.0], [1.0, 1.0, -1.0]])
    layer.mixtures["k"] = mixture._replace(router=lambda x: gates_be)
    for x_ti, gates_e, y_to in zip(x_bti, gates_be, layer(x_bti), strict=True):
        update_oi = sum(g * product(tiny_branch(f"e{k}")) for k, g in enumerate(gates_e))
        expected_to = x_ti.float() @ (tiny_linear().weight + update_oi).T + tiny_linear().bias
        torch.testing.assert_close(y_to.float(), expected_to, atol=1e-5 if dtype == torch.float32 else 0.2, rtol=2e-2)
        assert y_to.dtype == dtype


def test_gates_of_one_adapter_per_example_are_ones_and_zeros():
    _, mixture = routed(3)
    selected = mixture._replace(router=torch.tensor([2, -1, 0]))
    assert selected.gates(noise((3, 4, 5), "x")).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


def test_a_dropped_branch_leaves_nothing_behind():
    layer, x_bi = AdaptedLinear(tiny_linear()), noise((7, 5), "x")
    layer.add("a", tiny_branch("a"))
    layer.finish("a")
    layer.add("b", tiny_branch("b"))
    layer.drop("a")
    layer.drop("b")
    assert torch.equal(layer(x_bi), tiny_linear()(x_bi))
    layer.add("b", tiny_branch("b"))  # the name is free again
    with pytest.raises(KeyError):
        layer.drop("a")


def test_bare_layers_are_those_of_the_pre_trained_model():
    layer, x_bi = AdaptedLinear(tiny_linear()), noise((7, 5), "x")
    layer.add("a", tiny_branch("a"))
    layer.finish("a")
    layer.add("b", tiny_branch("b"))
    y_bo = layer(x_bi)
    with bare({"layer": layer}):
        assert torch.equal(layer(x_bi), tiny_linear()(x_bi))
    assert torch.equal(layer(x_bi), y_bo)


def test_bare_while_folded_goes_back_to_folded():
    layer, x_bi = AdaptedLinear(tiny_linear()), noise((7, 5), "x")
    layer.add("a", tiny_branch("a"))
    with all_folded({"layer": layer}):
        folded_oi, y_bo = layer.weight_oi.clone(), layer(x_bi)
        with bare({"layer": layer}):
            assert torch.equal(layer(x_bi), tiny_linear()(x_bi))
        assert torch.equal(layer.weight_oi, folded_oi)
        assert torch.equal(layer(x_bi), y_bo), "the live branch is not added twice"


def test_folding_within_folding_ends_with_the_outer_one():
    layer = AdaptedLinear(tiny_linear())
    layer.add("live", tiny_branch("live"))
    before_oi = layer.weight_oi.clone()
    with all_folded({"layer": layer}):
        folded_oi = layer.weight_oi.clone()
        with all_folded({"layer": layer}):
            assert torch.equal(layer.weight_oi, folded_oi)
        assert torch.equal(layer.weight_oi, folded_oi)
    assert torch.equal(layer.weight_oi, before_oi)
    assert not torch.equal(folded_oi, before_oi)
