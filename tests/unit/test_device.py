"""Where to compute: as told, or where there is a card; and the pretended card of the tests, which must refuse what a real
one refuses."""

import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tests.pretend import OnCard, pretended_card
from tests.tiny import noise
from torch import Tensor

from lamina.config import RunConfig, fingerprint
from lamina.engine import device
from lamina.errors import ConfigError
from lamina.methods.inflora import InfLoRAConfig
from lamina.speed import memory, precision
from lamina.types import Batch


@pytest.mark.parametrize(("card", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_card_where_there_is_one(card: bool, chosen: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    assert device.resolve("auto") == chosen
    assert device.resolve("cpu") == "cpu"


def test_a_card_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"device = 'cuda': PyTorch finds no CUDA device here .* Allowed are auto and cpu"
    ):
        device.resolve("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.resolve("cuda") == "cuda"


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_on_a_card_is_a_matter_of_its_generation(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "bf16_speedup", lambda _: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert precision.resolve("auto", 64, "cuda") == chosen
    assert precision.resolve("fp32", 64, "cuda") == "fp32"


def test_on_the_processor_there_is_nothing_to_name_or_prepare():
    before = torch.backends.cudnn.allow_tf32
    device.prepare("cpu")
    assert torch.backends.cudnn.allow_tf32 == before
    assert device.gpu_name("cpu") is device.peak_memory_mb("cpu") is None


def test_a_run_that_says_nothing_of_the_device_is_the_run_it_was():
    plain, told = RunConfig(), RunConfig(device="cuda")
    assert fingerprint(plain, InfLoRAConfig) == fingerprint(RunConfig(device="auto"), InfLoRAConfig)
    assert fingerprint(plain, InfLoRAConfig) != fingerprint(told, InfLoRAConfig)


def test_a_batch_goes_to_the_card_whole():
    batch = Batch(inputs={"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}, labels_b=torch.ones(2))
    with pretended_card():
        moved = batch.to(torch.device("cuda"))
    assert all(isinstance(value, OnCard) for value in (*moved.inputs.values(), moved.labels_b))
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
def test_the_pretended_card_refuses_what_a_card_refuses(case: str):
    with pretended_card():
        there, here = noise((3, 3), "there").to("cuda"), noise((3, 3), "here")
        with pytest.raises((RuntimeError, TypeError), match=r"processor|numpy"):
            MIXED[case](there, here)


def test_the_pretended_card_allows_what_a_card_allows():
    with pretended_card():
        here, made = noise((3, 3), "x"), torch.zeros(3, 3, device="cuda")
        there = here.to("cuda")
        made[0] = here[0]
        made[1:].copy_(here[1:])
        assert isinstance(made, OnCard)
        assert torch.equal(made, there)
        assert isinstance(there[torch.tensor([0, 1])] * here.sum(), OnCard)
        assert type(there.cpu()) is Tensor
        assert there.cpu().data_ptr() != there.data_ptr()
        assert isinstance(torch.nn.Linear(3, 3).to("cuda")(there), OnCard)


FAULTS = """
import resource, sys
from contextlib import nullcontext

import torch

from lamina.speed import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(n * 100_000) for n in (1, 5, 20, 100)]
    del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
with memory.keeping_memory() if sys.argv[1] == "kept" else nullcontext():
    [faults() for _ in range(6)]
    print(sum(faults() for _ in range(4)))
held = torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with memory.keeping_memory():
    del held
held = torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is freed is kept by a call of glibc's")
def test_freed_memory_is_kept_while_asked_for_and_then_goes_back():
    """Counted in pages of 4096 bytes that the system had to find: 10,000,000 numbers lie in 9,766 of them."""
    left, kept = faults("left"), faults("kept")
    assert left[0] > 4 * 9000
    assert kept[0] < 100
    assert min(left[1], kept[1]) > 9000


def test_without_glibc_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_of_libc", lambda _: None)
    with memory.keeping_memory():
        assert torch.ones(2).sum() == 2


def test_a_function_that_the_c_library_has_not_is_none():
    assert memory._of_libc("lamina_has_no_such_function") is None
