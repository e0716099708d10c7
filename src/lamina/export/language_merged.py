"""`merged` of a language model: the files of its base, with all updates folded into the weights.

Only the adapted weights are written anew, in the type that they are stored in. All other tensors, and all other files
but the settings of generation, are those of the base bit for bit. So tied embeddings stay tied, and shards stay as they are.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamina.backbones import copy_files
from lamina.backbones.files import Header, all_finite, locate, read_headers, weight_files
from lamina.errors import ModelError
from lamina.export.language_adapter import note_precision
from lamina.export.language_files import (
    plain_model,
    refuse_routed,
    refuse_unchanged,
    usage,
    write_generation,
    write_tokenizer,
)
from lamina.export.language_opened import OpenedLanguage, open_language
from lamina.export.language_tokens import Computed, compare, of_learner, of_plain, share
from lamina.export.updates import whole
from lamina.export.written import Draft, Exported, drafted, finished

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERWISE = "`--format peft` writes an adapter, which depends on the base alone."


def export_language_merged(path: Path, target: Path, *, inputs: str | os.PathLike[str] | None = None) -> Exported:
    """Write a checkpoint of a language model. Arguments and errors are those of `export_merged`."""
    opened = open_language(path, inputs)
    refuse_routed(opened, "one checkpoint")
    factors = whole(opened.learner)
    refuse_unchanged(opened, factors)
    exact = of_learner(opened)
    note_precision(opened, exact.written)
    with drafted(target, "merged", opened) as draft:
        draft.otherwise = OTHERWISE
        copy_files(opened.saved.backbone, draft.folder)
        weights = _write(opened, draft.folder, list(factors))
        write_tokenizer(draft)
        write_generation(draft.folder, opened)
        with _using(opened, weights):
            wanted = of_learner(opened)
            model = plain_model(str(draft.folder))
            _check_tied(opened, model)
            found = of_plain(opened, model)
            compare(draft, f"plain transformers, {type(model).__name__}", wanted, found)
        _note_rounding(draft, weights, exact, wanted)
        loading = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'model = AutoModelForCausalLM.from_pretrained("{target}", dtype="float32")'
        )
        draft.code = usage(opened, loading, str(target))
        return finished(draft)


def _write(opened: OpenedLanguage, folder: Path, paths: list[str]) -> dict[str, Tensor]:
    """Write the weights of these layers in place of the base's. Returns them as they are stored, but as (o, i), by path."""
    learner, backbone = opened.learner, opened.backbone
    sources = weight_files(locate(opened.saved.backbone))
    headers = read_headers(sources, passed_over=lambda _: True)
    assert backbone.language is not None
    weights: dict[str, Tensor] = {}
    changed: dict[Path, dict[str, Tensor]] = {}
    for path in paths:
        stored = backbone.stored_layer(path)
        key = _stored_name(headers, f"{stored.path}.weight", backbone.language.body, opened)
        with learner.folded():
            weight_oi = learner.layers[path].effective().to(TYPES[headers[key].dtype])
        if not all_finite(weight_oi):
            raise ModelError(
                f"the weight {key} is larger than {headers[key].dtype} can hold, in which the base is stored, so nothing was "
                f"written. {OTHERWISE}"
            )
        weights[path] = weight_oi
        changed.setdefault(headers[key].file, {})[key] = stored.to_stored(weight_oi).contiguous()
    for file, tensors in changed.items():
        with safe_open(file, framework="pt") as old:
            content = {name: tensors[name] if name in tensors else old.get_tensor(name) for name in old.keys()}  # noqa: SIM118 - no dictionary
            metadata = old.metadata() or {"format": "pt"}
        save_file(content, folder / ("model.safetensors" if len(sources) == 1 else file.name), metadata)
    return weights


def _stored_name(headers: Mapping[str, Header], name: str, body: str, opened: OpenedLanguage) -> str:
    """Returns the name of a weight in the files of the base, which may lack that of the body in front."""
    for key in (name, name.removeprefix(f"{body}.")):
        if key in headers:
            return key
    raise ModelError(
        f"the files of the base {opened.saved.base} have no tensor {name}: an older transformers saved them. Load and save "
        f"them once with this one (from_pretrained, save_pretrained), or write `--format peft`."
    )


@contextmanager
def _using(opened: OpenedLanguage, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context these layers have the weights that were stored."""
    layers = opened.learner.layers
    for path, weight_oi in weights.items():
        layers[path].weight_oi, layers[path].live_apart = weight_oi.float(), False
    try:
        yield
    finally:
        for path in weights:
            layers[path].refold()


def _check_tied(opened: OpenedLanguage, model: Any) -> None:
    """Raises ModelError where the embeddings are tied in the base and not in what was written."""
    own: Any = opened.backbone.module
    tied = own.get_input_embeddings().weight is own.get_output_embeddings().weight
    if tied != (model.get_input_embeddings().weight is model.get_output_embeddings().weight):
        raise ModelError(
            "the embeddings of what was written are tied otherwise than those of the base, so nothing was written. Its "
            "config.json must say tie_word_embeddings as the base does."
        )


def _note_rounding(
    draft: Draft[OpenedLanguage], weights: Mapping[str, Tensor], exact: Computed, rounded: Computed
) -> None:
    """Note the type of the weights, and what rounding to it costs."""
    types = sorted({str(weight_oi.dtype).removeprefix("torch.") for weight_oi in weights.values()})
    if types == ["float32"]:
        draft.notes.append("The weights are float32, as those of the base.")
        return
    moved = float((exact.logits_nv - rounded.logits_nv).abs().max())
    same = share(exact.written, rounded.written)
    draft.notes.append(
        f"The merged weights are rounded to {' and '.join(types)}, in which the base is stored. That moves a score by at most "
        f"{moved:.1e} (they spread by {draft.differences[0].spread:.2g}), and the same tokens are written after {same:.1%} of "
        f"the prompts. The comparison is with the rounded weights. `--format peft` rounds nothing."
    )
    draft.facts["rounding"] = {"types": types, "largest": moved, "same_tokens": same}
