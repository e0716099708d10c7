"""`peft-tasks`: one PEFT adapter per task, the classifier, the router if there is one, and a script that computes the scores.

Shape letters: b batch, d width, j outputs of the head.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lamina.backbones.families import FAMILIES
from lamina.errors import MethodError, ModelError
from lamina.export.adapter import BASE, base_of, tell_outputs, write_adapter
from lamina.export.checking import by_library, by_script, need, silently, together, told_together, write_script
from lamina.export.heads import ENCODER, Layout
from lamina.export.opened import Opened, open_model
from lamina.export.outputs import ROUTED, LinearOutputs, linear_outputs, own_outputs, refuse_routed
from lamina.export.texts import write_matrix, write_tokenizer
from lamina.export.updates import Factors, of_branch
from lamina.export.written import Draft, Exported, drafted, finished, refuse_existing, write_json
from lamina.learner import Learner
from lamina.methods.base import Method
from lamina.methods.color import CoLoR
from lamina.methods.duallora import DualLoRA, orthogonal, residual
from lamina.methods.lamina import Lamina

TASKS, LAYOUT, ROUTER = "tasks", "layout.json", "router.safetensors"


def export_tasks(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    inputs: str | os.PathLike[str] | None = None,
    with_base: bool = False,
) -> Exported:
    """Write an adapter per task for methods whose tasks are separate branches. Returns what was written.

    `load.py` in the folder computes the model's scores with transformers and safetensors; the adapters load with plain peft on
    `AutoModel`. inputs: images or texts to compare on. with_base: write the base beside them.
    Raises MethodError for a model that does not divide into tasks; ModelError where its base cannot be loaded by transformers
    alone, or scores differ.
    """
    target = Path(out)
    refuse_existing(target)
    need("peft", "peft", "the format peft-tasks")
    with open_model(model, inputs) as opened, drafted(target, "peft-tasks", opened) as draft:
        names = list(dict.fromkeys(output.task for output in opened.learner.outputs))
        parts = branches(opened.learner, opened.predictor.method, names)
        routed = isinstance(opened.predictor.method, ROUTED)
        if not routed:
            refuse_routed(opened, "one adapter per task")
        layout = encoder_layout(opened)
        place = base_of(opened, layout, draft, with_base=with_base)
        named = BASE if with_base else place
        folders = folders_of(names)
        for folder, name in zip(folders, names, strict=True):
            _write(draft.folder / TASKS / folder, layout, of_branch(opened.learner, parts[name]), named)
        outputs = _outputs(opened)
        write_matrix(draft.folder, outputs)
        told: dict[str, Any] = {
            "mode": "sum",
            "base": named,
            "names": names,
            "tasks": [{"name": name, "folder": folder} for name, folder in zip(names, folders, strict=True)],
            "outputs": list(outputs.tasks),
            "labels": list(outputs.labels),
            **_pooling(opened),
        }
        script, more = _router(opened, draft, layout, folders, names, named)
        write_json(draft.folder / LAYOUT, told | more)
        write_script(draft.folder, script)
        if layout.tokens:
            write_tokenizer(draft, opened)
        draft.facts["outputs"] = list(outputs.labels)
        tell_outputs(draft, outputs)
        reference = opened.scores if routed else [outputs.scores(features_bd) for features_bd in opened.features()]
        found = by_script(draft.folder, opened.batches, BASE=place)
        draft.compare("load.py with plain transformers", reference, found, outputs.labels)
        _check_adapters(draft, place, folders, names)
        used = [folder for folder, name in zip(folders, names, strict=True) if of_branch(opened.learner, parts[name])]
        if used and not routed:
            _check_together(draft, place, used)
        draft.notes.append(
            "The scores are those of `load.py`: one adapter alone, loaded with peft, gives the features of its task only."
            if routed
            else told_together(used)
        )
        if not with_base:
            draft.notes.append(f"The base is {place}; `load.py` finds another place in the environment variable BASE.")
        draft.code = f"python {target}/load.py INPUTS.safetensors SCORES.safetensors"
        return finished(draft)


def branches(learner: Learner, method: Method[Any], names: Sequence[str]) -> dict[str, str]:
    """Returns the finished branch of every task. Raises MethodError where tasks have none of their own, or share one."""
    sites = list(learner.sites.values())
    live = {name for site in sites for name in site.live()}
    finished_ = {name for site in sites for name in site.finished()}
    wanted = {name: orthogonal(name) if isinstance(method, DualLoRA) else name for name in names}
    extra = finished_ - set(wanted.values()) - {residual(name) for name in names}
    if live or extra or not set(wanted.values()) <= finished_:
        shared = sorted(live | extra) or ["none"]
        raise MethodError(
            f"method {method.name!r} as configured does not keep an adapter per task (it has: {', '.join(shared)}), so the "
            f"model does not divide into tasks. `--format peft` writes one adapter of everything learnt."
        )
    return wanted


def encoder_layout(opened: Opened) -> Layout:
    """Returns the encoder as `AutoModel` loads it. Raises ModelError where that gives another class, or reads other inputs."""
    import transformers

    backbone = opened.learner.backbone
    config: Any = backbone.module.config
    family = FAMILIES[config.model_type]
    grey = backbone.image is not None and backbone.image.channels == 1
    with silently():
        try:
            auto = transformers.MODEL_MAPPING[type(config)]
        except KeyError:
            auto = None
    if auto is not type(backbone.module) or family.takes_patches or grey:
        raise ModelError(
            f"transformers' AutoModel does not compute the features of {type(backbone.module).__name__} from the same inputs, "
            f"so a plain script cannot. `--format onnx` may write it."
        )
    copy = type(config).from_dict(config.to_dict())
    return Layout(ENCODER, auto.__name__, "", copy, {}, (), backbone.kind == "text", family.options)


def _outputs(opened: Opened) -> LinearOutputs:
    """Returns the method's own outputs. Raises MethodError for a unified classifier of a routed method."""
    method = opened.predictor.method
    if not isinstance(method, ROUTED):
        return linear_outputs(opened)
    if opened.facts.config.consolidation.classifier != "own":
        raise MethodError(
            f"a unified classifier on routed features ({opened.facts.config.consolidation.classifier}) is not exported. Its "
            f"own classifier is: `lamina create --set consolidation.classifier=own`."
        )
    return own_outputs(opened)


