"""Deployed: one version of a model in memory, whatever it predicts."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lamina.backbones import Backbone, Kind
from lamina.engine.consolidate import Consolidation
from lamina.engine.loop import restore
from lamina.errors import ModelError
from lamina.learner import learner_of
from lamina.methods import METHODS
from lamina.model.card import Card, Facts
from lamina.speed import accelerate, precision


class Deployed(ABC):
    """A version of a model in memory. Its weights are folded, so a prediction costs what the bare backbone
    costs, or two passes where adapters are routed.

    It may be used by one thread at a time; others wait. `close` frees its threads.
    Raises ModelError where the version does not fit its settings or its backbone.
    """

    def __init__(
        self,
        facts: Facts,
        card: Card,
        documents: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        backbone: Backbone,
        device: str = "cpu",
    ) -> None:
        config = facts.config.run
        self.version = facts.version if card.folder == facts.head else card.version
        self.card, self.config, self.backbone = card, config, backbone
        self.class_names, self.temperature = card.class_names, card.temperature
        self.lock, self._open = threading.Lock(), ExitStack()
        dtype = precision.DTYPES["bf16" if config.precision == "bf16" else "fp32"]
        where = torch.device(device)
        self.learner = learner_of(backbone, config.backbone.targets, config.backbone.blocks, dtype, where)
        method = METHODS[config.method["name"]]
        settings = {key: value for key, value in config.method.items() if key != "name"}
        self.method = method(method.config_type(**settings), facts.task_count)
        self.consolidation = Consolidation(config.consolidation, self.method)
        try:
            restore(self.learner, self.method, self.consolidation, documents["state"]["outline"], tensors)
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"version {card.folder} does not fit its settings or its backbone ({type(error).__name__}: {error}). It was "
                f"edited, or is of another model."
            ) from error
        self._open.callback(accelerate(self.learner).close)
        for layer in self.learner.layers.values():
            layer.fold_live()
        try:
            self.prepare()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def prepare(self) -> None:
        """Make what predictions need beside the learner. Raises what is wrong with it."""

    @property
    def kind(self) -> Kind:
        return self.backbone.kind

    def close(self) -> None:
        self._open.close()
