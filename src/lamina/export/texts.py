"""What belongs to an export of texts: tokenizer, matrix, and the folders of sentence-transformers."""

from pathlib import Path

from safetensors.torch import save_file

from lamina.errors import DataError
from lamina.export.checking import silently
from lamina.export.opened import Opened
from lamina.export.outputs import LinearOutputs
from lamina.export.written import Draft, write_json


def longest(opened: Opened) -> int:
    """Returns how many tokens of a text the model reads."""
    positions = opened.learner.backbone.positions
    wanted = opened.facts.config.data.max_length
    return wanted if positions is None else min(wanted, positions)


def write_tokenizer(draft: Draft, opened: Opened) -> None:
    """Write the tokenizer, which cuts texts where lamina does if asked to truncate."""
    from transformers import AutoTokenizer

    folder = opened.learner.backbone.tokenizer
    if folder is None:
        raise DataError(f"backbone {opened.learner.backbone.name!r} has no tokenizer beside its weights")
    with silently():
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        tokenizer.model_max_length = longest(opened)
        tokenizer.save_pretrained(draft.folder)


def write_matrix(folder: Path, outputs: LinearOutputs, opened: Opened) -> None:
    """Write the classifier as a matrix, and its labels."""
    save_file(
        {"weight": outputs.weight_jd.contiguous(), "bias": outputs.bias_j.contiguous()},
        folder / "classifier.safetensors",
    )
    write_json(
        folder / "labels.json",
        {"labels": list(outputs.labels), "tasks": list(outputs.tasks), "max_length": longest(opened)},
    )


def write_pooling(folder: Path, opened: Opened) -> None:
    """Write what sentence-transformers reads beside an encoder: the mean over tokens, without normalisation."""
    kinds = ("sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling")
    paths = ("", "1_Pooling")
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": kind}
        for n, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest(opened), "do_lower_case": False})
    (folder / "1_Pooling").mkdir()
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes}
    write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": opened.learner.backbone.width, **pooling}
    )
