"""World: the processes that make one run together, as `torchrun` starts them. A run of one process is the plain case.

Every process holds the whole learner and does the same steps in the same order. What they share is said in
`lamina.speed.share_batch`; here are the few things that they must agree on.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
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


LOST = ("onnection", "Broken pipe", "NCCL", "ocket", "imed out")
"""In the messages of gloo and NCCL where a process is gone."""


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Raises RunError within the context where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        raise RunError(
            "another process of this run has ended: it was lost, or has said why. After a loss, torchrun starts all again as "
            "often as --max-restarts allows, and the run goes on from its last checkpoint. "
            f"(This process saw: {str(error).splitlines()[0][:200]})"
        ) from error


ALONE = World()
_OFFER = "lamina/group"
_PATIENCE = timedelta(hours=6)
"""How long processes wait for each other. The first one decodes the data while the others wait."""


def launched() -> bool:
    """Returns whether `torchrun`, or another launcher that sets its variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join() -> World:
    """Returns the world that the launcher says this process belongs to, after meeting the others; the world of one process
    where it was started otherwise."""
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    if not dist.is_initialized():
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if number >= there:
                raise RunError(
                    f"LOCAL_RANK = {number}, but this process sees GPUs 0 to {there - 1} only. Give torchrun "
                    f"--nproc-per-node={there}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on CPUs."
                )
            torch.cuda.set_device(number)
        with noticing_losses():
            _meet("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


def _meet(backend: str) -> None:
    """Begins the process group under a name that is new each time. `torchrun` keeps its store when it starts processes again
    after a loss. Under PyTorch's own name they may find the addresses of those that are gone, and wait for them.

    The first process offers a name, and says go once all others have taken it. It withdraws the offer first, so no offered name
    ever has a go: the others leave the offer of a lost process for the next one.
    """
    store, rank, size = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
    name = uuid4().hex if rank == 0 else ""
    if rank == 0:
        store.set(_OFFER, name)
        store.wait([f"{name}/taken by {other}" for other in range(1, size)], _PATIENCE)
        store.set(_OFFER, "")
        store.set(f"{name}/go", "")
    while not store.check([f"{name}/go"]):
        offered = store.get(_OFFER).decode()  # waits for the first process
        if offered not in ("", name):
            name = offered
            store.set(f"{name}/taken by {rank}", "")
        time.sleep(0.05)
    own_store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=_PATIENCE, store=own_store, rank=rank, world_size=size)


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
