"""`merged`: a whole checkpoint of transformers with everything learnt folded into its weights.

Shape letters: b batch, n images, h w pixels, c channels.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lamina.data.names import listed
from lamina.errors import ModelError
from lamina.export.adapter import plain, tell_outputs
from lamina.export.checking import INSTEAD, by_library, by_script, logits_of, write_script
from lamina.export.heads import ENCODER, IMAGES, MEANS, Layout, layout_of
from lamina.export.opened import Opened, open_model
from lamina.export.outputs import LinearOutputs, linear_outputs, refuse_routed
from lamina.export.texts import write_labels, write_matrix, write_tokenizer
from lamina.export.updates import state_of
from lamina.export.written import Draft, Exported, drafted, finished, refuse_existing, write_json

BILINEAR = 2
"""Of Pillow."""
MOST_LEVELS = 2.0
"""Of 255, by which a processor's pixels may differ from lamina's: it rounds them to whole levels."""
CLEAR = 0.1
"""Margin of the predicted class, in units of the spread of all scores, that such rounding does not overcome."""


def export_merged(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, inputs: str | os.PathLike[str] | None = None
) -> Exported:
    """Write a checkpoint that plain transformers loads, with all updates folded into the weights. Returns what was written.

    For texts with features that are the mean over tokens: the encoder, the matrix, and `load.py`. inputs: images or texts to
    compare on. Raises MethodError for methods with routed adapters; ModelError where no class of transformers reads such
    features, or scores differ.
    """
    target = Path(out)
    refuse_existing(target)
    with open_model(model, inputs) as opened, drafted(target, "merged", opened) as draft:
        refuse_routed(opened, "one checkpoint")
        outputs = linear_outputs(opened)
        layout = layout_of(opened.learner.backbone, outputs)
        with by_library("writing the checkpoint with transformers"):
            made = layout.build(state_of(opened.learner, folded=True))
            made.save_pretrained(draft.folder)
        reference = [outputs.scores(features_bd) for features_bd in opened.features()]
        draft.facts["outputs"] = list(outputs.labels)
        tell_outputs(draft, outputs)
        if layout.tokens:
            write_tokenizer(draft, opened)
        if layout.auto == ENCODER:
            draft.notes.append(MEANS + " So this is the encoder, with the matrix and `load.py` beside it.")
            write_matrix(draft.folder, outputs)
            write_labels(draft.folder, outputs, opened)
            write_script(draft.folder, "encoder")
            found = by_script(draft.folder, opened.batches)
            draft.compare("load.py with plain transformers", reference, found, outputs.labels)
            draft.code = f'python {target}/load.py "a text"'
            return finished(draft)
        if layout.auto == IMAGES:
            write_json(draft.folder / "preprocessor_config.json", processor_of(opened))
        with by_library("loading the checkpoint with plain transformers"):
            loaded, missing = plain(layout, str(draft.folder))
            found = logits_of(loaded, opened.batches)
        if missing:
            raise ModelError(
                f"plain transformers lacks {listed(sorted(missing), 3)} in what was written, so nothing was. {INSTEAD}"
            )
        draft.compare(f"plain transformers, {layout.model}", reference, found, outputs.labels)
        _pipeline(draft, layout, outputs, loaded)
        task = "image-classification" if layout.auto == IMAGES else "text-classification"
        what = '"photo.jpg"' if layout.auto == IMAGES else '"a text", truncation=True'
        draft.code = f'from transformers import pipeline\npipeline("{task}", "{target}", dtype="float32")({what})'
        return finished(draft)


def processor_of(opened: Opened) -> dict[str, Any]:
    """Returns preprocessor_config.json: the pixels of lamina's evaluation transform, as near as a processor comes."""
    image, config = opened.learner.backbone.image, opened.facts.config.data
    assert image is not None
    size = image.size
    common: dict[str, Any] = {
        "do_resize": True,
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }
    if config.evaluate == "resize":
        return {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}, **common}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": round(size * 256 / 224)},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        **common,
    }


def _pipeline(draft: Draft[Opened], layout: Layout, outputs: LinearOutputs, loaded: Any) -> None:
    """Compare with transformers' own processor or tokenizer in front."""
    from transformers import AutoImageProcessor, AutoTokenizer, pipeline

    opened = draft.opened
    with by_library("pipeline() of plain transformers"):
        if layout.auto == IMAGES:
            pictures = [Image.fromarray(pixels_hwc) for pixels_hwc in opened.images]
            processor = AutoImageProcessor.from_pretrained(draft.folder)
            made = pipeline("image-classification", model=loaded, image_processor=processor)
            theirs = [found[0]["label"] for found in made(pictures, top_k=1)] if pictures else []
            given_nchw = processor(images=pictures, return_tensors="pt")["pixel_values"]
            batch, _ = opened.predictor.read(opened.images)
        else:
            texts = ["a first text", "and a second one, which is somewhat longer than the first"]
            tokenizer = AutoTokenizer.from_pretrained(draft.folder)
            made = pipeline("text-classification", model=loaded, tokenizer=tokenizer)
            theirs = [found["label"] for found in made(texts, truncation=True)]
            batch, _ = opened.predictor.read(texts)
    assert batch is not None
    with opened.learner.folded():
        scores_nj = outputs.scores(opened.learner.features(batch))
    same, margin = [], CLEAR * float(scores_nj.std(correction=0))
    for number, (scores_j, label) in enumerate(zip(scores_nj, theirs, strict=True), 1):
        best = outputs.labels[int(scores_j.argmax())]
        others = [float(score) for score, one in zip(scores_j, outputs.labels, strict=True) if one == label]
        same.append(best == label)
        if best != label and float(scores_j.max()) - max(others) > margin:
            raise ModelError(
                f"pipeline() of transformers names {label!r} for input {number}, and lamina clearly {best!r}, so nothing was "
                f"written. Its processor or tokenizer does something else; `--format onnx` depends on none."
            )
    told = f"pipeline(): the same class as lamina for {np.mean(same):.1%} of {len(theirs)} inputs"
    if layout.auto == IMAGES:
        std_c = torch.tensor(processor_of(opened)["image_std"])
        levels_nchw = 255 * (given_nchw - batch.inputs["pixel_values"]).abs() * std_c[:, None, None]
        most = float(levels_nchw.max())
        if most > MOST_LEVELS:
            raise ModelError(
                f"AutoImageProcessor gives pixels that differ from lamina's by {most:.1f} of 255 levels, and {MOST_LEVELS:g} "
                f"are allowed, so nothing was written. data.evaluate is {opened.facts.config.data.evaluate!r}, and "
                f"transformers crops an image that is not square at whole pixels. `--format onnx` and `--format peft` write no "
                f"processor."
            )
        told += (
            f"; AutoImageProcessor rounds resized pixels to whole levels: {most:.2f} of 255 levels from lamina's at most, "
            f"{float(levels_nchw.mean()):.2f} on average"
        )
    draft.notes.append(told + ".")
