"""OpenedLanguage: a causal language model in float32, from a finished run or a model, with prompts to compare exports on.

Shape letters: b batch, t tokens, n chosen tokens.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina import backbones, data
from lamina.backbones import Backbone
from lamina.config import RunConfig
from lamina.data.arrays import ArrayItems
from lamina.data.instruction_table import Renderer
from lamina.data.prompts import stop_tokens
from lamina.data.records import Row, Source
from lamina.engine import checkpoint
from lamina.errors import DataError, LaminaError, ModelError
from lamina.export.opened import SENTENCES, lines_of
from lamina.learner import LanguageLearner, learner_of
from lamina.methods import METHODS
from lamina.methods.base import Method
from lamina.model import Model, kept
from lamina.runs.directory import CONFIG, begun, read_record
from lamina.runs.setup import check_kind, decode, make_stream, open_source
from lamina.types import Batch, Examples, Instruction, Instructions, Ints, LabelledData

MOST_PROMPTS, PART = 16, 8
"""Prompts that an export is compared on, and how many of them are in one batch."""
MOST_NEW = 24
"""Tokens that are generated for each."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a finished run or a model holds of a language model."""

    path: Path
    what: str
    """What `path` is, for people."""
    config: RunConfig
    precision: str
    """That it runs in."""
    backbone: str
    """Where its base is now."""
    base: str
    """What the base is called."""
    hash: str
    documents: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    version: int | None = None
    task_count: int | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(part["task"] for part in self.documents["state"]["outline"]["head"])


def is_language(path: Path) -> bool:
    """Returns whether this is a run or a model of a causal language model. Raises RunError for a run that is not finished,
    ModelError for one of another kind."""
    if not (path / CONFIG).is_file():
        return Model(path).store.facts().kind == "language"
    backbone = read_record(path).backbone
    if backbone is not None and backbone.kind == "language":
        return True
    raise ModelError(
        f"{path} is a run of a classifier, and a run is exported for language models only. Make a model of it first: "
        f"`lamina create MODEL --from-run {path}`."
    )


def saved(path: Path) -> Saved:
    """Returns what a run or a model holds. Raises RunError or ModelError where a run is not finished, a checkpoint is damaged,
    or nothing was learnt."""
    if not (path / CONFIG).is_file():
        return _of_model(path)
    read_record(path)
    start, loaded = begun(path), checkpoint.load_newest(path / "checkpoints")
    if loaded is None or loaded.damaged:
        told = "; ".join(loaded.damaged.values()) if loaded else f"{path} has no checkpoint"
        raise ModelError(f"{told}. Run it again, or restore the checkpoint from a backup.")
    state, name = loaded.documents["state"], start.config.backbone.name
    if state["position"]["phase"] != "done":
        raise ModelError(
            f"{path}: the newest checkpoint is not that of the finished run. `lamina resume {path}` ends it."
        )
    return Saved(
        path=path,
        what="a finished run",
        config=start.config,
        precision=start.environment.precision,
        backbone=name,
        base=name,
        hash=state["identity"]["backbone"],
        documents=loaded.documents,
        tensors=loaded.tensors,
        task_count=len(state["outline"]["head"]),
    )


def _of_model(path: Path) -> Saved:
    store = Model(path).store
    facts = store.facts()
    if facts.head is None:
        raise ModelError(f"{path} has learnt no task yet. `lamina learn {path} DATA` teaches it one.")
    documents, tensors = store.state(facts.head)
    config = facts.config.run
    return Saved(
        path=path,
        what=f"version {facts.version} of a model",
        config=config,
        precision="bf16" if config.precision == "bf16" else "fp32",
        backbone=str(path / "base") if facts.base.embedded else config.backbone.name,
        base=facts.base.name,
        hash=facts.base.hash,
        documents=documents,
        tensors=tensors,
        version=facts.version,
        task_count=facts.task_count,
    )