def _pooling(opened: Opened) -> dict[str, Any]:
    backbone = opened.learner.backbone
    config: Any = backbone.module.config
    norm = FAMILIES[config.model_type].norm
    image = backbone.image
    return {
        "pooling": backbone.pooling,
        "patches": (image.size // config.patch_size) ** 2 if image is not None else 0,
        "norm": norm if norm in dict(backbone.module.named_modules()) else None,
    }


def _router(
    opened: Opened, draft: Draft[Opened], layout: Layout, folders: Sequence[str], names: Sequence[str], base: str
) -> tuple[str, dict[str, Any]]:
    """Write what selects or scales adapters. Returns the script for it, and what it must know."""
    method, learner = opened.predictor.method, opened.learner
    if isinstance(method, CoLoR):
        save_tensors(
            draft.folder / ROUTER, {key: v for key, v in method.memory.items() if key.startswith("centroids/")}
        )
        through = [0] if method.config.identify == "first expert" else []
        return "tasks", {"mode": "route", "distance": method.config.distance, "identify_with": through}
    if isinstance(method, Lamina):
        save_tensors(draft.folder / ROUTER, posterior_tensors(method))
        later = learner.backbone.stages[1:][-method.config.layers :][1:]  # as in `Backbone.layered`
        return "posterior", {"blocks": list(later), "width": learner.backbone.width}
    if not isinstance(method, DualLoRA):
        return "tasks", {}
    paths = {site.name: site.where.path for site in learner.sites.values()}
    tensors = {}
    for site in learner.sites.values():
        for part in ("bases", "sizes", "shares"):
            tensors[f"{site.where.path}/{part}"] = method.memory[f"{site.name}/{part}"]
    save_tensors(draft.folder / ROUTER, tensors)
    first = {"own": 0, "previous": 1, "none": len(names)}[method.config.residual]
    residuals = [f"{folder}-residual" for folder in folders[first:]]
    for folder, name in zip(residuals, names[first:], strict=True):
        _write(draft.folder / TASKS / folder, layout, of_branch(learner, residual(name)), base)
    blocks = []
    for block in sorted({site.block for site in learner.sites.values()}):
        where = {site.role: site.path for site in learner.backbone.sites if site.block == block}
        adapted = [role for role in ("k", "v") if f"block{block}.{role}" in paths]
        blocks.append({**{role: where[role] for role in ("q", "k", "v")}, "adapted": adapted})
    config = method.config
    return "gated", {
        "blocks": blocks,
        "residuals": residuals,
        "heads": learner.backbone.heads,
        "gates": config.residual if config.dynamic_memory else "one",
        "calibration": config.calibration,
        "temperature": config.temperature,
    }


def _write(folder: Path, layout: Layout, factors: Mapping[str, Factors], base: str) -> None:
    folder.mkdir(parents=True)
    write_adapter(folder, layout, factors, base, "FEATURE_EXTRACTION")


def posterior_tensors(method: Lamina) -> dict[str, Tensor]:
    """Returns what infers the task, and the discriminants within the tasks."""
    return {key: value for key, value in method.memory.items() if not key.startswith(("sums/", "statistics/"))}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)


