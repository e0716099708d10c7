"""The formats of exports, of classifiers and of language models."""

import os
from pathlib import Path

from lamina.errors import ModelError
from lamina.export import adapter, graph, merged, tasks
from lamina.export.language_adapter import export_language_peft
from lamina.export.language_merged import export_language_merged
from lamina.export.language_opened import is_language
from lamina.export.language_tasks import export_language_tasks
from lamina.export.written import Exported, refuse_existing

Place = str | os.PathLike[str]


def export_peft(model: Place, out: Place, *, inputs: Place | None = None, with_base: bool = False) -> Exported:
    """Write one PEFT adapter of everything that was learnt. Returns what was written.

    `PeftModel.from_pretrained(base, out)` then computes the scores. model: a model, or a finished run of a language model.
    inputs: images, texts or prompts to compare on. with_base: write the base beside the adapter, in transformers' layout.
    Raises MethodError for methods with routed adapters; ModelError where no class of transformers reads such features, the base
    cannot be loaded by transformers alone, or scores or generated tokens differ.
    """
    path, target = _checked(model, out)
    if is_language(path):
        return export_language_peft(path, target, inputs=inputs, with_base=with_base)
    return adapter.export_peft(path, target, inputs=inputs, with_base=with_base)


def export_tasks(model: Place, out: Place, *, inputs: Place | None = None, with_base: bool = False) -> Exported:
    """Write an adapter per task for methods whose tasks are separate branches. Returns what was written.

    `load.py` in the folder computes scores with transformers and safetensors; the adapters load with plain peft. The arguments
    are those of `export_peft`.
    Raises MethodError for a model that does not divide into tasks; ModelError where its base cannot be loaded by transformers
    alone, or scores differ.
    """
    path, target = _checked(model, out)
    if is_language(path):
        return export_language_tasks(path, target, inputs=inputs, with_base=with_base)
    return tasks.export_tasks(path, target, inputs=inputs, with_base=with_base)


def export_merged(model: Place, out: Place, *, inputs: Place | None = None) -> Exported:
    """Write a checkpoint that plain transformers loads, with all updates folded into the weights. Returns what was written.

    The arguments are those of `export_peft`. Raises MethodError for methods with routed adapters; ModelError where no class of
    transformers reads such features, or scores or generated tokens differ.
    """
    path, target = _checked(model, out)
    if is_language(path):
        return export_language_merged(path, target, inputs=inputs)
    return merged.export_merged(path, target, inputs=inputs)


def export_onnx(model: Place, out: Place, *, inputs: Place | None = None) -> Exported:
    """Write the deployed model, whatever its classifier, as a graph for onnxruntime. Returns what was written.

    The arguments are those of `export_peft`. Raises MethodError for routed adapters, but for those of `lamina`; ModelError for
    a language model, where onnx is not installed, or scores differ.
    """
    path, target = _checked(model, out)
    if is_language(path):
        raise ModelError(
            f"--format onnx is not written for a language model ({path}): to generate text, a graph must keep keys and values "
            f"of earlier tokens. Of a method with one update, write `--format merged`, then: optimum-cli export onnx --model "
            f"OUT GRAPH"
        )
    return graph.export_onnx(path, target, inputs=inputs)


def _checked(model: Place, out: Place) -> tuple[Path, Path]:
    refuse_existing(Path(out))
    return Path(model), Path(out)
