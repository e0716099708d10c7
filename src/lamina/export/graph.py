"""`onnx`: features, classifier and class probabilities as one graph for onnxruntime.

Shape letters: b batch, t tokens, d width, j outputs of the head, c classes, m outputs of a class at most.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamina.backbones.families import FAMILIES
from lamina.errors import ModelError
from lamina.export.checking import by_library, need, silently
from lamina.export.opened import Opened, open_model
from lamina.export.outputs import refuse_routed
from lamina.export.texts import longest, write_tokenizer
from lamina.export.updates import plain_module
from lamina.export.written import Draft, Exported, drafted, finished, refuse_existing, told, write_json
from lamina.learner import Learner, class_scores
from lamina.maths import classifiers
from lamina.methods.base import Method, under
from lamina.methods.lamina import Lamina
from lamina.types import Batch

FILE = "model.onnx"
SIZES = (1, 2, 5)
"""Batch sizes that it is run with, besides those of the inputs to compare on."""
INSTEAD = (
    "Other versions of torch, onnxscript or onnxruntime may help; `--format peft-tasks`, or `merged` for a method with one "
    "update, needs none of them."
)
NAMES = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}


def export_onnx(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, inputs: str | os.PathLike[str] | None = None
) -> Exported:
    """Write the deployed model, whatever its classifier, as a graph for onnxruntime. Returns what was written.

    Its inputs are `pixel_values` (b, 3, s, s), or `input_ids` and `attention_mask` (b, t); its outputs `logits` and
    `probabilities` (b, c), in the order of labels.json. inputs: images or texts to compare on.
    Raises MethodError for routed adapters, but for those of `lamina`; ModelError where onnx is not installed, or scores differ.
    """
    target = Path(out)
    refuse_existing(target)
    for library in ("onnx", "onnxscript", "onnxruntime"):
        need(library, "onnx", "the format onnx")
    with open_model(model, inputs) as opened, drafted(target, "onnx", opened) as draft:
        if not isinstance(opened.predictor.method, Lamina):
            refuse_routed(opened, "one graph")
        config: Any = opened.learner.backbone.module.config
        if FAMILIES[config.model_type].takes_patches:
            raise ModelError(
                f"transformers computes the positions of {config.model_type} one image after another, so a graph holds for one "
                f"batch size only and is not written. `lamina serve` serves the model as it is."
            )
        classes, labels = opened.predictor.classes, opened.predictor.labels
        reference = [class_scores(scores_bj, opened.learner.outputs, classes) for scores_bj in opened.scores]
        opened.predictor.close()  # the graph is of the plain computation
        graph = Deployed(opened)
        _write(draft, graph)
        image = opened.learner.backbone.image
        write_json(draft.folder / "labels.json", {"labels": list(labels)})
        if image is not None:
            pixels = {"size": image.size, "mean": list(image.mean), "std": list(image.std), "channels": "RGB"}
            pixels |= {
                "evaluate": opened.facts.config.data.evaluate,
                "resize": "bilinear, antialiased",
                "scale": 1 / 255,
            }
            write_json(draft.folder / "preprocess.json", pixels)
        else:
            write_tokenizer(draft, opened)
            write_json(draft.folder / "preprocess.json", {"max_length": longest(opened), "padding": "longest"})
        _check(draft, reference, labels)
        feed = ", ".join(f"{name!r}: ..." for name in NAMES[opened.predictor.kind])
        draft.code = (
            f'import onnxruntime\nsession = onnxruntime.InferenceSession("{target / FILE}")\n'
            f"logits, probabilities = session.run(None, {{{feed}}})"
        )
        return finished(draft)


class Deployed(nn.Module):
    """The deployed computation as a plain module: from inputs to logits and probabilities (b, c)."""

    index_cm: Tensor

    def __init__(self, opened: Opened) -> None:
        """opened: its learner must not be used afterwards."""
        super().__init__()
        self.kind, self.learner = opened.predictor.kind, opened.learner
        self.method: Method[Any] = opened.predictor.method
        fitted = under(opened.predictor.consolidation.memory, "classifier")
        self.classifier = classifiers.classifier_of(fitted) if fitted else None
        self.layers, self.temperature = opened.facts.config.consolidation.layers, opened.predictor.temperature
        routed = isinstance(self.method, Lamina)  # its layers do not have one weight
        self.module = self.learner.backbone.module if routed else plain_module(self.learner)
        self.head = self.learner.head
        columns = [
            [j for j, o in enumerate(self.learner.outputs) if o.label == label] for label in opened.predictor.classes
        ]
        most = max(map(len, columns))
        self.register_buffer("index_cm", torch.tensor([own + own[:1] * (most - len(own)) for own in columns]))

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        inputs = dict(zip(NAMES[self.kind], given, strict=True))
        scores_bj = self.scores(self.learner, inputs)
        logits_bc = scores_bj[:, self.index_cm].amax(2)
        return logits_bc, (logits_bc / self.temperature).softmax(1)

    def scores(self, learner: Learner, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the scores (b, j), float32."""
        batch = Batch(inputs=inputs, labels_b=given_labels(inputs))
        if self.classifier is None:
            return self.method.predict(learner, batch)
        features_bd = learner.features(batch, self.layers) if self.layers > 1 else self.method.features(learner, batch)
        return self.classifier.scores(features_bd).float()


