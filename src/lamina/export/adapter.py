"""`peft`: everything learnt so far as one LoRA adapter in PEFT's format, with the classifier.

Shape letters: o outputs, i inputs of a linear layer, r rank, j outputs of the head.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lamina.backbones.files import locate
from lamina.errors import MethodError, ModelError
from lamina.export.adapter_files import CONFIG, START, WEIGHTS
from lamina.export.checking import by_library, by_script, logits_of, need, silently, write_script
from lamina.export.heads import ENCODER, MEANS, TEXTS, Layout, layout_of
from lamina.export.opened import Opened, open_model
from lamina.export.outputs import LinearOutputs, linear_outputs, refuse_routed
from lamina.export.texts import write_labels, write_matrix, write_tokenizer
from lamina.export.updates import Factors, state_of, whole
from lamina.export.written import Draft, Exported, drafted, finished, refuse_existing, told, write_json

BASE = "base"
"""Folder of an export with its base, and what the files of the export call it: so the folder may be moved."""
READ_BY_HEADS = (
    *("image_size", "classifier_pooling", "classifier_bias", "classifier_activation"),
    *("pooler_hidden_act", "use_mean_pooling"),
)
"""Settings of a base that decide how a class with a classifier reads it."""


def export_peft(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    inputs: str | os.PathLike[str] | None = None,
    with_base: bool = False,
) -> Exported:
    """Write one PEFT adapter of everything that a model has learnt. Returns what was written.

    `PeftModel.from_pretrained(base, out)` then computes the model's scores. inputs: images or texts to compare on. with_base:
    write the base beside it, in transformers' layout.
    Raises MethodError for methods with routed adapters; ModelError where no class of transformers reads such features, the base
    cannot be loaded by transformers alone, or scores differ.
    """
    target = Path(out)
    refuse_existing(target)
    need("peft", "peft", "the format peft")
    with open_model(model, inputs) as opened, drafted(target, "peft", opened) as draft:
        refuse_routed(opened, "one adapter")
        outputs = linear_outputs(opened)
        layout = layout_of(opened.learner.backbone, outputs)
        factors = whole(opened.learner)
        if not factors:
            raise MethodError(
                f"method {opened.predictor.method.name!r} has changed no weight of the backbone, so there is no adapter. "
                f"`--format merged` writes backbone and classifier."
            )
        place = base_of(opened, layout, draft, with_base=with_base)
        task_type = {ENCODER: "FEATURE_EXTRACTION", TEXTS: "SEQ_CLS"}.get(layout.auto)
        write_adapter(draft.folder, layout, factors, BASE if with_base else place, task_type)
        draft.facts["outputs"] = list(outputs.labels)
        tell_outputs(draft, outputs)
        _check(draft, layout, outputs, place)
        draft.code = _code(target, layout, outputs, str(target / BASE) if with_base else "BASE")
        if not with_base:
            draft.notes.append(f"BASE is the base model that it was trained on: {place}")
        return finished(draft)


def write_adapter(
    folder: Path, layout: Layout, factors: Mapping[str, Factors], base: str, task_type: str | None
) -> None:
    """Write the two files of a PEFT adapter of a classifier. Its scaling is 1: alpha is the rank."""
    placed = {f"{layout.prefix}{path}": one for path, one in factors.items()}
    write_lora(folder, placed, base, task_type, head=layout.head, saved=layout.saved)


def write_lora(
    folder: Path,
    factors: Mapping[str, Factors],
    base: str,
    task_type: str | None,
    *,
    head: Mapping[str, Tensor] | None = None,
    saved: Sequence[str] = (),
    transposed: bool = False,
) -> None:
    """Write the two files of a PEFT adapter. Its scaling is 1: alpha is the rank.

    factors: by the path of the layer in the model. head: tensors that are saved whole, of the modules `saved`. transposed:
    whether the model holds weights as (in, out).
    """
    ranks = {path: one.rank for path, one in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    patterns = {path: rank for path, rank in ranks.items() if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "modules_to_save": list(saved) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    write_json(folder / CONFIG, config)
    tensors = {f"{START}{name}": value.float().contiguous().clone() for name, value in (head or {}).items()}
    for path, (up_or, down_ri) in factors.items():
        tensors[f"{START}{path}.lora_A.weight"] = down_ri.contiguous()
        tensors[f"{START}{path}.lora_B.weight"] = up_or.contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def base_of(opened: Opened, layout: Layout, draft: Draft[Opened], *, with_base: bool) -> str:
    """Returns where plain transformers finds the base: in the draft if asked, else where the model has it. Raises ModelError
    where transformers alone does not load the same weights from there."""
    pristine = state_of(opened.learner, folded=False)
    if with_base:
        with by_library("writing the base with transformers"):
            made = layout.build(pristine, layout.empty_head())
            made.save_pretrained(draft.folder / BASE)
        return str(draft.folder / BASE)
    name = str(opened.path / "base") if opened.facts.base.embedded else opened.facts.config.backbone.name
    where = locate(name)
    place = name if where.hub_name is not None else str(where.folder.absolute())
    instead = "Give --with-base to write the base beside the adapter."
    if where.file is not None and where.file.name != "model.safetensors":
        raise ModelError(f"transformers does not load the base from the file {name}. {instead}")
    try:
        with silently():
            found, missing = plain(layout, place)
    except Exception as error:
        raise ModelError(f"transformers does not load the base from {name} ({told(error)}). {instead}") from error
    stored = found.state_dict()
    same = all(getattr(found.config, key, None) == getattr(layout.config, key, None) for key in READ_BY_HEADS)
    for key, value in pristine.items():
        theirs = stored.get(f"{layout.prefix}{key}")
        same = same and theirs is not None and theirs.shape == value.shape and torch.equal(theirs.float(), value)
    if not same or any(
        key.removeprefix(layout.prefix) in pristine and key.startswith(layout.prefix) for key in missing
    ):
        raise ModelError(
            f"transformers loads other weights from {name} than lamina, or reads them otherwise: they are in another layout, "
            f"for another image size, or for another head. {instead}"
        )
    return place


def plain(layout: Layout, place: str, **more: Any) -> tuple[Any, set[str]]:
    """Returns what plain transformers loads from a place, in float32, and the names of missing tensors."""
    import transformers

    if layout.auto != ENCODER:
        more |= {
            "id2label": layout.config.id2label,
            "label2id": layout.config.label2id,
            "ignore_mismatched_sizes": True,
        }
    model, info = getattr(transformers, layout.auto).from_pretrained(
        place, dtype=torch.float32, output_loading_info=True, **more
    )
    return model.eval(), set(info["missing_keys"])


def _check(draft: Draft[Opened], layout: Layout, outputs: LinearOutputs, place: str) -> None:
    opened = draft.opened
    reference = [outputs.scores(features_bd) for features_bd in opened.features()]
    if layout.tokens:
        write_tokenizer(draft, opened)
    if layout.auto == ENCODER:
        draft.notes.append(MEANS + " So the adapter is for AutoModel, with the matrix and `load.py` beside it.")
        write_matrix(draft.folder, outputs)
        write_labels(draft.folder, outputs, opened)
        write_script(draft.folder, "encoder")
        found = by_script(draft.folder, opened.batches, BASE=place)
        draft.compare("load.py with plain peft", reference, found, outputs.labels)
        return
    from peft import PeftModel

    with by_library("loading the adapter with plain peft"):
        made = PeftModel.from_pretrained(plain(layout, place)[0], str(draft.folder)).eval()
        found = logits_of(made, opened.batches)
    draft.compare(f"plain peft, {layout.model}", reference, found, outputs.labels)


def tell_outputs(draft: Draft[Opened], outputs: LinearOutputs) -> None:
    """Note what a user should know about the classifier."""
    if outputs.refitted:
        cost = "its accuracy is not known, since the model keeps no probes"
        if outputs.accuracy is not None:
            cost = f"accuracy on the probes {outputs.accuracy[0]:.1%} before, {outputs.accuracy[1]:.1%} after"
        draft.notes.append(
            f"The classifier is {outputs.refitted}. So this is not quite the model: it names the same class as "
            f"`lamina predict` for {outputs.same_class:.1%} of the compared inputs; {cost}. Its probabilities have no "
            "temperature and are too sure. `--format onnx` keeps classifier and probabilities."
        )
        draft.facts["refitted"] = {"what": outputs.refitted, "accuracy": outputs.accuracy}
    if outputs.scaled:
        draft.notes.append(
            "The model divides the scores of an input by the length of its features; the export does not. The predicted class "
            "is the same, and its softmax is not."
        )
    if len(set(outputs.labels)) < len(outputs.labels):
        draft.notes.append(
            "A class that was learnt in several tasks has several outputs with the same label. The largest output names the "
            "predicted class, exactly as in lamina; a softmax is over outputs, and label2id holds the first output of a class."
        )


def _code(out: Path, layout: Layout, outputs: LinearOutputs, base: str) -> str:
    if layout.auto == ENCODER:
        before = "" if base != "BASE" else "BASE=... "
        return f'{before}python {out}/load.py "a text"'
    place = f'"{base}"' if base != "BASE" else "BASE"
    return (
        f"import json\nfrom peft import PeftModel\nfrom transformers import {layout.auto}\n"
        f'base = {layout.auto}.from_pretrained({place}, num_labels={len(outputs.labels)}, dtype="float32")\n'
        f'model = PeftModel.from_pretrained(base, "{out}")\n'
        f'labels = json.load(open("{out}/export.json"))["outputs"]'
    )
