"""`merged`: a whole checkpoint of transformers with everything learnt folded into its weights.

Shape letters: b batch, n images, h w pixels, c channels.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lamina.errors import ModelError
from lamina.export.adapter import plain, tell_outputs
from lamina.export.checking import by_page, logits_of, silently, write_page
from lamina.export.heads import ENCODER, IMAGES, MEANS, Layout, layout_of
from lamina.export.opened import Opened, open_model
from lamina.export.outputs import LinearOutputs, linear_outputs, refuse_routed
from lamina.export.texts import write_matrix, write_pooling, write_tokenizer
from lamina.export.updates import state_of
from lamina.export.written import Draft, Exported, drafted, finished, refuse_existing, write_json

BILINEAR = 2
"""Of Pillow."""


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
        made = layout.build(state_of(opened.learner, folded=True))
        with silently():
            made.save_pretrained(draft.folder)
        reference = [outputs.scores(features_bd) for features_bd in opened.features()]
        draft.facts["outputs"] = list(outputs.labels)
        tell_outputs(draft, outputs)
        if layout.tokens:
            write_tokenizer(draft, opened)
        if layout.auto == ENCODER:
            draft.notes.append(MEANS + " So this is the encoder, with the matrix and `load.py` beside it.")
            write_matrix(draft.folder, outputs, opened)
            write_pooling(draft.folder, opened)
            write_page(draft.folder, "encoder")
            found = by_page(draft.folder, opened.batches)
            draft.compare("load.py with plain transformers", reference, found, outputs.labels)
            draft.notes.append("sentence-transformers can load the folder for its features; that was not tried here.")
            draft.code = f'python {target}/load.py "a text"'
            return finished(draft)
        if layout.auto == IMAGES:
            write_json(draft.folder / "preprocessor_config.json", processor_of(opened))
        loaded, missing = plain(layout, str(draft.folder))
        if missing:
            raise ModelError(f"plain transformers lacks {sorted(missing)[:3]} in what was written, so nothing was.")
        draft.compare(
            f"plain transformers, {layout.model}", reference, logits_of(loaded, opened.batches), outputs.labels
        )
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


def _pipeline(draft: Draft, layout: Layout, outputs: LinearOutputs, loaded: Any) -> None:
    """Compare with transformers' own processor or tokenizer in front."""
    from transformers import AutoImageProcessor, AutoTokenizer, pipeline

    opened = draft.opened
    with silently():
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
        best_b = outputs.scores(opened.learner.features(batch)).argmax(1)
    same = np.mean([outputs.labels[best] == label for best, label in zip(best_b.tolist(), theirs, strict=True)])
    told = f"pipeline(): the same class as lamina for {same:.1%} of {len(theirs)} inputs"
    if layout.auto == IMAGES:
        away_nchw = (given_nchw - batch.inputs["pixel_values"]).abs() * torch.tensor(processor_of(opened)["image_std"])[
            :, None, None
        ]
        told += (
            f"; its processor rounds resized pixels to whole levels: {255 * float(away_nchw.max()):.2f} of 255 levels from "
            f"lamina's at most, {255 * float(away_nchw.mean()):.2f} on average"
        )
        draft.facts["pixels"] = {"largest": 255 * float(away_nchw.max()), "mean": 255 * float(away_nchw.mean())}
    draft.notes.append(told + ".")
    draft.facts["pipeline_agreement"] = float(same)
