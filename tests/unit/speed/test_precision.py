"""The precision of the frozen weights: as asked for, or as measured."""

import pytest
import torch

from lamina.speed import precision


@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
def test_a_precision_that_is_asked_for_is_not_measured(wanted: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "bf16_speedup", lambda _: pytest.fail("measured"))
    assert precision.resolve(wanted, 64) == wanted


@pytest.mark.parametrize(
    ("ratio", "chosen"), [(0.5, "fp32"), (1.0, "fp32"), (1.19, "fp32"), (1.2, "bf16"), (4.0, "bf16")]
)
def test_auto_takes_bf16_only_where_it_is_clearly_faster(ratio: float, chosen: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "bf16_speedup", lambda _: ratio)
    assert precision.resolve("auto", 64) == chosen


def test_the_measurement_is_a_ratio_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    assert precision.bf16_speedup(16, tokens=8, repeats=1) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert {"fp32": torch.float32, "bf16": torch.bfloat16} == precision.DTYPES


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_on_a_gpu_auto_is_a_matter_of_its_generation(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "bf16_speedup", lambda _: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert precision.resolve("auto", 64, "cuda") == chosen
    assert precision.resolve("fp32", 64, "cuda") == "fp32"