@dataclass
class OpenedLanguage:
    """A language model that is exported, computed in float32 on the CPU, with prompts to compare on."""

    saved: Saved
    learner: LanguageLearner
    method: Method[Any]
    examples: tuple[Examples, ...]
    """The prompts with their completions, in one part for each table that holds some."""
    origin: str
    renderer: Renderer
    """Makes prompts and tokens of texts."""
    as_run: float | None = field(default=None)
    """Share of prompts after which the same tokens are generated in the precision that the model runs in; None if that is
    float32."""

    @property
    def backbone(self) -> Backbone:
        return self.learner.backbone

    @property
    def sentence(self) -> str:
        """What it is, for the README of an export."""
        tasks = self.saved.tasks
        return (
            f"{self.saved.what}: method `{self.method.name}`, base `{self.saved.base}`, {len(tasks)} "
            f"task{'s' if len(tasks) > 1 else ''}"
        )

    @property
    def facts_to_write(self) -> dict[str, Any]:
        """What `export.json` says of it."""
        return {
            "model_version": self.saved.version,
            "method": self.method.name,
            "base": {"name": self.saved.base, "sha256": self.saved.hash},
            "tasks": list(self.saved.tasks),
            "form": self.saved.config.data.form,
        }

    @property
    def first_note(self) -> str | None:
        """What a user should know where the model runs in another precision."""
        if self.as_run is None:
            return None
        return (
            f"It is compared in float32, in which the code computes too. The model runs in bf16 here, and then writes the same "
            f"tokens after {self.as_run:.1%} of {self.origin}."
        )

    @cached_property
    def whole(self) -> tuple[Batch, ...]:
        """Prompts with their completions."""
        return tuple(examples.batch(part) for examples, part in self._parts())

    @cached_property
    def asked(self) -> tuple[Batch, ...]:
        """The prompts alone."""
        found = []
        for examples, part in self._parts():
            inputs, right_b = table_of(examples).questions(examples.rows_n[part])
            names = ("input_ids", "attention_mask")
            found.append(Batch(inputs={name: inputs[name] for name in names}, labels_b=right_b))
        return tuple(found)

    @cached_property
    def read(self) -> tuple[Instruction, ...]:
        """The prompts as texts, in the order of `whole` and `asked`."""
        return tuple(table_of(one).read(int(row)) for one, part in self._parts() for row in one.rows_n[part])

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        return table_of(self.examples[0]).pad_id

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns these tokens as text, without special tokens."""
        return table_of(self.examples[0]).decode(tokens)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a completion: those of the data, and those that the base names."""
        own = sorted({token for examples in self.examples for token in table_of(examples).stops})
        return stop_tokens(own, self.backbone.module)

    def _parts(self) -> list[tuple[Examples, Ints]]:
        found = []
        for examples in self.examples:
            order_n = np.argsort(examples.lengths(), kind="stable")
            found += [(examples, order_n[start : start + PART]) for start in range(0, len(order_n), PART)]
        return found


def table_of(examples: Examples) -> Instructions:
    """Returns the table of instructions."""
    assert isinstance(examples.table, Instructions)
    return examples.table


def open_language(path: Path, inputs: str | os.PathLike[str] | None = None) -> OpenedLanguage:
    """Returns the language model of a finished run or a model, in float32, with prompts: those given, else a model's probes or
    test examples of a run's data, else sentences.

    inputs: a file with a prompt per line. Raises ModelError where other weights are in the base's place, or nothing was
    learnt; DataError for a file that cannot be read.
    """
    found = saved(path)
    learner, method = _restored(found, torch.float32)
    if learner.backbone.tokenizer is None:
        raise DataError(f"backbone {found.backbone!r} has no tokenizer beside its weights. Put tokenizer.json there.")
    tokenise = data.load_tokenizer(learner.backbone.tokenizer)
    examples, origin = _prompts(found, learner.backbone, tokenise, None if inputs is None else Path(inputs))
    renderer = Renderer(tokenise, learner.backbone.tokenizer, found.config.data.form)
    return OpenedLanguage(found, learner, method, examples, origin, renderer)


def in_its_precision(opened: OpenedLanguage) -> LanguageLearner | None:
    """Returns the learner in the precision that the model runs in, None if that is float32."""
    return _restored(opened.saved, torch.bfloat16)[0] if opened.saved.precision == "bf16" else None