def _check_adapters(draft: Draft[Opened], place: str, folders: Sequence[str], names: Sequence[str]) -> None:
    """Load every adapter with plain peft, and compare the features of the first batch with those of its branch alone."""
    import transformers
    from peft import PeftModel

    opened, method = draft.opened, draft.opened.predictor.method
    learner, batch = opened.learner, opened.batches[0]
    for folder, name in zip(folders, names, strict=True):
        wanted = of_branch(learner, orthogonal(name) if isinstance(method, DualLoRA) else name)
        if not wanted:
            continue
        with by_library(f"loading the adapter of task {name!r} with plain peft"), torch.no_grad():
            base = transformers.AutoModel.from_pretrained(place, dtype=torch.float32).eval()
            tuned = PeftModel.from_pretrained(base, str(draft.folder / TASKS / folder)).eval()
            merged = tuned.merge_and_unload()
            found_bd = merged(**dict(batch.inputs)).last_hidden_state[:, 0]
        with torch.no_grad():
            for path, layer in learner.layers.items():
                update = wanted.get(path)
                own_oi = layer.base_oi if update is None else layer.base_oi + update.up_or @ update.down_ri
                layer.weight_oi, layer.live_apart = own_oi, False
            module: Any = learner.backbone.module
            reference_bd = module(**dict(batch.inputs)).last_hidden_state[:, 0]
            for layer in learner.layers.values():
                layer.refold()
        labels = [str(number) for number in range(found_bd.shape[1])]
        draft.compare(
            f"plain peft, features of task {name!r} alone", [reference_bd], [found_bd], labels, "the first batch"
        )


def _check_together(draft: Draft[Opened], place: str, folders: Sequence[str]) -> None:
    """Load all adapters with plain peft, activate them, and compare the features of the first batch with the model's."""
    import transformers

    learner, batch = draft.opened.learner, draft.opened.batches[0]
    with by_library("activating all adapters with plain peft"), torch.no_grad():
        base = transformers.AutoModel.from_pretrained(place, dtype=torch.float32).eval()
        model = together(base, [draft.folder / TASKS / folder for folder in folders])
        found_bd = model(**dict(batch.inputs)).last_hidden_state[:, 0]
    with learner.folded(), torch.no_grad():
        module: Any = learner.backbone.module
        reference_bd = module(**dict(batch.inputs)).last_hidden_state[:, 0]
    labels = [str(number) for number in range(found_bd.shape[1])]
    by = "plain peft, features with all adapters"
    draft.compare(by, [reference_bd], [found_bd], labels, "the first batch")


def folders_of(names: Sequence[str]) -> list[str]:
    """Returns the folder of every task."""
    return [f"{n:03d}-{_plain(name)}" for n, name in enumerate(names, 1)]


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60] or "task"
