"""The precision of the frozen weights. Adapters, head and optimiser are always float32."""

import time
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.engine.device import Device

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORTH_IT = 1.2
"""bf16 must be this much faster before its coarser numbers are accepted."""


def resolve(wanted: Literal["auto", "fp32", "bf16"], width: int, device: Device = "cpu") -> Precision:
    """Returns bf16 for `auto` where this CPU runs a frozen linear layer of this width clearly faster with it, and on GPUs
    of compute capability 8 or more (Ampere); otherwise fp32."""
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    return "bf16" if bf16_speedup(width) >= WORTH_IT else "fp32"


def bf16_speedup(width: int, tokens: int = 2048, repeats: int = 7) -> float:
    """Returns how many times faster forward and input-gradient backward of a (width, 4 width) layer are in bf16 than in
    fp32: the ratio of the best of interleaved repeats. Takes well under a second."""
    generator = torch.Generator().manual_seed(0)
    weight_oi, x_ti = (torch.randn(n, width, generator=generator) for n in (4 * width, tokens))
    best = {name: float("inf") for name in DTYPES}
    for _ in range(repeats):
        for name, dtype in DTYPES.items():
            best[name] = min(best[name], _seconds(weight_oi.to(dtype), x_ti.to(dtype)))
    return best["fp32"] / best["bf16"]


def _seconds(weight_oi: Tensor, x_ti: Tensor) -> float:
    x_ti = x_ti.clone().requires_grad_()
    start = time.perf_counter()
    y_to = F.linear(x_ti, weight_oi)
    torch.autograd.grad(y_to, x_ti, y_to.detach())
    return time.perf_counter() - start
