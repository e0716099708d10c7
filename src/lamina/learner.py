"""Learner: backbone, adapted layers and head, the only object a method may touch.

Shape letters: b batch, t tokens, d width of the backbone, r rows of the head, o i outputs and inputs of a linear map,
e experts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina import adapters
from lamina.adapters import AdaptedLinear, Branch, Choice, Finished, Mixture, Rows
from lamina.backbones import Backbone, Site
from lamina.errors import ConfigError
from lamina.halves import SMALLEST, Halves
from lamina.head import Head, Row
from lamina.moments import Look, only_looks, recording
from lamina.reuse import Reuse
from lamina.types import Batch


@dataclass(frozen=True)
class Slot:
    """A place where a branch can go: one role (say, the keys) of one block."""

    site: Site
    layer: AdaptedLinear

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def group(self) -> str:
        """Slots of one group read the same input."""
        return self.site.group

    @property
    def rows(self) -> Rows:
        return Rows(*self.site.rows) if self.site.rows else Rows(0, self.layer.d_out)

    @property
    def device(self) -> torch.device:
        return self.layer.device

    @property
    def d_in(self) -> int:
        return self.layer.d_in

    @property
    def d_out(self) -> int:
        return self.rows.stop - self.rows.start

    def add(self, name: str, branch: Branch) -> None:
        self.layer.add(f"{self.site.role}:{name}", branch, self.rows)

    def live(self) -> dict[str, Branch]:
        prefix = f"{self.site.role}:"
        return {
            n[len(prefix) :]: b for n, b in self.layer.live.items() if n.startswith(prefix) and isinstance(b, Branch)
        }

    def finished(self) -> dict[str, Finished]:
        prefix = f"{self.site.role}:"
        return {n[len(prefix) :]: f for n, f in self.layer.finished.items() if n.startswith(prefix)}

    def finish(self, name: str, *, fold: bool = True) -> None:
        self.layer.finish(f"{self.site.role}:{name}", fold=fold)

    def drop(self, name: str) -> None:
        """Take a branch away, live or finished."""
        self.layer.drop(f"{self.site.role}:{name}")

    def replace(self, name: str, branch: Branch) -> None:
        """Put another live branch in the place of this one."""
        self.drop(name)
        self.add(name, branch)

    def mixture(self, names: Sequence[str], choice: Choice) -> Mixture:
        """These experts, ready to be chosen. Experts of smaller rank are filled up with zeros."""
        found = [self.finished()[name] for name in names]
        rank, dtype = max(f.down_ri.shape[0] for f in found), self.layer.weight_oi.dtype
        ups_eor = torch.stack([F.pad(f.up_or, (0, rank - f.up_or.shape[1])) for f in found])
        downs_eri = torch.stack([F.pad(f.down_ri, (0, 0, 0, rank - f.down_ri.shape[0])) for f in found])
        return Mixture(self.rows, ups_eor.to(dtype), downs_eri.to(dtype), choice)


class Learner:
    """backbone: frozen, its adapted maps replaced in place. slots: by name, in the order of the backbone. head: grows.

    targets: roles to adapt; blocks: which blocks (all if None); dtype: precision of the frozen weights; device: where all
    of it is, and what is added to it goes.
    Raises ConfigError where no place of the backbone fits.
    """

    def __init__(
        self,
        backbone: Backbone,
        targets: Sequence[str] = ("k", "v"),
        blocks: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        wanted = set(range(backbone.blocks) if blocks is None else blocks)
        sites = [site for site in backbone.sites if site.role in targets and site.block in wanted]
        missing = set(targets) - {site.role for site in sites}
        if missing or not wanted <= set(range(backbone.blocks)):
            raise ConfigError(
                f"backbone {backbone.name!r} has blocks 0 to {backbone.blocks - 1} with roles "
                f"{sorted({s.role for s in backbone.sites})}; targets {list(targets)} in blocks {sorted(wanted)} do not fit. "
                f"Change backbone.targets or backbone.blocks."
            )
        self.backbone = backbone
        self.dtype, self.device = dtype, torch.device(device)
        backbone.module.to(self.device)
        self.layers: dict[str, AdaptedLinear] = {}
        for path in dict.fromkeys(site.path for site in sites):
            self.layers[path] = adapters.inject(backbone.module, path, dtype)
        backbone.cast(dtype)
        self.slots = {site.name: Slot(site, self.layers[site.path]) for site in sites}
        self.head = Head(backbone.width, self.device)
        self.reuse: Reuse | None = None
        """Where hidden states below the first adapted block are kept, if they are."""
        self.halves: Halves | None = None
        """What batches are computed in halves by, while `in_halves` is open."""
        self._whole = False
        """Whether `in_one_piece` is open."""
        self._resting: Halves | None = None
        """The same, at work or not: to begin with new threads for each task costs a tenth of a step."""

    @property
    def rows(self) -> list[Row]:
        return self.head.rows

    def reuse_below(self, folder: Path, megabytes: int, views: int | None = None) -> None:
        """From now on keep what the frozen blocks below all slots make of examples: see `Reuse`, and for what is raised."""
        first = min(slot.site.block for slot in self.slots.values())
        self.reuse = Reuse(self.backbone, first, self.dtype, folder, megabytes, views)

    def close(self) -> None:
        """Give back to the system what is kept on disk for reuse, and threads."""
        if self.reuse is not None:
            self.reuse.close()
        self._rest()

    def _rest(self) -> None:
        if self._resting is not None:
            self._resting.close()
            self._resting = None

    def features(self, batch: Batch, layers: int = 1) -> Tensor:
        """What the backbone makes of each example, (b, d) float32; of its last `layers` blocks, if it has as many,
        (b, layers d), which always goes through the whole of it. Errors as `Backbone.layered`."""
        inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
        if layers > 1:
            return self.backbone.layered(inputs, layers).float()
        if self.reuse is not None and self.reuse.covers(batch):
            return self.reuse.features(batch, inputs).float()
        if self.halves is not None and len(batch) >= SMALLEST:
            with adapters.all_summed(self.layers) as sums:
                wanted = {parameter: parameter for parameter in self.trainable().values()} | sums
                return self.halves(self.backbone.features, inputs, wanted).float()
        features_bd: Tensor = self.backbone.features(inputs).float()
        return features_bd

    def task_logits(self, batch: Batch, task: str) -> Tensor:
        """Scores of this task's own rows only, (b, rows of the task)."""
        logits: Tensor = self.head.block(task)(self.features(batch))
        return logits

    def groups(self) -> dict[str, list[Slot]]:
        """Slots that read the same input, by the name of that input."""
        found: dict[str, list[Slot]] = {}
        for slot in self.slots.values():
            found.setdefault(slot.group, []).append(slot)
        return found

    def input_moments(self, batches: Iterable[Batch], *, summed: bool = False) -> dict[str, Tensor]:
        """Uncentred second moment E[x x^T] of the input of each group over all (real) tokens of one pass, (d, d) float64;
        summed: their sum instead. Live branches take part, folded."""
        modules = {group: slots[0].layer for group, slots in self.groups().items()}
        with self.folded(), self.in_halves(), recording(modules) as record:
            for batch in batches:
                mask_bt = batch.inputs.get("attention_mask")
                with record.batch(mask_bt), nullcontext() if mask_bt is None else self.in_one_piece():
                    self.features(batch)
        return {
            group: m.sum_dd if summed and m.sum_dd is not None else m.mean_dd for group, m in record.moments.items()
        }

    def linear(self, block: int, role: str) -> tuple[Tensor, Tensor | None]:
        """Weight (o, i) and bias (o,) at work now in this place of the backbone, adapted or not: see `effective`."""
        site = next(site for site in self.backbone.sites if (site.block, site.role) == (block, role))
        rows = slice(*site.rows) if site.rows else slice(None)
        if site.path in self.layers:
            layer = self.layers[site.path]
            weight_oi, bias_o = layer.effective(), layer.bias_o
        else:
            module = self.backbone.module.get_submodule(site.path)
            assert isinstance(module, nn.Linear)
            weight_oi, bias_o = module.weight, module.bias
        return weight_oi[rows], None if bias_o is None else bias_o[rows]

    @contextmanager
    def watching(self, watchers: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
        """While open, the input (b, t, i) of each of these groups is shown to its function, without gradients, before any
        slot of the group computes."""
        shown: dict[str, Tensor] = {}

        def hook_for(group: str) -> Look:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if shown.get(group) is not inputs[0]:  # the first layer of the group that gets it
                    shown[group] = inputs[0]
                    with torch.no_grad():
                        watchers[group](inputs[0])

            return only_looks(hook)

        groups = self.groups()
        handles = [
            layer.register_forward_pre_hook(hook_for(group))
            for group in watchers
            for layer in {id(slot.layer): slot.layer for slot in groups[group]}.values()
        ]
        try:
            with self.in_one_piece():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """While open, a forward costs what the bare backbone costs, and there are no gradients."""
        with adapters.all_folded(self.layers), torch.no_grad():
            yield

    @contextmanager
    def in_halves(self) -> Iterator[None]:
        """While open, batches that are not small go through a float32 backbone as two halves side by side, where the processor
        has an even number of threads: see `Halves`. In bf16 a batch is computed too soon for that to pay: what two threads
        ask for in Python they ask for one after another."""
        before, threads = self.halves, torch.get_num_threads()
        if self.device.type == "cpu" and self.dtype == torch.float32 and threads % 2 == 0 and not self._whole:
            if self._resting is None or self._resting.threads != threads:
                self._rest()
                self._resting = Halves()
            self.halves = self._resting
        try:
            yield
        finally:
            self.halves = before

    @contextmanager
    def in_one_piece(self) -> Iterator[None]:
        """While open, no batch is halved, whatever is opened within: for what tells examples apart by their place in it, or
        looks at all of it at once."""
        before = self.halves, self._whole
        self.halves, self._whole = None, True
        try:
            yield
        finally:
            self.halves, self._whole = before

    @contextmanager
    def bare(self) -> Iterator[None]:
        """While open, the backbone is the pre-trained one: no branch, live, folded or expert, takes part."""
        with adapters.stripped(self.layers):
            yield

    @contextmanager
    def choosing(self, names: Sequence[str], choices: Tensor | Mapping[str, Choice]) -> Iterator[None]:
        """While open, these experts are at work in every slot that has them: chosen alike everywhere, or by slot."""
        try:
            for slot in self.slots.values():
                if set(names) <= set(slot.finished()):
                    choice = choices if isinstance(choices, Tensor) else choices[slot.name]
                    slot.layer.mixtures[slot.site.role] = slot.mixture(names, choice)
            with self.in_one_piece():
                yield
        finally:
            for layer in self.layers.values():
                layer.mixtures.clear()

    @contextmanager
    def per_example(self, name: str, count: int) -> Iterator[dict[str, Tensor]]:
        """While open, example b of a batch of `count` runs through its own copy b of this live branch. Yields the copies of
        the factors, `<slot>/up` (b, o, r) and `<slot>/down` (b, r, i): what differentiates a sum over the examples by
        them is one gradient per example."""
        resting: dict[str, Branch] = {}
        copies: dict[str, Tensor] = {}
        try:
            for slot in (slot for slot in self.slots.values() if name in slot.live()):
                resting[slot.name] = slot.live()[name]
                slot.drop(name)
                ups_bor, downs_bri = (
                    factor.detach().repeat(count, 1, 1).requires_grad_() for factor in resting[slot.name].factors()
                )
                copies |= {f"{slot.name}/up": ups_bor, f"{slot.name}/down": downs_bri}
                dtype = slot.layer.weight_oi.dtype
                slot.layer.mixtures[slot.site.role] = Mixture(
                    slot.rows, ups_bor.to(dtype), downs_bri.to(dtype), torch.arange(count, device=self.device)
                )
            with self.in_one_piece():
                yield copies
        finally:
            for slot_name, branch in resting.items():
                self.slots[slot_name].layer.mixtures.pop(self.slots[slot_name].site.role, None)
                self.slots[slot_name].add(name, branch)

    def finish(self, name: str, *, fold: bool = True) -> None:
        """End the training of this branch wherever it is live: keep its factors, and fold them or keep an expert."""
        for slot in self.slots.values():
            if name in slot.live():
                slot.finish(name, fold=fold)

    def drop(self, name: str) -> None:
        """Take this branch away wherever it is, live or finished."""
        for slot in self.slots.values():
            if name in slot.live() or name in slot.finished():
                slot.drop(name)

    def reset(self) -> None:
        """Forget all that was learnt: branches and head."""
        for slot in self.slots.values():
            for name in (*slot.live(), *slot.finished()):
                slot.drop(name)
        self.head = Head(self.backbone.width, self.device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that learns, by a name that says where it is: `block0.k/task-01/up`, `head/task-01/weight`."""
        found: dict[str, nn.Parameter] = {}
        for slot in self.slots.values():
            for name, branch in slot.live().items():
                found |= {f"{slot.name}/{name}/{p}": v for p, v in branch.named_parameters() if v.requires_grad}
        for task, block in zip(self.head.tasks, self.head.blocks, strict=True):
            found |= {f"head/{task}/{p}": v for p, v in block.named_parameters() if v.requires_grad}
        return found

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every parameter that learns its value among these, which are named as in `tensors()`. Raises KeyError on a
        missing one."""
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(tensors[name if name.startswith("head/") else f"live/{name}"])

    def undecayed(self) -> set[str]:
        """The names, as in `trainable`, of what weight decay leaves alone."""
        return {
            f"{slot.name}/{name}/{part}"
            for slot in self.slots.values()
            for name, branch in slot.live().items()
            for part in branch.undecayed
        }

    def stored_parameters(self) -> int:
        """Numbers kept beside the bare backbone: factors of all branches and rows of the head."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All that was learnt, by name. With `outline()` it is enough to rebuild the learner from the bare backbone."""
        found: dict[str, Tensor] = {}
        for slot in self.slots.values():
            for name, (_, up_or, down_ri, _) in slot.finished().items():
                found |= {f"finished/{slot.name}/{name}/up": up_or, f"finished/{slot.name}/{name}/down": down_ri}
            for name, branch in slot.live().items():
                for part, value in (branch.trained() | branch.frozen()).items():
                    found[f"live/{slot.name}/{name}/{part}"] = value.detach()
        for task, block in zip(self.head.tasks, self.head.blocks, strict=True):
            found |= {f"head/{task}/{part}": value.detach() for part, value in block.named_parameters()}
        return found

    def outline(self) -> dict[str, Any]:
        """What the tensors do not say: the order of things, and what is trained. Plain JSON."""
        return {
            "slots": {
                slot.name: {
                    "finished": {name: {"folded": part.folded} for name, part in slot.finished().items()},
                    "live": {n: {"trained": [*b.trained()], "frozen": [*b.frozen()]} for n, b in slot.live().items()},
                }
                for slot in self.slots.values()
            },
            "head": [
                {
                    "task": task,
                    "classes": [row.label for row in self.rows if row.task == task],
                    "trained": all(p.requires_grad for p in block.parameters()),
                }
                for task, block in zip(self.head.tasks, self.head.blocks, strict=True)
            ],
        }

    def restore(self, outline: Mapping[str, Any], tensors: Mapping[str, Tensor], branch_type: type[Branch]) -> None:
        """Rebuild from what `outline` and `tensors` gave. The learner must be new. Raises KeyError on a missing tensor."""
        for name, saved in outline["slots"].items():
            slot = self.slots[name]
            for branch, facts in saved["finished"].items():
                key = f"finished/{name}/{branch}"
                up_or, down_ri = (tensors[f"{key}/{part}"].to(self.device, copy=True) for part in ("up", "down"))
                slot.layer.finished[f"{slot.site.role}:{branch}"] = Finished(slot.rows, up_or, down_ri, facts["folded"])
            for branch, parts in saved["live"].items():
                values = {
                    kind: {p: tensors[f"live/{name}/{branch}/{p}"] for p in names} for kind, names in parts.items()
                }
                slot.add(branch, branch_type(trained=values["trained"], frozen=values["frozen"]))
        for block in outline["head"]:
            made = self.head.add(block["task"], block["classes"])
            made.load_state_dict({part: tensors[f"head/{block['task']}/{part}"] for part in ("weight", "bias")})
            made.requires_grad_(block["trained"])
        for layer in self.layers.values():
            layer.refold()
