"""Reuse: hidden states below the first adapted block, computed once for each example and kept on disk.

What frozen blocks below every adapter make of an example depends on the example (and its augmentation) alone, so later
epochs, passes and evaluations can read it. A product of matrices may have other last bits in a batch of another size.
Therefore hidden states are always computed in chunks of one size, filled up where examples are missing, whether there is
room to keep them or not: what is kept decides how long a run takes, and no bit of its result.

Shape letters: b batch, c the examples of a chunk, t tokens, n tokens of one example, d width.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.backbones import Backbone
from lamina.errors import ConfigError
from lamina.types import Batch, Ints

CHUNK = {"image": 16, "text": 4}
"""Examples computed at a time. Of texts few, because only those of one length are computed together: padding, and whether
there is any in a batch, can change last bits too. And by one thread: several would share out the rows of so small a product
unevenly, and its last bits would depend on where in the chunk a text stands."""

_Key = tuple[int, int | None]
"""Row of the table, and view."""


class Reuse:
    """Of one backbone in this precision, from this block on, for examples of one table. views: how many augmentations come
    again.

    At most `megabytes` (10^6 bytes) lie in a file without a name in `folder`, made when it is first needed: the system
    frees it when it is closed or the process ends, however it ends. When it is full, or the disk is, what is not there is
    computed each time. Raises ConfigError where there is nothing below the block, or the backbone does not say what is.
    """

    def __init__(
        self,
        backbone: Backbone,
        block: int,
        dtype: torch.dtype,
        folder: Path,
        megabytes: int,
        views: int | None = None,
    ) -> None:
        if not backbone.stages:
            raise ConfigError(
                f"backbone.reuse_mb = {megabytes}: backbone {backbone.name!r} does not say what it computes block by block. "
                f"Leave it at 0, or give the paths of its embeddings and blocks to from_module() as `stages`."
            )
        if block == 0:
            raise ConfigError(
                f"backbone.reuse_mb = {megabytes}: there are adapters in block 0, and nothing below it to reuse. Leave it at "
                f"0, or adapt later blocks only, for example with backbone.blocks = [{backbone.blocks - 1}]."
            )
        self.backbone, self.block, self.dtype, self.views = backbone, block, dtype, views or 0
        self.folder, self.room = folder, megabytes * 10**6
        self._file: Any = None
        self._end = 0
        """Bytes of the file that were ever in use."""
        self._places: dict[_Key, tuple[int, int]] = {}
        """Where an example begins in the file, and how many tokens it has."""
        self._gaps: defaultdict[int, list[int]] = defaultdict(list)
        """Where there is room again, by the tokens that fit."""

    def covers(self, batch: Batch) -> bool:
        """Whether these inputs come again. It depends on the batch alone, never on what is kept."""
        return batch.rows_b is not None and (batch.view is None or 0 <= batch.view < self.views)

    def features(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features (b, d) of a batch that is covered. inputs: its own, in the precision of the backbone."""
        return self.backbone.above(self.hidden(batch, inputs), inputs, self.block)

    def hidden(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the block gets, (b, t, d), on the device of the batch. Where a text is padded, zeros."""
        assert batch.rows_b is not None
        keys: list[_Key] = [(row, batch.view) for row in batch.rows_b.tolist()]
        missing = np.array([i for i, key in enumerate(keys) if key not in self._places], np.int64)
        computed = self._computed(inputs, missing)
        counts_b = [len(computed[i]) if i in computed else self._places[key][1] for i, key in enumerate(keys)]
        tokens = inputs["input_ids"].shape[1] if self.backbone.kind == "text" else max(counts_b, default=0)
        # Fresh memory: the last bits of a product depend on where its factors begin.
        hidden_btd = torch.zeros(len(keys), tokens, self.backbone.width, dtype=self.dtype)
        for i, key in enumerate(keys):
            if i not in computed:
                self._read(key, hidden_btd[i])
        hidden_btd = hidden_btd.to(batch.labels_b.device)
        for i, hidden_nd in computed.items():
            hidden_btd[i, : len(hidden_nd)] = hidden_nd
            self._keep(keys[i], hidden_nd)
        return hidden_btd

    def free(self, rows: Ints) -> None:
        """Forget these rows, which do not come again, so that others have their room."""
        gone = set(rows.tolist())
        for key in [key for key in self._places if key[0] in gone]:
            start, count = self._places.pop(key)
            self._gaps[count].append(start)

    def close(self) -> None:
        """Give the file back to the system; nothing is kept from then on."""
        self._places.clear()
        self._gaps.clear()
        self.room = 0
        if self._file is not None:
            self._file.close()

    # -- parts --------------------------------------------------------------------------------------------------------

    def _computed(self, inputs: Mapping[str, Tensor], missing: Ints) -> dict[int, Tensor]:
        """Hidden states (n, d) of the examples at these positions of a batch."""
        found: dict[int, Tensor] = {}
        size, device = CHUNK[self.backbone.kind], next(iter(inputs.values())).device
        alike: list[tuple[Ints, Mapping[str, Tensor]]] = [(missing, inputs)]
        if self.backbone.kind == "text":
            counts_b = inputs["attention_mask"].sum(1).clamp(min=1).cpu().numpy()
            alike = [
                (missing[counts_b[missing] == n], {name: value_bt[:, :n] for name, value_bt in inputs.items()})
                for n in np.unique(counts_b[missing])
            ]
        for positions, whole in alike:
            for start in range(0, len(positions), size):
                chunk = positions[start : start + size]
                # Filled up by going round: neighbours matter to nothing but the size.
                index_c = torch.from_numpy(np.resize(chunk, size)).to(device)
                with torch.no_grad(), _one_thread() if self.backbone.kind == "text" else nullcontext():
                    hidden_cnd = self.backbone.below({name: v[index_c] for name, v in whole.items()}, self.block)
                found |= dict(zip(chunk.tolist(), hidden_cnd, strict=False))
        return found

    def _keep(self, key: _Key, hidden_nd: Tensor) -> None:
        """Write it where there is room, if there is any."""
        bytes_ = _bytes(hidden_nd.cpu().contiguous())
        gaps = self._gaps[len(hidden_nd)]
        if key in self._places or (not gaps and self._end + bytes_.nbytes > self.room):
            return
        start = gaps.pop() if gaps else self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 - closed by `close`
            self._file.seek(start)
            if self._file.write(bytes_) < bytes_.nbytes:
                raise OSError("the disk is full")
        except OSError:
            self.close()  # what the run has to save needs the disk more
            return
        self._end = max(self._end, start + bytes_.nbytes)
        self._places[key] = (start, len(hidden_nd))

    def _read(self, key: _Key, hidden_td: Tensor) -> None:
        """Read it into the first rows of this."""
        start, count = self._places[key]
        bytes_ = _bytes(hidden_td[:count])
        self._file.seek(start)
        if self._file.readinto(bytes_) != bytes_.nbytes:
            raise OSError(f"what was kept for reuse in {self.folder} cannot be read back")


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the processor, not copied."""
    return values.reshape(-1).view(torch.uint8).numpy().data
