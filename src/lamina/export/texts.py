"""What belongs to an export of texts: the tokenizer, and a matrix with its labels."""

from pathlib import Path

from safetensors.torch import save_file

from lamina.errors import DataError, ModelError
from lamina.export.checking import by_library
from lamina.export.opened import SENTENCES, Opened
from lamina.export.outputs import LinearOutputs
from lamina.export.written import Draft, write_json


def longest(opened: Opened) -> int:
    """Returns how many tokens of a text the model reads."""
    positions = opened.learner.backbone.positions
    wanted = opened.facts.config.data.text_length
    return wanted if positions is None else min(wanted, positions)


def write_tokenizer(draft: Draft[Opened], opened: Opened) -> None:
    """Write the tokenizer, which cuts texts where lamina does if asked to truncate. Raises ModelError where it makes other
    tokens than lamina."""
    from transformers import AutoTokenizer

    folder = opened.learner.backbone.tokenizer
    if folder is None:
        raise DataError(
            f"backbone {opened.learner.backbone.name!r} has no tokenizer beside its weights. Put tokenizer.json or vocab.txt "
            f"there."
        )
    with by_library("writing the tokenizer with transformers"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        tokenizer.model_max_length = longest(opened)
        tokenizer.save_pretrained(draft.folder)
        written = AutoTokenizer.from_pretrained(draft.folder)
    batch, _ = opened.predictor.read(SENTENCES)
    assert batch is not None
    for text, ids_t, mask_t in zip(SENTENCES, batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
        if written(text, truncation=True)["input_ids"] != ids_t[mask_t.bool()].tolist():
            raise ModelError(
                f"the written tokenizer makes other tokens of {text!r} than lamina does, so nothing was written. Install the "
                f"transformers that the tokenizer was saved with."
            )


def write_matrix(folder: Path, outputs: LinearOutputs) -> None:
    """Write the classifier as a matrix."""
    tensors = {"weight": outputs.weight_jd.contiguous(), "bias": outputs.bias_j.contiguous()}
    save_file(tensors, folder / "classifier.safetensors")


def write_labels(folder: Path, outputs: LinearOutputs, opened: Opened) -> None:
    """Write the labels of a matrix, and the longest text in tokens."""
    write_json(
        folder / "labels.json",
        {"labels": list(outputs.labels), "tasks": list(outputs.tasks), "max_length": longest(opened)},
    )
