"""The classifier of an export: linear in the features of the last block, one line of weights per output of the head.

Shape letters: b batch, d width, j outputs of the head.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lamina.errors import MethodError, ModelError
from lamina.export.opened import Opened
from lamina.maths import classifiers
from lamina.maths.class_statistics import Statistics
from lamina.maths.classifiers import LinearClassifier
from lamina.methods.base import under
from lamina.methods.color import CoLoR
from lamina.methods.duallora import DualLoRA
from lamina.methods.lamina import Lamina

ROUTED = (CoLoR, DualLoRA, Lamina)
"""Methods whose choice or scale of adapters an export computes."""


@dataclass(frozen=True)
class LinearOutputs:
    """s = f W^T + b on the features of the last block, float32. Several outputs may belong to one class: its score is their
    maximum, so the largest output names the predicted class."""

    weight_jd: Tensor
    bias_j: Tensor
    labels: tuple[str, ...]
    """The class of every output."""
    tasks: tuple[str, ...]
    """The task of every output."""
    refitted: str | None = None
    """What it replaces, if the deployed classifier cannot be written as one matrix."""
    scaled: bool = False
    """Whether the model divides the scores of an input by the length of its features, which changes no predicted class."""
    accuracy: tuple[float, float] | None = None
    """Of the deployed classifier and of this one, on the inputs of the comparison; None where it is the same or unknown."""
    same_class: float = 1.0
    """Share of the compared inputs for which it names the same class as the model."""

    def scores(self, features_bd: Tensor) -> Tensor:
        """Returns the scores (b, j), float64."""
        scores_bj: Tensor = features_bd.double() @ self.weight_jd.double().T + self.bias_j.double()
        return scores_bj

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        """The first output of every class."""
        return {label: self.labels.index(label) for label in dict.fromkeys(self.labels)}


def refuse_routed(opened: Opened, what: str) -> None:
    """Raises MethodError for a model whose update depends on the input."""
    routed = {
        name for site in opened.learner.sites.values() for name, part in site.finished().items() if not part.folded
    }
    if routed:
        method = opened.predictor.method
        instead = "No format does; `lamina serve` serves the model as it is."
        if isinstance(method, ROUTED):
            graph = ", and `--format onnx` one graph" if isinstance(method, Lamina) else ""
            instead = f"`--format peft-tasks` writes an adapter per task and the router{graph}."
        raise MethodError(
            f"method {method.name!r} selects or scales adapters for each input, so no single update says what it does, and "
            f"{what} cannot hold it. {instead}"
        )


def linear_outputs(opened: Opened) -> LinearOutputs:
    """Returns the classifier that an export gets: the deployed one where it is linear in the features of the last block, else
    one refitted from the stored statistics. Raises ModelError where there is neither."""
    outputs, memory = opened.learner.outputs, opened.predictor.consolidation.memory
    labels = tuple(opened.predictor.class_names[output.label] for output in outputs)
    tasks = tuple(output.task for output in outputs)
    fitted, config = under(memory, "classifier"), opened.facts.config.consolidation
    if not fitted:
        return _own(opened, own_outputs(opened))
    deployed, width = classifiers.classifier_of(fitted), opened.learner.backbone.width
    if isinstance(deployed, LinearClassifier) and deployed.weight_jd.shape[1] == width:
        return LinearOutputs(*_centred(deployed), labels, tasks)
    if "statistics/means_jd" not in memory:
        raise ModelError(
            f"{opened.path} holds no statistics of its classes, so its {config.classifier} classifier cannot be refitted as "
            f"one matrix. `--format onnx` writes it as it is."
        )
    last = last_block(Statistics.of_tensors(under(memory, "statistics")), width)
    fit = classifiers.ncm if config.classifier == "ncm" else classifiers.lda
    weight_jd, bias_j = _centred(fit(last))
    kind = "ncm" if config.classifier == "ncm" else "lda"
    told = f"{config.classifier} on {config.layers} block{'s' if config.layers > 1 else ''}, replaced by {kind} on the last one"
    found = LinearOutputs(weight_jd, bias_j, labels, tasks, refitted=told)
    ids = torch.tensor([output.label for output in outputs])
    mine = [ids[found.scores(features_bd).argmax(1)] for features_bd in opened.features()]
    deployed_b = torch.cat(opened.deployed_classes())
    found = replace(found, same_class=float((torch.cat(mine) == deployed_b).double().mean()))
    after, before = opened.accuracy(mine), opened.accuracy(opened.deployed_classes())
    return found if after is None or before is None else replace(found, accuracy=(before, after))


def own_outputs(opened: Opened) -> LinearOutputs:
    """Returns the blocks of the method's own head as one matrix."""
    blocks, outputs = list(opened.learner.head.blocks), opened.learner.outputs
    weight_jd, bias_j = (torch.cat([getattr(block, part).detach() for block in blocks]) for part in ("weight", "bias"))
    labels = tuple(opened.predictor.class_names[output.label] for output in outputs)
    return LinearOutputs(weight_jd, bias_j, labels, tuple(output.task for output in outputs))


def last_block(statistics: Statistics, width: int) -> Statistics:
    """Returns the statistics of the last `width` features, those of the last block."""
    return statistics._replace(
        means_jd=statistics.means_jd[:, -width:],
        scatter_dd=statistics.scatter_dd[-width:, -width:],
        class_factors_jdr=statistics.class_factors_jdr[:, -width:],
        blocks=1,
    )


def _centred(classifier: LinearClassifier) -> tuple[Tensor, Tensor]:
    """Returns weight and bias without what all outputs share, float32. Neither the predicted class nor a softmax changes, and
    the scores lose less to rounding."""
    weight_jd, bias_j = classifier
    return (weight_jd - weight_jd.mean(0)).float(), (bias_j - bias_j.mean()).float()


def _own(opened: Opened, found: LinearOutputs) -> LinearOutputs:
    """Returns the method's own outputs. Raises MethodError where it predicts otherwise than by them on the features of the last
    block."""
    features, method = torch.cat(opened.features()), opened.predictor.method
    mine_nj, scores_nj = found.scores(features), torch.cat(opened.scores).double()
    limit = 1e-3 * float(mine_nj.std(correction=0)) + 1e-5 * float(mine_nj.abs().max())
    if float((mine_nj - scores_nj).abs().max()) <= limit:
        return found
    cosine_nj = scores_nj * features.double().norm(dim=1, keepdim=True)
    if not found.bias_j.any() and float((mine_nj - cosine_nj).abs().max()) <= limit:
        return replace(found, scaled=True)
    raise MethodError(
        f"method {method.name!r} with these settings does not predict with one matrix on its features "
        f"({', '.join(f'{k} = {v!r}' for k, v in method.config)}). `--format onnx` writes it as it is."
    )
