"""World: the processes that make one run together, as `torchrun` starts them. A run of one process is the plain case.

Every process holds the whole learner and does the same steps in the same order. What they share is said in
`lamina.speed.share_batch`; here are the few things that they must agree on.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from lamina.errors import RunError


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def any(self, here: bool) -> bool:
        """Returns whether it is so in any process. All must call it."""
        if self.size == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def wait(self) -> None:
        """Returns once all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def first_text(self, text: str) -> str:
        """Returns the text of the first process."""
        if self.size == 1:
            return text
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor(len(content))
        dist.broadcast(length, 0)
        content = content if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def check_same(self, mark: str, what: str) -> None:
        """Raises RunError in all processes where this mark differs between them."""
        if self.any(self.first_text(mark) != mark):
            raise RunError(
                f"{what} differs between the processes of this run. Use CPUs or GPUs of one kind, and one version of PyTorch."
            )

    def summed(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns the sums over all processes, in one exchange. None stays None, in all processes alike."""
        there = [tensor for tensor in tensors if tensor is not None]
        if self.size == 1 or not there:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in there])
        dist.all_reduce(flat)
        parts = iter(torch.split(flat, [tensor.numel() for tensor in there]))
        return [None if tensor is None else next(parts).view_as(tensor) for tensor in tensors]

    def gathered(self, own: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the rows of all processes, in their order. rows: how many each has."""
        most = max(rows)
        padded = own.new_zeros(most, *own.shape[1:], dtype=torch.float32)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(found, padded)
        return torch.cat([part[:count] for part, count in zip(found, rows, strict=True)]).to(own.dtype)


ALONE = World()
_NAME = "lamina/group"


def join() -> World:
    """Returns the world that `torchrun` says this process belongs to, after meeting the others; the world of one process where
    it was started otherwise."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return ALONE
    if not dist.is_initialized():
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _meet("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


def _meet(backend: str) -> None:
    """Begins the process group under a name that is new each time. `torchrun` keeps its store when it starts processes again
    after a loss. Under PyTorch's own name they may find the addresses of those that are gone, and wait for them."""
    store, rank, size = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
    if rank == 0:
        store.set(_NAME, uuid4().hex)
    name = store.get(_NAME).decode()  # waits for the first process
    own_store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own_store, rank=rank, world_size=size)
    dist.barrier()
    if rank == 0:
        store.delete_key(_NAME)


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
