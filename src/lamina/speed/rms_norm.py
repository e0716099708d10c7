"""RMSNorm in few passes, for bf16 backbones on a CPU.

    n = x / sqrt(mean(x^2) + eps)    in float32, rounded to the precision of x
    y = w n

transformers computes it in nine operations, which autograd differentiates one by one, and keeps x in float32.

Shape letters: b batch, t tokens, d width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lamina.speed.instance import replace


def lean_norms(module: nn.Module) -> Callable[[], None]:
    """Let every RMSNorm of a transformers model that computes what Llama's does compute it in one function. Other norms stay as
    they are. Returns a function that undoes it."""
    undo = [replace(norm, "forward", partial(_forward, norm)) for norm in module.modules() if _is_llamas(norm)]

    def all_of_them() -> None:
        for one in undo:
            one()

    return all_of_them


def _is_llamas(norm: nn.Module) -> bool:
    """Returns whether a norm runs the same code as Llama's: transformers copies it from family to family."""
    if not type(norm).__name__.endswith("RMSNorm") or not type(norm).__module__.startswith("transformers."):
        return False
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    own, wanted = (kind.forward.__code__ for kind in (type(norm), LlamaRMSNorm))
    return (own.co_code, own.co_names, own.co_consts[1:]) == (wanted.co_code, wanted.co_names, wanted.co_consts[1:])


def _forward(norm: Any, hidden_states: Tensor) -> Tensor:
    if norm.weight.requires_grad:
        plain: Tensor = type(norm).forward(norm, hidden_states)
        return plain
    y_btd: Tensor = _RmsNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return y_btd


class _RmsNorm(torch.autograd.Function):
    """Keeps n and 1 / sqrt(mean(x^2) + eps), and has no gradient for w."""

    @staticmethod
    def forward(ctx: Any, x_btd: Tensor, weight_d: Tensor, epsilon: float) -> Tensor:
        norm_bt1 = torch.linalg.vector_norm(x_btd, dim=-1, keepdim=True, dtype=torch.float32)
        factor_bt1 = norm_bt1.square_().div_(x_btd.shape[-1]).add_(epsilon).rsqrt_()
        normed_btd = x_btd.to(torch.float32, copy=True).mul_(factor_bt1).to(x_btd.dtype)
        ctx.save_for_backward(normed_btd, factor_bt1, weight_d)
        return weight_d * normed_btd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_btd: Tensor) -> tuple[Tensor | None, ...]:
        normed_btd, factor_bt1, weight_d = ctx.saved_tensors
        grad_n_btd = grad_btd * weight_d
        mean_bt1 = torch.linalg.vecdot(grad_n_btd, normed_btd).float().unsqueeze(-1).div_(-normed_btd.shape[-1])
        found_btd = torch.addcmul(grad_n_btd.float(), normed_btd.float(), mean_bt1).mul_(factor_bt1)
        return found_btd.to(grad_btd.dtype), None, None
