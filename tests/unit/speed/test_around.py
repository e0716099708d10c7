"""accelerate: what it puts around a learner, that all of it can be undone, and how it makes batches and gradients."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.tiny import noise, tiny_bert, tiny_fused_vit, tiny_vit
from torch import nn

from lamina.adapters import LowRank
from lamina.backbones import Backbone
from lamina.engine.steps import Planned, Steps
from lamina.learner import Learner
from lamina.speed import accelerate
from lamina.speed.composed_weight import ComposedLinear
from lamina.speed.cuda_graph import GraphedGradients
from lamina.speed.instance import replace
from lamina.types import Batch

MAKERS = {"vit": tiny_vit, "fused_vit": tiny_fused_vit, "bert": tiny_bert}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def own_attributes(backbone: Backbone) -> dict[str, list[str]]:
    """Returns the names of what instances hold beside their class, of the backbone and of every module."""
    modules = {path: sorted(vars(module)) for path, module in backbone.module.named_modules()}
    return modules | {"backbone": sorted(f"{name} {id(value)}" for name, value in vars(backbone).items())}


def attention(backbone: Backbone) -> str | None:
    return getattr(getattr(backbone.module, "config", None), "_attn_implementation", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_closing_undoes_everything(kind: str, dtype: torch.dtype):
    learner = Learner(MAKERS[kind](), ("k", "v"), dtype=dtype)
    before, implementation = own_attributes(learner.backbone), attention(learner.backbone)
    accelerated = accelerate(learner)
    assert all(type(layer.with_live) is ComposedLinear for layer in learner.layers.values())
    assert own_attributes(learner.backbone) != before
    accelerated.close()
    accelerated.close()
    assert own_attributes(learner.backbone) == before
    assert attention(learner.backbone) == implementation
    accelerate(learner).close()


def test_a_learner_is_accelerated_once_at_a_time():
    learner = Learner(tiny_vit())
    accelerated = accelerate(learner)
    with pytest.raises(ValueError, match="accelerated already: close"):
        accelerate(learner)
    accelerated.close()
    accelerate(learner).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_copy_of_an_accelerated_module_computes_with_its_own_weights(dtype: torch.dtype):
    learner = Learner(tiny_vit(), ("k", "v"), dtype=dtype)
    accelerated = accelerate(learner)
    pixels_bchw = noise((2, 3, 16, 16), "pixels").to(dtype)
    twin = copy.deepcopy(learner.backbone.module)
    before, same = (module(pixels_bchw).last_hidden_state for module in (learner.backbone.module, twin))
    assert torch.equal(before, same)
    for name, site in learner.sites.items():
        factors = {"up": noise((site.d_out, 2), name), "down": noise((2, site.d_in), name, "down")}
        site.add("new", LowRank(trained=factors))
    assert not torch.equal(learner.backbone.module(pixels_bchw).last_hidden_state, before)
    assert torch.equal(twin(pixels_bchw).last_hidden_state, before)
    accelerated.close()


def test_a_replaced_attribute_comes_back_or_goes():
    module = nn.Linear(2, 2)
    module.note = "before"
    undo = [replace(module, "note", "now"), replace(module, "forward", lambda x: x)]
    assert (module.note, float(module(torch.ones(1)))) == ("now", 1.0)
    for one in undo:
        one()
    assert module.note == "before"
    assert "forward" not in vars(module)


def stands_for_gpu(learner: Learner) -> Learner:
    learner.device = torch.device("cuda")
    return learner


def ways(learner: Learner, full_batches: int = 50) -> tuple[Steps, Any, Any]:
    """Returns how batches and gradients are made for this learner, and the steps."""
    steps = accelerate(learner)
    batch = Batch(inputs={"pixel_values": noise((1, 3), "x")}, labels_b=torch.zeros(1).long())
    batches = steps.batches(lambda: batch for _ in range(3))
    gradients = steps.gradients(lambda batch: batch.inputs["pixel_values"].sum(), [], Planned(4, full_batches, print))
    return steps, batches, gradients


def test_on_a_gpu_batches_are_prefetched_and_steps_recorded():
    steps, batches, gradients = ways(stands_for_gpu(Learner(tiny_vit())))
    assert batches.__name__ == "prefetched"
    assert len(list(batches)) == 3
    assert isinstance(gradients, GraphedGradients)
    assert gradients.recorded == 4
    assert not isinstance(ways(stands_for_gpu(Learner(tiny_vit())), full_batches=49)[2], GraphedGradients)
    steps.close()


def test_on_a_cpu_batches_and_gradients_are_plain():
    steps, batches, gradients = ways(Learner(tiny_vit()))
    assert batches.__name__ == "batches"
    assert len(list(batches)) == 3
    assert not isinstance(gradients, GraphedGradients)
    steps.close()


def test_on_a_gpu_blocks_and_attention_stay_as_they_are():
    learner = stands_for_gpu(Learner(tiny_vit(), dtype=torch.bfloat16))
    steps = accelerate(learner)
    assert attention(learner.backbone) == "sdpa"
    assert not any("forward" in vars(module) for module in learner.backbone.module.modules())
    steps.close()
