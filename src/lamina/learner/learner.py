"""Learner: backbone, adapted layers and head. It is the only object a method changes.

Shape letters: b batch, t tokens, d width of the backbone, j outputs of the head, o outputs and i inputs of a linear layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina import adapters
from lamina.adapters import AdaptedLinear, Branch, Finished, Mixture, Router
from lamina.backbones import Backbone
from lamina.errors import ConfigError
from lamina.learner.head import Head, Output, class_scores, drawn, local_labels
from lamina.learner.moments import Watcher, check_moment, recording
from lamina.learner.sites import AdapterSite
from lamina.types import Batch, Task

Draw = Callable[[int], Tensor]


class Learner:
    """A frozen backbone whose linear layers are adapted in place, and a head that grows.

    targets: roles to adapt. blocks: which blocks (all if None). dtype: precision of the frozen weights. device: where
    everything is computed. `sites` are the adapter sites by name, in the order of the backbone.
    Raises ConfigError where the backbone has no such site.
    """

    head_type: ClassVar[type[Head]] = Head

    def __init__(
        self,
        backbone: Backbone,
        targets: Sequence[str] = ("k", "v"),
        blocks: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        wanted = set(range(backbone.blocks) if blocks is None else blocks)
        places = backbone.sites_of(targets, blocks)
        missing = set(targets) - {site.role for site in places}
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
        for path in dict.fromkeys(site.path for site in places):
            self.layers[path] = adapters.inject(backbone.module, path, dtype)
        backbone.cast(dtype)
        self.sites = {site.name: AdapterSite(site, self.layers[site.path]) for site in places}
        self.head = self.head_type(backbone.width, self.device)

    @property
    def generates(self) -> bool:
        """Whether predictions are completions, not classes: see `LanguageLearner`."""
        return False

    @property
    def outputs(self) -> list[Output]:
        """The output units of the head, in order."""
        return self.head.outputs

    # -- features and scores ------------------------------------------------------------------------------------------

    def features(self, batch: Batch, layers: int = 1) -> Tensor:
        """Returns the backbone's features, (b, d) float32; with layers > 1 those of the last `layers` blocks (all blocks
        if there are fewer) side by side, (b, layers d). Raises as `Backbone.layered`."""
        inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
        if layers > 1:
            return self.backbone.layered(inputs, layers).float()
        return self.backbone.features(inputs).float()

    def task_logits(self, batch: Batch, task: str) -> Tensor:
        """Returns the scores of this task's own outputs, (b, outputs of the task)."""
        logits: Tensor = self.head.block(task)(self.features(batch))
        return logits

    # -- losses -------------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, task: Task) -> Tensor:
        """Returns the loss () of a task on its examples: the cross-entropy over its own outputs. Outputs of other tasks are
        neither computed nor trained."""
        return F.cross_entropy(self.task_logits(batch, task.name), local_labels(task, batch.labels_b))

    def loss_of_all(self, batch: Batch, *, balanced: bool = False) -> Tensor:
        """Returns the loss () on examples of any tasks: the cross-entropy over all classes that have outputs. A class's score
        is the largest of its outputs, as in prediction. balanced: every class in the batch has the same total weight."""
        classes = range(1 + max(output.label for output in self.outputs))  # those without outputs score minus infinity
        scores_bc = class_scores(self.head(self.features(batch)), self.outputs, classes)
        if not balanced:
            return F.cross_entropy(scores_bc, batch.labels_b)
        count_c = scores_bc.new_zeros(len(classes)).index_add(0, batch.labels_b, scores_bc.new_ones(len(batch)))
        return F.cross_entropy(scores_bc, batch.labels_b, weight=1 / count_c.clamp_min(1))

    def log_likelihood(self, batch: Batch, task: Task, draw: Draw | None = None) -> Tensor:
        """Returns the log-likelihood (b,) of the labels over the task's own outputs.

        draw: draws the labels from the model's own prediction instead; draw(k) returns uniform numbers (b,), the same
        ones for the same k.
        """
        log_bc = F.log_softmax(self.task_logits(batch, task.name), 1)
        labels_b = local_labels(task, batch.labels_b) if draw is None else drawn(log_bc, draw(0))
        return log_bc.gather(1, labels_b[:, None])[:, 0]

    def groups(self) -> dict[str, list[AdapterSite]]:
        """Returns the sites that read the same input, by the name of that input."""
        found: dict[str, list[AdapterSite]] = {}
        for site in self.sites.values():
            found.setdefault(site.group, []).append(site)
        return found

    def input_moments(self, batches: Iterable[Batch], *, summed: bool = False) -> dict[str, Tensor]:
        """Returns the uncentred second moment E[x x^T] of each group's input over all real tokens, (d, d) float64, by the
        name of the group; their sum instead of the mean if `summed`. Live branches take part, folded. Raises TrainingError
        for a moment that is not finite."""
        modules = {group: sites[0].layer for group, sites in self.groups().items()}
        with self.folded(), recording(modules) as record:
            for batch in batches:
                record.mask_bt = batch.inputs.get("attention_mask")
                self.features(batch)
        found = {g: m.sum_dd if summed and m.sum_dd is not None else m.mean_dd for g, m in record.moments.items()}
        for group, moment_dd in found.items():
            check_moment(moment_dd, f"inputs of {group}")
        return found

    def linear(self, block: int, role: str) -> tuple[Tensor, Tensor | None]:
        """Returns weight (o, i) and bias (o,) in use for this role of a block, adapted or not: see `effective`."""
        site = next(site for site in self.backbone.sites if (site.block, site.role) == (block, role))
        rows = slice(*site.outputs) if site.outputs else slice(None)
        if site.path in self.layers:
            layer = self.layers[site.path]
            weight_oi, bias_o = layer.effective(), layer.bias_o
        else:
            module = self.backbone.module.get_submodule(site.path)
            assert isinstance(module, nn.Linear)
            weight_oi, bias_o = module.weight, module.bias
        return weight_oi[rows], None if bias_o is None else bias_o[rows]

    # -- contexts -----------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self, watchers: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
        """Within the context each of these functions is called with the input (b, t, i) of its group, without gradients,
        before any site of the group computes."""
        shown: dict[str, Tensor] = {}

        def show(group: str, inputs_bti: Tensor) -> None:
            if shown.get(group) is not inputs_bti:  # only once, by the first layer of the group
                shown[group] = inputs_bti
                watchers[group](inputs_bti)

        groups = self.groups()
        handles = [
            layer.register_forward_pre_hook(Watcher(partial(show, group)))
            for group in watchers
            for layer in {id(site.layer): site.layer for site in groups[group]}.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Within the context a forward costs what the bare backbone costs, and there are no gradients."""
        with adapters.all_folded(self.layers), torch.no_grad():
            yield

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Within the context the backbone is the pre-trained one. No branch takes part."""
        with adapters.bare(self.layers):
            yield

    @contextmanager
    def routing(self, names: Sequence[str], routers: Tensor | Mapping[str, Router]) -> Iterator[None]:
        """Within the context these routed adapters are active in every site that has them, with one router for all sites
        or one per site name."""
        try:
            for site in self.sites.values():
                if set(names) <= set(site.finished()):
                    router = routers if isinstance(routers, Tensor) else routers[site.name]
                    site.layer.mixtures[site.role] = site.mixture(names, router)
            yield
        finally:
            for layer in self.layers.values():
                layer.mixtures.clear()

    @contextmanager
    def per_example(self, name: str, count: int) -> Iterator[dict[str, Tensor]]:
        """Within the context example b of a batch of `count` uses its own copy b of this live branch.

        Yields the copies of the factors, `<site>/up` (b, o, r) and `<site>/down` (b, r, i). The gradient of a sum over
        the examples with respect to them is one gradient per example.
        """
        resting: dict[str, Branch] = {}
        copies: dict[str, Tensor] = {}
        try:
            for site in (site for site in self.sites.values() if name in site.live()):
                resting[site.name] = site.live()[name]
                site.drop(name)
                ups_bor, downs_bri = (
                    factor.detach().repeat(count, 1, 1).requires_grad_() for factor in resting[site.name].factors()
                )
                copies |= {f"{site.name}/up": ups_bor, f"{site.name}/down": downs_bri}
                dtype = site.layer.weight_oi.dtype
                site.layer.mixtures[site.role] = Mixture(
                    site.outputs, ups_bor.to(dtype), downs_bri.to(dtype), torch.arange(count, device=self.device)
                )
            yield copies
        finally:
            for site_name, branch in resting.items():
                self.sites[site_name].layer.mixtures.pop(self.sites[site_name].role, None)
                self.sites[site_name].add(name, branch)

    # -- what methods do ----------------------------------------------------------------------------------------------

    def add_outputs(self, task: Task) -> nn.Linear:
        """Freeze the head, append a trainable block with an output for every class of the task, and return it."""
        self.head.freeze()
        return self.head.add(task.name, task.classes)

    def add_lora(self, task: Task, rank: int, purpose: str) -> None:
        """Begin a task with a block of outputs and an initialised LoRA branch, named after the task, in every site.

        purpose: what the initialisation is drawn for, such as the name of the method.
        """
        self.add_outputs(task)
        for site in self.sites.values():
            site.add(task.name, site.fresh_lora(rank, purpose))

    def finish(self, name: str, *, fold: bool = True) -> None:
        """End the training of this branch wherever it is live. Its factors are folded, or kept as a routed adapter."""
        for site in self.sites.values():
            if name in site.live():
                site.finish(name, fold=fold)

    def drop(self, name: str) -> None:
        """Remove this branch from every site that has it, live or finished."""
        for site in self.sites.values():
            if name in site.live() or name in site.finished():
                site.drop(name)

    def reset(self) -> None:
        """Forget everything learnt: all branches and the head."""
        for site in self.sites.values():
            for name in (*site.live(), *site.finished()):
                site.drop(name)
        self.head = self.head_type(self.backbone.width, self.device)

    # -- what is trained and what is saved ----------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns every trained parameter by its location: `block0.k/task-01/up`, `head/task-01/weight`."""
        found: dict[str, nn.Parameter] = {}
        for site in self.sites.values():
            for name, branch in site.live().items():
                found |= {f"{site.name}/{name}/{p}": v for p, v in branch.named_parameters() if v.requires_grad}
        for task, block in zip(self.head.tasks, self.head.blocks, strict=True):
            found |= {f"head/{task}/{p}": v for p, v in block.named_parameters() if v.requires_grad}
        return found

    def set_trainable(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every trained parameter from tensors named as in `tensors()`. Raises KeyError on a missing one."""
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(tensors[name if name.startswith("head/") else f"live/{name}"])

    def undecayed(self) -> set[str]:
        """Returns the names, as in `trainable`, of parameters excluded from weight decay."""
        return {
            f"{site.name}/{name}/{part}"
            for site in self.sites.values()
            for name, branch in site.live().items()
            for part in branch.undecayed
        }

    def stored_parameters(self) -> int:
        """Returns how many numbers are stored beside the bare backbone: factors of all branches, and the head."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Returns everything learnt, by name. Together with `outline()` it rebuilds the learner from the bare backbone."""
        found: dict[str, Tensor] = {}
        for site in self.sites.values():
            for name, part in site.finished().items():
                found |= {
                    f"finished/{site.name}/{name}/up": part.up_or,
                    f"finished/{site.name}/{name}/down": part.down_ri,
                }
            for name, branch in site.live().items():
                for tensor, value in (branch.trained() | branch.frozen()).items():
                    found[f"live/{site.name}/{name}/{tensor}"] = value.detach()
        for task, block in zip(self.head.tasks, self.head.blocks, strict=True):
            found |= {f"head/{task}/{part}": value.detach() for part, value in block.named_parameters()}
        return found

    def outline(self) -> dict[str, Any]:
        """Returns what the tensors do not say, as JSON: the order of branches and outputs, and what is trained."""
        return {
            "sites": {
                site.name: {
                    "finished": {name: {"folded": part.folded} for name, part in site.finished().items()},
                    "live": {n: {"trained": [*b.trained()], "frozen": [*b.frozen()]} for n, b in site.live().items()},
                }
                for site in self.sites.values()
            },
            "head": [
                {
                    "task": task,
                    "classes": [output.label for output in self.outputs if output.task == task],
                    "trained": all(p.requires_grad for p in block.parameters()),
                }
                for task, block in zip(self.head.tasks, self.head.blocks, strict=True)
            ],
        }

    def restore(self, outline: Mapping[str, Any], tensors: Mapping[str, Tensor], branch_type: type[Branch]) -> None:
        """Rebuild a new learner from what `outline` and `tensors` returned. Raises KeyError on a missing tensor."""
        for name, saved in outline["sites"].items():
            site = self.sites[name]
            for branch, facts in saved["finished"].items():
                key = f"finished/{name}/{branch}"
                up_or, down_ri = (tensors[f"{key}/{part}"].to(self.device, copy=True) for part in ("up", "down"))
                site.restore_finished(branch, Finished(site.outputs, up_or, down_ri, facts["folded"]))
            for branch, parts in saved["live"].items():
                values = {
                    kind: {p: tensors[f"live/{name}/{branch}/{p}"] for p in names} for kind, names in parts.items()
                }
                site.add(branch, branch_type(trained=values["trained"], frozen=values["frozen"]))
        for block in outline["head"]:
            made = self.head.add(block["task"], block["classes"])
            made.load_state_dict({part: tensors[f"head/{block['task']}/{part}"] for part in ("weight", "bias")})
            made.requires_grad_(block["trained"])
        for layer in self.layers.values():
            layer.refold()
