"""The learner: a frozen backbone, its adapters and the head."""

from collections.abc import Sequence
from typing import Literal

import torch

from lamina.backbones import Backbone
from lamina.learner.head import Head, Output, class_scores, drawn, local_labels
from lamina.learner.language import LanguageLearner
from lamina.learner.learner import Draw, Learner
from lamina.learner.moments import Watcher
from lamina.learner.sites import AdapterSite

__all__ = [
    "AdapterSite",
    "Draw",
    "Head",
    "LanguageLearner",
    "Learner",
    "Output",
    "Watcher",
    "class_scores",
    "drawn",
    "learner_of",
    "local_labels",
]


def learner_of(
    backbone: Backbone,
    targets: Sequence[str],
    blocks: Sequence[int] | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | Literal["cpu", "cuda"] = "cpu",
) -> Learner:
    """Returns the learner for this kind of backbone. Arguments and errors are those of `Learner`."""
    kind = Learner if backbone.language is None else LanguageLearner
    return kind(backbone, targets, blocks, dtype, device)
