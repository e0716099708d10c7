"""A pretended GPU, for machines without one: tensors that compute on the CPU, and say and behave as if they were elsewhere.
Mixing them with tensors of the CPU is refused as with a real GPU.

PyTorch's own fake tensors refuse the same but have no values, and methods look at values: at how many directions hold a
share of the energy, say. These have the values that the CPU computes, so that whole runs can be compared bit by bit.

Not covered: kernels that a GPU lacks, and tensors that are made and mixed within one function of PyTorch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda")
COPIES = (Tensor.copy_, Tensor.__setitem__)
"""What may read from another device than it writes to."""
WHOLE = (torch.cat, torch.stack)
"""What does not take a single number on the CPU either."""
OFF = (Tensor.numpy, Tensor.__array__)


class OnGpu(Tensor):
    """A tensor on the pretended GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in OFF:
            raise TypeError("can't convert a tensor on the pretended GPU to numpy")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{func.__name__}: a generator of the CPU cannot draw on the pretended GPU")
        _refuse_mixed(func, args, kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if func == Tensor.grad.__get__ and result is not None:
            return result.as_subclass(cls)
        return result


def _refuse_mixed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if func in COPIES or (func is Tensor.__getitem__ and isinstance(args[0], OnGpu)):
        return  # the index of a tensor on the GPU may be on the CPU
    strangers = [
        tuple(found.shape)
        for found in _tensors((args, kwargs))
        if not isinstance(found, OnGpu) and (found.ndim or func in WHOLE)
    ]
    if strangers:
        raise RuntimeError(f"{func.__name__}: tensors on the pretended GPU and on the CPU (shapes {strangers})")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Gpu(TorchFunctionMode):
    """Makes tensors on the pretended GPU where `device` asks for it, and moves them to and from it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            return args[0]
        if func is torch._has_compatible_shallow_copy_type:  # a module that is moved gets new parameters
            return type(args[0].data) is type(args[1].data)
        if func is Tensor.cpu:
            return _moved(args[0], torch.device("cpu"))
        if func is Tensor.to:
            given = [*args[1:], kwargs.get("device"), kwargs.get("dtype")]
            where = [torch.device(part) for part in given if _is_device(part)]
            if not where:
                return func(*args, **kwargs)
            dtype = next((part for part in given if isinstance(part, torch.dtype)), args[0].dtype)
            return _moved(func(args[0], dtype, copy=kwargs.get("copy", False)), where[0])
        if not _is_device(kwargs.get("device")):
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"device": "cpu"})
        if torch.device(kwargs["device"]).type == "cpu":
            return made
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{func.__name__}: a generator of the CPU cannot draw on the pretended GPU")
        return made.as_subclass(OnGpu)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device | str)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the other device; the same tensor where it is there already."""
    if isinstance(value, OnGpu) == (device.type == "cuda"):
        return value
    return value.clone().as_subclass(OnGpu if device.type == "cuda" else Tensor)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within the context `cuda` is a device, for this thread."""
    with _Gpu():
        yield
