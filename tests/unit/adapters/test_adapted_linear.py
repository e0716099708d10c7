"""Adapted layers: folding is exact to repeat and to undo, branches touch their own rows, and what does not fit is refused.

Shape letters: o outputs, i inputs, r rank, b batch.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import noise
from torch import Tensor, nn

from lamina import adapters
from lamina.adapters import AdaptedLinear, LowRank, Mixture, OutputRange, all_folded, inject, stripped

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def linear(o: int = 6, i: int = 5, bias: bool = True) -> nn.Linear:
    made = nn.Linear(i, o, bias).requires_grad_(False)
    made.weight.copy_(noise((o, i), "weight"))
    if bias:
        made.bias.copy_(noise((o,), "bias"))
    return made


def low_rank(key: str, o: int = 6, i: int = 5, rank: int = 2) -> LowRank:
    return LowRank(trained={"up": noise((o, rank), key, "up")}, frozen={"down": noise((rank, i), key, "down")})


def product(branch: LowRank) -> Tensor:
    up_or, down_ri = branch.factors()
    return (up_or @ down_ri).detach()


@BOTH
def test_an_adapted_layer_without_branches_is_the_layer(dtype: torch.dtype):
    layer, plain = AdaptedLinear(linear(), dtype), linear().to(dtype)
    x_bi = noise((7, 5), "x").to(dtype)
    assert torch.equal(layer(x_bi), plain(x_bi))
    assert (layer.d_out, layer.d_in) == (6, 5)
    assert layer.base_oi.dtype == torch.float32
    assert torch.equal(layer.base_oi, linear().weight)
    assert list(layer.parameters()) == []
    assert AdaptedLinear(linear(bias=False)).bias_o is None


@BOTH
def test_folding_gives_the_same_bits_however_often_and_is_undone(dtype: torch.dtype):
    layer = AdaptedLinear(linear(), dtype)
    for key in "abc":
        layer.add(key, low_rank(key))
        layer.finish(key)
    weight_oi = layer.weight_oi.clone()
    expected_oi = linear().weight + 0
    for key in "abc":
        expected_oi = expected_oi + product(low_rank(key))
    assert torch.equal(weight_oi, expected_oi.to(dtype)), "from the pristine base, in float32, then rounded"
    layer.add("live", low_rank("d"))
    for _ in range(3):
        with all_folded({"layer": layer}):
            assert torch.equal(layer.weight_oi, (expected_oi + product(low_rank("d"))).to(dtype))
        assert torch.equal(layer.weight_oi, weight_oi)
        layer.refold()
        assert torch.equal(layer.weight_oi, weight_oi)
    with pytest.raises(RuntimeError, match="inside"), all_folded({"layer": layer}):
        raise RuntimeError("inside")
    assert torch.equal(layer.weight_oi, weight_oi)
    assert torch.equal(layer.base_oi, linear().weight)
    layer.drop("live")
    layer.drop("b")
    without_oi = linear().weight + product(low_rank("a")) + product(low_rank("c"))
    assert torch.equal(layer.weight_oi, without_oi.to(dtype)), "of all branches but the one taken away, anew"
    layer.drop("a")
    layer.drop("c")
    assert torch.equal(layer.weight_oi, linear().weight.to(dtype)), "without its branches it is the base again"


def test_the_forward_is_the_sum_over_branches_live_or_finished():
    layer, x_bi = AdaptedLinear(linear()), noise((7, 5), "x")
    changes = [low_rank("a"), low_rank("b", rank=3)]
    layer.add("a", changes[0])
    layer.add("b", changes[1])
    expected_bo = x_bi @ (linear().weight + product(changes[0]) + product(changes[1])).T + linear().bias
    torch.testing.assert_close(layer(x_bi), expected_bo)
    with all_folded({"layer": layer}):
        torch.testing.assert_close(layer(x_bi), expected_bo)
    layer.finish("a")
    torch.testing.assert_close(layer(x_bi), expected_bo)
    assert list(layer.live) == ["b"]
    layer.finish("b")
    torch.testing.assert_close(layer(x_bi), expected_bo)
    assert list(layer.finished) == ["a", "b"]


def test_a_branch_on_some_rows_changes_no_other():
    layer, x_bi = AdaptedLinear(linear()), noise((7, 5), "x")
    before_bo = layer(x_bi)
    layer.add("k", low_rank("k", o=2), OutputRange(2, 4))
    branch = low_rank("k", o=2)
    expected_bo = before_bo.clone()
    expected_bo[:, 2:4] += x_bi @ product(branch).T
    torch.testing.assert_close(layer(x_bi), expected_bo)
    assert torch.equal(layer(x_bi)[:, [0, 1, 4, 5]], before_bo[:, [0, 1, 4, 5]])
    layer.finish("k")
    torch.testing.assert_close(layer(x_bi), expected_bo)
    assert torch.equal(layer.weight_oi[[0, 1, 4, 5]], linear().weight[[0, 1, 4, 5]])


def test_gradients_reach_what_is_trained_and_nothing_else():
    layer = AdaptedLinear(linear())
    layer.add("a", low_rank("a"))
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
    """As after a restart, where all are laid out row by row."""
    up_or, down_ri = noise((7, 48), "u").T, noise((32, 7), "d").T
    weights = []
    for laid_out in (lambda factor: factor, lambda factor: factor.contiguous()):
        layer = AdaptedLinear(linear(48, 32))
        branch = LowRank(trained={"up": laid_out(up_or)}, frozen={"down": laid_out(down_ri)})
        assert all(factor.is_contiguous() for factor in branch.factors())
        layer.add("a", branch)
        layer.finish("a")
        weights.append(layer.weight_oi)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("up", "down", "rows"),
    [((5, 2), (2, 5), None), ((6, 2), (2, 6), None), ((6, 2), (3, 5), None), ((6, 2), (2, 5), OutputRange(0, 3))],
    ids=["outputs", "inputs", "ranks", "rows"],
)
def test_wrong_shapes_are_refused(up: tuple, down: tuple, rows: OutputRange | None):
    layer = AdaptedLinear(linear())
    branch = LowRank(trained={"up": torch.zeros(up), "down": torch.zeros(down)})
    with pytest.raises(ValueError, match=r"branch 'a' maps \(\d, 2\) x \([23], \d\), the layer \(\d, 5\)"):
        layer.add("a", branch, rows)
    assert len(layer.live) == 0


def test_a_name_is_used_once():
    layer = AdaptedLinear(linear())
    layer.add("a", low_rank("a"))
    with pytest.raises(ValueError, match="'a' exists already"):
        layer.add("a", low_rank("a"))
    layer.finish("a")
    with pytest.raises(ValueError, match="'a' exists already"):
        layer.add("a", low_rank("a"))


def test_a_fresh_branch_is_loras_start():
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


def test_injection_replaces_a_linear_map_in_place():
    module = nn.Sequential(nn.ModuleDict({"inner": linear()}), nn.ReLU())
    adapted = inject(module, "0.inner")
    assert module[0]["inner"] is adapted
    with pytest.raises(TypeError, match=r"1 is a ReLU, only nn.Linear can be adapted"):
        inject(module, "1")
    with pytest.raises(TypeError, match=r"0.inner is a AdaptedLinear"):
        inject(module, "0.inner")


# ------------------------------------------------------------------------------------------------------- experts


def experts(
    count: int, rows: OutputRange | None = None, dtype: torch.dtype = torch.float32
) -> tuple[AdaptedLinear, Mixture]:
    layer = AdaptedLinear(linear(), dtype)
    rows = rows or OutputRange(0, 6)
    for k in range(count):
        layer.add(f"e{k}", low_rank(f"e{k}", o=rows.stop - rows.start), rows)
        layer.finish(f"e{k}", fold=False)
    kept = [layer.finished[f"e{k}"] for k in range(count)]
    ups_eor, downs_eri = torch.stack([k.up_or for k in kept]), torch.stack([k.down_ri for k in kept])
    return layer, Mixture(rows, ups_eor.to(dtype), downs_eri.to(dtype), torch.tensor([]))


def test_an_expert_is_idle_until_it_is_chosen_and_is_never_folded():
    layer, _ = experts(2)
    x_bti = noise((3, 4, 5), "x")
    assert torch.equal(layer(x_bti), linear()(x_bti))
    with all_folded({"layer": layer}):
        assert torch.equal(layer(x_bti), linear()(x_bti))


@pytest.mark.parametrize("rows", [OutputRange(0, 6), OutputRange(2, 5)], ids=["all rows", "some rows"])
@pytest.mark.parametrize("folded", [False, True])
def test_each_input_gets_the_expert_it_chose(rows: OutputRange, folded: bool):
    layer, mixture = experts(3, rows)
    x_bti, choice_b = noise((5, 4, 5), "x"), torch.tensor([2, -1, 0, 0, 1])
    layer.mixtures["k"] = mixture._replace(choice=choice_b)
    if folded:
        layer.fold_live()
    for x_ti, choice, y_to in zip(x_bti, choice_b.tolist(), layer(x_bti), strict=True):
        weight_oi = linear().weight.clone()
        if choice >= 0:
            weight_oi[rows.start : rows.stop] += product(low_rank(f"e{choice}", o=rows.stop - rows.start))
        torch.testing.assert_close(y_to, x_ti @ weight_oi.T + linear().bias)


@BOTH
def test_gains_weigh_the_experts_input_by_input(dtype: torch.dtype):
    layer, mixture = experts(3, dtype=dtype)
    x_bti, gains_be = noise((2, 4, 5), "x").to(dtype), torch.tensor([[0.5, 0.0, 2.0], [1.0, 1.0, -1.0]])
    layer.mixtures["k"] = mixture._replace(choice=lambda x: gains_be)
    for x_ti, gains_e, y_to in zip(x_bti, gains_be, layer(x_bti), strict=True):
        change_oi = sum(g * product(low_rank(f"e{k}")) for k, g in enumerate(gains_e))
        expected_to = x_ti.float() @ (linear().weight + change_oi).T + linear().bias
        torch.testing.assert_close(y_to.float(), expected_to, atol=1e-5 if dtype == torch.float32 else 0.2, rtol=2e-2)
        assert y_to.dtype == dtype


def test_gains_of_a_choice_of_one_are_ones_and_zeros():
    _, mixture = experts(3)
    chosen = mixture._replace(choice=torch.tensor([2, -1, 0]))
    assert chosen.gains(noise((3, 4, 5), "x")).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


def test_what_is_dropped_was_never_there():
    layer, x_bi = AdaptedLinear(linear()), noise((7, 5), "x")
    layer.add("a", low_rank("a"))
    layer.finish("a")
    layer.add("b", low_rank("b"))
    layer.drop("a")
    layer.drop("b")
    assert torch.equal(layer(x_bi), linear()(x_bi))
    layer.add("b", low_rank("b"))  # the name is free again
    with pytest.raises(KeyError):
        layer.drop("a")


def test_stripped_layers_are_those_of_the_pre_trained_model():
    layer, x_bi = AdaptedLinear(linear()), noise((7, 5), "x")
    layer.add("a", low_rank("a"))
    layer.finish("a")
    layer.add("b", low_rank("b"))
    y_bo = layer(x_bi)
    with stripped({"layer": layer}):
        assert torch.equal(layer(x_bi), linear()(x_bi))
    assert torch.equal(layer(x_bi), y_bo)


def test_stripping_while_folded_goes_back_to_folded():
    layer, x_bi = AdaptedLinear(linear()), noise((7, 5), "x")
    layer.add("a", low_rank("a"))
    with all_folded({"layer": layer}):
        folded_oi, y_bo = layer.weight_oi.clone(), layer(x_bi)
        with stripped({"layer": layer}):
            assert torch.equal(layer(x_bi), linear()(x_bi))
        assert torch.equal(layer.weight_oi, folded_oi)
        assert torch.equal(layer(x_bi), y_bo), "the live branch is not added twice"


# -- branches computed within the map, where a batch has many tokens


def trained_pair(key: str, o: int = 6, i: int = 5, rank: int = 2) -> LowRank:
    return LowRank(trained={"up": noise((o, rank), key, "up"), "down": noise((rank, i), key, "down")})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "cut", [(OutputRange(0, 6),), (OutputRange(2, 6),), (OutputRange(0, 6), OutputRange(1, 3), OutputRange(4, 6))]
)
@pytest.mark.parametrize(("thin", "way"), [(0, "Within"), (10, "View")])
def test_branches_within_the_map_are_those_beside_it(
    thin: int, way: str, cut: tuple[OutputRange, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adapters, "THIN", thin)

    def made() -> AdaptedLinear:
        layer = AdaptedLinear(linear(bias=bias))
        layer.add("before", low_rank("before"))
        layer.finish("before")
        for number, rows in enumerate(cut):
            layer.add(str(number), trained_pair(str(number), o=rows.stop - rows.start), rows)
        return layer

    def gradients(batches: Sequence[Tensor]) -> dict[str, Tensor | None]:
        layer, x_bti = made(), noise((4, 3, 5), "x").requires_grad_()
        y_bto = torch.cat([layer(x_bti[batch]) for batch in batches])
        (y_bto * noise((4, 3, 6), "towards")).sum().backward()
        return {"y": y_bto, "x": x_bti.grad} | {name: p.grad for name, p in layer.named_parameters()}

    def how(tokens: int) -> str:
        return type(made()(noise((tokens // 3, 3, 5), "x")).grad_fn).__name__

    assert way in how(12)
    assert "Beside" in how(3)
    within = gradients([torch.arange(4)])  # 12 tokens of width 5
    beside = gradients([torch.tensor([k]) for k in range(4)])  # 3 tokens
    assert len(within) == 2 + 2 * len(cut)
    for name, value in within.items():
        assert value is not None
        torch.testing.assert_close(value, beside[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [(OutputRange(0, 6),), (OutputRange(0, 6), OutputRange(1, 3), OutputRange(4, 6))])
def test_branches_beside_the_map_are_what_autograd_makes_of_the_formula(
    cut: tuple[OutputRange, ...], dtype: torch.dtype, multiple: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adapters, "_multiple", lambda x: multiple)
    layer = AdaptedLinear(linear(), dtype)
    for number, rows in enumerate(cut):
        layer.add(str(number), trained_pair(str(number), o=rows.stop - rows.start), rows)
    factors = dict(layer.named_parameters())

    def formula(x_bti: Tensor) -> Tensor:
        y_bto = F.linear(x_bti, layer.weight_oi.to(x_bti.dtype), layer.bias_o.to(x_bti.dtype))
        for number, rows in enumerate(cut):
            up_or, down_ri = (factors[f"live.{number}.{name}"].to(x_bti.dtype) for name in ("up", "down"))
            y_bto = y_bto + F.pad(x_bti @ down_ri.T @ up_or.T, (rows.start, 6 - rows.stop))
        return y_bto

    def gradients(compute: Callable[[Tensor], Tensor], kind: torch.dtype) -> list[Tensor]:
        x_bti = noise((1, 3, 5), "x").to(dtype).to(kind).requires_grad_()
        y_bto = compute(x_bti)
        (y_bto * noise((1, 3, 6), "towards").to(kind)).sum().backward()
        found = [y_bto.detach().double(), x_bti.grad.double(), *(p.grad.double() for p in factors.values())]
        for parameter in factors.values():
            parameter.grad = None
        return found

    assert "Beside" in type(layer(noise((1, 3, 5), "x").to(dtype)).grad_fn).__name__
    for ours, wanted in zip(gradients(layer, dtype), gradients(formula, torch.float64), strict=True):
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        assert (ours - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("tokens", [9, 3], ids=["within", "beside"])
def test_what_is_not_learnt_gets_no_gradient_and_keeps_no_input(tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapters, "THIN", 0)

    def kept(branch: LowRank) -> list[tuple[int, ...]]:
        layer, shapes = AdaptedLinear(linear()), list[tuple[int, ...]]()
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

    assert (tokens, 5) not in kept(low_rank("its down is frozen"))
    assert (tokens, 5) in kept(trained_pair("both are learnt"))


@pytest.mark.parametrize("thin", [0, 10])
def test_half_precision_learns_with_the_very_weights_that_it_answers_with(thin: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapters, "THIN", thin)
    layer, x_bi = AdaptedLinear(linear(), torch.bfloat16), noise((9, 5), "x").bfloat16()
    layer.add("now", trained_pair("now"))
    learning_bo = layer(x_bi)
    with all_folded({"layer": layer}):
        assert torch.equal(layer(x_bi), learning_bo)
    (learning_bo * noise((9, 6), "towards")).sum().backward()
    exact = trained_pair("now")
    (x_bi.float() @ (exact.up @ exact.down).T * noise((9, 6), "towards")).sum().backward()
    for name, parameter in exact.named_parameters():
        got = layer.get_parameter(f"live.now.{name}").grad
        torch.testing.assert_close(got, parameter.grad, rtol=0.05, atol=0.05)


def test_beside_a_map_half_precision_keeps_changes_that_its_weights_could_not_hold():
    layer = AdaptedLinear(linear(bias=False), torch.bfloat16)
    layer.weight_oi = torch.ones(6, 5, dtype=torch.bfloat16)
    x_bi = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.bfloat16).repeat(3, 1)
    layer.add("now", LowRank(trained={"up": torch.full((6, 1), 1e-3), "down": x_bi[:1].float()}))
    torch.testing.assert_close(layer(x_bi), torch.full((3, 6), 4e-3, dtype=torch.bfloat16))


def test_folding_within_folding_ends_with_the_outer_one():
    layer = AdaptedLinear(linear())
    layer.add("live", low_rank("live"))
    before_oi = layer.weight_oi.clone()
    with all_folded({"layer": layer}):
        folded_oi = layer.weight_oi.clone()
        with all_folded({"layer": layer}):
            assert torch.equal(layer.weight_oi, folded_oi)
        assert torch.equal(layer.weight_oi, folded_oi)
    assert torch.equal(layer.weight_oi, before_oi)
    assert not torch.equal(folded_oi, before_oi)