def given_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns labels for a batch that has none."""
    return next(iter(inputs.values())).flatten(1)[:, 0].long()


def _write(draft: Draft[Opened], graph: Deployed) -> None:
    """Trace the graph and write it. Batch size, and length of texts, may be any."""
    import contextlib
    import io
    import logging

    example = draft.opened.batches[0].inputs
    given = tuple(example[name][:2].repeat(2, *[1] * (example[name].ndim - 1))[:3] for name in NAMES[graph.kind])
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    axes = {0: batch} if graph.kind == "image" else {0: batch, 1: tokens}
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with silently(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            program = torch.onnx.export(
                graph.eval(),
                given,
                dynamo=True,
                input_names=list(NAMES[graph.kind]),
                output_names=["logits", "probabilities"],
                dynamic_shapes=(tuple(axes for _ in given),),
                verbose=False,
            )
            assert program is not None
            program.save(str(draft.folder / FILE), external_data=True)
    except Exception as error:
        raise ModelError(
            f"PyTorch cannot write this model as a graph ({told(error)}), so nothing was written. {INSTEAD}"
        ) from error
    finally:
        log.setLevel(level)


def _check(draft: Draft[Opened], reference: Sequence[Tensor], labels: Sequence[str]) -> None:
    """Run the graph with onnxruntime: on all batches, and on parts of the first in batches of other sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with by_library("loading the graph with onnxruntime", INSTEAD):
        session = onnxruntime.InferenceSession(str(draft.folder / FILE), options, providers=["CPUExecutionProvider"])
    names = NAMES[draft.opened.predictor.kind]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        logits, probabilities = session.run(None, {name: inputs[name].numpy() for name in names})
        found_bc = torch.from_numpy(logits)
        wanted_bc = (found_bc / draft.opened.predictor.temperature).softmax(1)
        if not torch.allclose(torch.from_numpy(probabilities), wanted_bc, atol=1e-5):
            away = float((torch.from_numpy(probabilities) - wanted_bc).abs().max())
            raise ModelError(
                f"the probabilities of the graph differ by {away:.1e} from those of its logits, and 1e-5 is allowed, so "
                f"nothing was written. {INSTEAD}"
            )
        return found_bc

    batches = draft.opened.batches
    draft.compare("onnxruntime", reference, [run(batch.inputs) for batch in batches], labels)
    first, wanted, found = batches[0].inputs, [], []
    for size in SIZES:
        rows = [row % len(batches[0]) for row in range(size)]
        wanted.append(reference[0][rows])
        found.append(run({name: first[name][rows] for name in names}))
    sizes = ", ".join(map(str, SIZES))
    draft.compare(f"onnxruntime in batches of {sizes}", wanted, found, labels, f"{sum(SIZES)} of them")
