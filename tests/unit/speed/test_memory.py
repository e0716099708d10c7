"""Freed memory stays with the process while `keeping_memory` is open."""

import platform
import subprocess
import sys

import pytest
import torch

from lamina.speed import keeping_memory, memory

FAULTS = """
import resource, sys
from contextlib import nullcontext

import torch

from lamina.speed import keeping_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(n * 100_000) for n in (1, 5, 20, 100)]
    del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
with keeping_memory() if sys.argv[1] == "kept" else nullcontext():
    [faults() for _ in range(6)]
    print(sum(faults() for _ in range(4)))
held = torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with keeping_memory():
    del held
held = torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept by a function of glibc")
def test_freed_memory_is_kept_within_the_context_and_returned_at_its_end():
    """In pages of 4096 bytes that the system had to map: 10,000,000 numbers take 9,766 of them."""
    left, kept = faults("left"), faults("kept")
    assert left[0] > 4 * 9000
    assert kept[0] < 100
    assert min(left[1], kept[1]) > 9000


def test_without_glibc_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_of_libc", lambda _: None)
    with keeping_memory():
        assert torch.ones(2).sum() == 2


def test_a_function_that_the_c_library_lacks_is_none():
    assert memory._of_libc("lamina_has_no_such_function") is None
