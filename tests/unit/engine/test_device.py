"""The device: as asked for, or a GPU if there is one. And the pretended GPU of the tests, which must refuse what a real one
refuses."""

from collections.abc import Callable

import pytest
import torch
from tests.pretend import OnGpu, pretended_gpu
from tests.tiny import noise
from torch import Tensor

from lamina.config import RunConfig, fingerprint
from lamina.engine import device
from lamina.errors import ConfigError
from lamina.methods.inflora import InfLoRAConfig
from lamina.types import Batch


@pytest.mark.parametrize(("gpu", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_if_there_is_one(gpu: bool, chosen: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert device.resolve("auto") == chosen
    assert device.resolve("cpu") == "cpu"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"device = 'cuda': PyTorch finds no CUDA device here .* Allowed are auto and cpu, and cuda"
    ):
        device.resolve("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.resolve("cuda") == "cuda"


def test_on_a_cpu_there_is_nothing_to_name_or_prepare():
    before = torch.backends.cudnn.allow_tf32
    device.prepare("cpu")
    assert torch.backends.cudnn.allow_tf32 == before
    assert device.gpu_name("cpu") is device.peak_memory_mb("cpu") is None


def test_the_fingerprint_of_a_run_without_a_device_is_that_of_auto():
    plain, on_gpu = RunConfig(), RunConfig(device="cuda")
    assert fingerprint(plain, InfLoRAConfig) == fingerprint(RunConfig(device="auto"), InfLoRAConfig)
    assert fingerprint(plain, InfLoRAConfig) != fingerprint(on_gpu, InfLoRAConfig)


def test_all_of_a_batch_goes_to_the_gpu():
    batch = Batch(inputs={"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}, labels_b=torch.ones(2))
    with pretended_gpu():
        moved = batch.to(torch.device("cuda"))
    assert all(isinstance(value, OnGpu) for value in (*moved.inputs.values(), moved.labels_b))
    assert batch.to(torch.device("cpu")).labels_b is batch.labels_b


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda there, here: there + here,
    "product": lambda there, here: here @ there,
    "index of a tensor here": lambda there, here: here[there.argmax(0)],
    "list": lambda there, here: torch.stack([there, here]),
    "a number in a list": lambda there, here: torch.stack([there.sum(), here.sum()]),
    "layer": lambda there, here: torch.nn.Linear(3, 3)(there),
    "numpy": lambda there, _: there.numpy(),
    "draw": lambda there, _: there.normal_(generator=torch.Generator()),
    "make and draw": lambda *_: torch.randn(3, generator=torch.Generator(), device="cuda"),
    "gradient": lambda there, here: there.requires_grad_().sum().backward() or there.grad + here,
}


@pytest.mark.parametrize("case", sorted(MIXED))
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(case: str):
    with pretended_gpu():
        there, here = noise((3, 3), "there").to("cuda"), noise((3, 3), "here")
        with pytest.raises((RuntimeError, TypeError), match=r"CPU|numpy"):
            MIXED[case](there, here)


def test_the_pretended_gpu_allows_what_a_gpu_allows():
    with pretended_gpu():
        here, made = noise((3, 3), "x"), torch.zeros(3, 3, device="cuda")
        there = here.to("cuda")
        made[0] = here[0]
        made[1:].copy_(here[1:])
        assert isinstance(made, OnGpu)
        assert torch.equal(made, there)
        assert isinstance(there[torch.tensor([0, 1])] * here.sum(), OnGpu)
        assert type(there.cpu()) is Tensor
        assert there.cpu().data_ptr() != there.data_ptr()
        assert isinstance(torch.nn.Linear(3, 3).to("cuda")(there), OnGpu)