def _restored(found: Saved, dtype: torch.dtype) -> tuple[LanguageLearner, Method[Any]]:
    backbone, config = backbones.load(found.backbone, dtype=dtype), found.config
    if backbone.hash != found.hash:
        raise ModelError(
            f"the weights at {found.backbone} are not those of {found.path}: their hash is {backbone.hash[:12]}, and it was "
            f"made with {found.hash[:12]}. Put the right ones there."
        )
    learner = learner_of(backbone, config.backbone.targets, config.backbone.blocks, dtype)
    assert isinstance(learner, LanguageLearner)
    kind = METHODS[config.method["name"]]
    settings = {key: value for key, value in config.method.items() if key != "name"}
    method = kind(kind.config_type(**settings), found.task_count)
    learner.restore(found.documents["state"]["outline"], found.tensors["learner"], method.branch_type)
    method.memory = {name: value.clone() for name, value in found.tensors["memory"].items()}
    return learner, method


def _prompts(found: Saved, backbone: Backbone, tokenise: Any, inputs: Path | None) -> tuple[tuple[Examples, ...], str]:
    """Returns instructions to compare on, and what they are."""
    if inputs is not None:
        texts = lines_of(inputs, "prompt")[:MOST_PROMPTS]
        return _of_texts(found, backbone, texts), f"{len(texts)} prompts from {inputs}"
    if found.version is not None:
        probes = _probes(found.path, tokenise)
        if probes:
            return probes, f"{sum(map(len, probes))} probes of {len(probes)} task{'s' if len(probes) > 1 else ''}"
        return _of_texts(found, backbone, SENTENCES), f"{len(SENTENCES)} sentences, since the model keeps no probes"
    try:
        return _of_data(found.config, backbone)
    except LaminaError as error:
        reason = str(error).splitlines()[0].rstrip(".")
    told = f"{len(SENTENCES)} sentences, since its data is not at hand ({reason})"
    return _of_texts(found, backbone, SENTENCES), told


def _probes(path: Path, tokenise: Any) -> tuple[Examples, ...]:
    """Returns probes that the model keeps, evenly over its tasks."""
    model = Model(path)
    stored = [model.store.kept(card.folder, kept.PROBES) for card in model.cards]
    sets = [kept.unpacked(packed, None, tokenise) for packed in stored if packed is not None]
    each = max(1, MOST_PROMPTS // max(1, len(sets)))
    return tuple(_evenly(examples, each) for examples in sets if len(examples))


def _evenly(examples: Examples, most: int) -> Examples:
    return examples.select(np.linspace(0, len(examples) - 1, min(most, len(examples))).astype(np.int64))


def _of_data(config: RunConfig, backbone: Backbone) -> tuple[tuple[Examples, ...], str]:
    """Takes test examples of every task, evenly; training examples where a task has no others."""
    source = open_source(config)
    check_kind(config, source, backbone)
    parts = [task.test if len(task.test) else task.train for task in make_stream(config, data.undecoded(source))]
    each = max(1, MOST_PROMPTS // len(parts))
    rows_n = np.concatenate([_evenly(part, each).rows_n for part in parts])[:MOST_PROMPTS]
    labelled = decode(config, source, backbone, lambda *_: None, rows_n)
    origin = f"{len(rows_n)} prompts of {len(parts)} task{'s' if len(parts) > 1 else ''}"
    return (_examples(labelled, rows_n),), origin


def _of_texts(found: Saved, backbone: Backbone, texts: Sequence[str]) -> tuple[Examples, ...]:
    zeros_n = np.zeros(len(texts), np.int64)
    source = Source(
        kind="instructions",
        name="input",
        items=ArrayItems("input", [Row(prompt=text, completion=".") for text in texts]),
        labels_n=zeros_n,
        splits_n=zeros_n,
        domains_n=zeros_n,
        class_names=("?",),
        domain_names=("all",),
        fingerprint="",
    )
    labelled = decode(found.config, source, backbone, lambda *_: None, np.arange(len(texts)))
    return (_examples(labelled, np.arange(len(texts))),)


def _examples(labelled: LabelledData, rows_n: Ints) -> Examples:
    return Examples(labelled.table, rows_n, np.zeros(len(rows_n), np.int64))
