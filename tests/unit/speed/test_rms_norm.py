"""RMSNorm in few passes is that of transformers in value and gradient, for norms with Llama's code, until it is undone."""

import copy
from typing import Any

import pytest
import torch
from tests.tiny import noise
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lamina.speed.rms_norm import lean_norms


def norm(kind: Any, dtype: torch.dtype) -> Any:
    made = kind(48, eps=1e-3).to(dtype).requires_grad_(False)
    made.weight.copy_(1 + noise((48,), "weight"))
    return made


def value_and_gradient(module: nn.Module, dtype: torch.dtype, scale: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    x_btd = (scale * noise((2, 5, 48), "x")).to(dtype).requires_grad_()
    y_btd = module(x_btd)
    return y_btd, torch.autograd.grad(y_btd, x_btd, noise((2, 5, 48), "gradient").to(dtype))[0]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_values_and_gradients_are_those_of_transformers(kind: Any, dtype: torch.dtype, near: float) -> None:
    module = nn.Sequential(norm(kind, dtype))
    plain = value_and_gradient(module, dtype)
    undo = lean_norms(module)
    found = value_and_gradient(module, dtype)
    assert "_RmsNorm" in type(found[0].grad_fn).__name__
    for own, wanted in zip(found, plain, strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own, wanted, rtol=near, atol=near * float(wanted.detach().abs().max()))
    undo()
    assert "forward" not in vars(module[0])
    assert torch.equal(value_and_gradient(module, dtype)[0], plain[0])


def test_bf16_is_as_near_to_float32_as_transformers_is() -> None:
    exact = value_and_gradient(norm(LlamaRMSNorm, torch.float32), torch.float32)
    module = norm(LlamaRMSNorm, torch.bfloat16)
    plain = value_and_gradient(module, torch.bfloat16)
    lean_norms(module)
    found = value_and_gradient(module, torch.bfloat16)
    for own, other, wanted in zip(found, plain, exact, strict=True):
        assert (own.float() - wanted).norm() <= 1.5 * (other.float() - wanted).norm()


@pytest.mark.parametrize("kind", [Gemma3RMSNorm, Olmo2RMSNorm, nn.RMSNorm])
def test_norms_that_compute_something_else_stay(kind: Any) -> None:
    module = norm(kind, torch.bfloat16)
    lean_norms(module)
    assert "forward" not in vars(module)


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    module = norm(LlamaRMSNorm, torch.float32)
    twin = copy.deepcopy(module)
    lean_norms(module)
    for one in (module, twin):
        one.weight.requires_grad_()
        one(noise((2, 5, 48), "x")).sum().backward()
    assert torch.equal(module.weight.grad, twin.weight.grad)
