"""Setup: everything a run needs, made from its configuration."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina import backbones, data
from lamina import config as configuration
from lamina.backbones import Backbone
from lamina.config import MethodConfig, RunConfig
from lamina.data import Source, streams
from lamina.data.streams import Stream
from lamina.engine import device
from lamina.engine.fitting import check_method_for_language, check_scenario_for_language
from lamina.engine.loop import Event, Loop
from lamina.engine.world import ALONE, World
from lamina.errors import ConfigError
from lamina.learner import LanguageLearner, Learner, learner_of
from lamina.methods import METHODS
from lamina.methods.base import Method
from lamina.runs import limits
from lamina.runs.environment import Environment
from lamina.speed import accelerate, held, precision, shard
from lamina.types import SPLITS, Ints, Kind, LabelledData

Watch = Callable[[Stream | None, Event], None]
"""Is told the progress. There is no stream yet while data is loaded."""
TAKEN: Mapping[str, tuple[Kind, ...]] = {
    "image": ("image",),
    "text": ("text",),
    "language": ("instructions", "text"),
}
"""The kinds of examples that a backbone of each kind takes."""
MakeLoop = Callable[..., Loop]
"""Called with the arguments of `Loop`."""


def load_config(file: Path | None, overrides: list[tuple[str, Any]]) -> RunConfig:
    """Returns the configuration of a YAML file with settings on top. Raises ConfigError naming every error."""
    return configuration.load(
        file, overrides, method_settings=method_settings(), schema=RunConfig, is_language=backbones.is_language
    )


def method_settings() -> dict[str, type[MethodConfig]]:
    """Returns the settings of every method, by its name."""
    return {name: method.config_type for name, method in METHODS.items()}


class Setup:
    """Everything a run needs, made from its configuration.

    environment: that of the run if it has begun before. watch: is told what was found in the data, and the progress of loading.
    cut: makes the stream of the data, decoded or not, for a backbone; by default as the configuration describes it. world: the
    processes that make the run together.
    Raises ConfigError, DataError, BackboneError or MethodError for what cannot be run.
    """

    def __init__(
        self,
        config: RunConfig,
        environment: Environment | None,
        watch: Watch = lambda *_: None,
        *,
        cut: Callable[[LabelledData, Backbone], Stream] | None = None,
        world: World = ALONE,
    ) -> None:
        self.world, self.watch, whole = world, watch, cut is None
        self.started = time.perf_counter()
        self.config = config
        cut = cut or (lambda labelled, _: make_stream(config, labelled))
        self.method = METHODS[config.method["name"]]
        self._check_jobs()
        settings = {key: value for key, value in config.method.items() if key != "name"}
        self.settings = self.method.config_type(**settings)
        if environment is None:
            limits.check_machine(config)
        self.device = device.resolve(environment.device if environment else config.device)
        self.backbone = backbones.load(
            config.backbone.name,
            image_size=config.backbone.image_size,
            pooling=config.backbone.pooling,
            mean=config.backbone.mean,
            std=config.backbone.std,
        )
        limits.check_backbone(config, self.settings, self.backbone)
        if self.backbone.kind == "language":  # what the loop checks too, but before the data are read
            check_method_for_language(self.method, self.backbone.name, METHODS)
            if whole:
                check_scenario_for_language(config.stream.scenario)
        self.backbone_parameters = sum(p.numel() for p in self.backbone.module.parameters())
        source = open_source(config)
        self.source = data.as_dict(source)
        """What was found in the data: layout, classes and their counts, and what was left out."""
        if environment is None:
            for line in data.describe_source(source):
                watch(None, Event(task=0, phase="load", note=line))
        check_kind(config, source, self.backbone)
        planned = cut(data.undecoded(source), self.backbone)
        self._check_validation(planned)  # before anything is decoded
        used = np.concatenate([task.split(split).rows_n for task in planned for split in SPLITS])
        self.data = decode(config, source, self.backbone, watch, used)
        self.stream = cut(self.data, self.backbone)
        self.task_count: int | None = len(self.stream)
        self._check_validation(self.stream)  # damaged images may have been left out
        device.prepare(self.device)
        self.environment = environment or Environment.decide(config, self.device, self.backbone.width)
        torch.set_num_threads(self.environment.threads)

    def _check_jobs(self) -> None:
        if self.config.jobs > 1 and not self.method.independent:
            independent = ", ".join(name for name, known in METHODS.items() if known.independent)
            raise ConfigError(
                f"jobs = {self.config.jobs}: method {self.method.name!r} learns each task from the tasks before it, so its "
                f"tasks cannot be trained in parallel. Leave jobs at 1, or choose a method that learns every task from the "
                f"pre-trained model: {independent}."
            )
        if self.config.jobs > 1 and self.config.rehearsal.per_class:
            raise ConfigError(
                f"jobs = {self.config.jobs}: with rehearsal.per_class = {self.config.rehearsal.per_class} each task is also "
                f"trained on examples of the tasks before it, so tasks cannot be trained in parallel. Leave jobs at 1, or "
                f"rehearsal.per_class at 0."
            )

    def _check_validation(self, stream: Stream) -> None:
        without = [task.name for task in stream if not len(task.val)]
        if self.config.evaluation.split == "val" and without:
            raise ConfigError(
                f"evaluation.split = 'val': task {without[0]!r} has no validation examples that can be read. Hold some out, "
                f"for example with --set stream.validation=0.2"
            )

    def _text(self) -> tuple[Tensor, ...]:
        """Returns the tokens of the text whose perplexity is measured; none for backbones that are no language models."""
        backbone = self.backbone
        if backbone.language is None or backbone.tokenizer is None:
            return ()
        return data.text_windows(
            self.config.evaluation.text,
            backbone.tokenizer,
            positions=backbone.positions,
            vocabulary=backbone.vocabulary,
        )

    def _learner(self) -> Learner:
        """Returns the learner, with the frozen weights shared out over the processes where that is wanted."""
        section, world = self.config.backbone, self.world
        # With its number: "cuda" alone is the first GPU in every thread that was not told another.
        where = torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")
        sharded = section.shard and world.size > 1
        if section.shard and not sharded:
            note = "backbone.shard has no effect in a single process. `torchrun` starts several: see docs/clusters.md"
            self.watch(None, Event(task=0, phase="load", note=note))
        if sharded:
            adapted = {site.path for site in self.backbone.sites_of(section.targets, section.blocks)}
            shard(self.backbone, adapted, world, where)
        dtype = precision.DTYPES[self.environment.precision]
        learner = learner_of(self.backbone, section.targets, section.blocks, dtype, where)
        if sharded and world.is_first:
            here, total = held(learner)
            note = f"frozen weights: {here / 1e6:,.1f} of {total / 1e6:,.1f} MB in each of {world.size} processes"
            self.watch(None, Event(task=0, phase="load", note=note))
        return learner

    def loop(self, out: Path, make_loop: MakeLoop = Loop) -> Loop:
        """Returns a new loop whose checkpoints lie in the directory `out`."""
        config = self.config
        learner = self._learner()
        if config.training.gradient_checkpointing:
            if not isinstance(learner, LanguageLearner):
                raise ConfigError(
                    f"training.gradient_checkpointing is for causal language models, and backbone {self.backbone.name!r} is "
                    f"none. Leave it out."
                )
            learner.recompute = True
        self.accelerated = accelerate(learner, self.world)
        method: Method[Any] = self.method(self.settings, self.task_count)
        try:
            return make_loop(
                learner=learner,
                method=method,
                stream=self.stream,
                training=config.training,
                evaluation=config.evaluation,
                consolidation=config.consolidation,
                rehearsal=config.rehearsal,
                seed=config.seed,
                checkpoints=out / "checkpoints",
                checkpoint_seconds=config.checkpoint_seconds,
                steps=self.accelerated,
                text=self._text(),
                identity={
                    "configuration": configuration.fingerprint(config, self.method.config_type),
                    "stream": self.stream.fingerprint,
                    "backbone": self.backbone.hash,
                },
            )
        except BaseException:
            self.accelerated.close()
            raise


def open_source(config: RunConfig) -> Source:
    """Returns the examples of a configuration, not decoded yet."""
    section = config.data
    return data.open_source(
        section.source,
        kind=section.kind,
        columns=data.Columns(**section.columns.model_dump()),
        test_fraction=section.test_fraction,
    )


def load_data(config: RunConfig, backbone: Backbone, watch: Watch = lambda *_: None) -> LabelledData:
    """Returns the labelled data of a configuration, as this backbone takes it."""
    source = open_source(config)
    check_kind(config, source, backbone)
    return decode(config, source, backbone, watch)


def check_kind(config: RunConfig, source: Source, backbone: Backbone) -> None:
    """Raises ConfigError for examples of a kind that the backbone does not take."""
    taken = TAKEN[backbone.kind]
    if source.kind in taken:
        return
    remedy = "Choose a backbone or data to match (--backbone, --data)."
    if source.kind == "instructions":
        remedy = "Choose a causal language model as the backbone, or labelled data (a class for each example)."
    raise ConfigError(
        f"data.source = {config.data.source!r} holds {data.kinds(source.kind)}, and backbone {backbone.name!r} takes "
        f"{' and labelled '.join(data.kinds(kind) for kind in taken)}. {remedy}"
    )


def decode(
    config: RunConfig, source: Source, backbone: Backbone, watch: Watch, used: Ints | None = None
) -> LabelledData:
    """Returns the labelled data of a source, decoded or tokenised for this backbone. used: the rows that are tokenised as
    instructions; all if None."""
    section = config.data
    if backbone.image is None:
        if backbone.tokenizer is None:
            raise ConfigError(
                f"backbone.name = {config.backbone.name!r} has no tokenizer beside its weights. Put tokenizer.json or "
                f"vocab.txt into its folder."
            )
        if "instructions" in TAKEN[backbone.kind]:
            return decode_instructions(config, source, backbone, watch, used)
        return data.load_texts(
            source,
            backbone.tokenizer,
            max_length=section.text_length,
            positions=backbone.positions,
            vocabulary=backbone.vocabulary,
        )
    transform = image_transform(config, backbone)
    cache = Path(section.cache).expanduser() if section.cache else None

    def progress(done: int, total: int) -> None:
        watch(None, Event(task=0, phase="load", done=done, total=total))

    return data.load_images(source, transform, cache=cache, on_damaged=section.on_damaged, progress=progress)


def decode_instructions(
    config: RunConfig, source: Source, backbone: Backbone, watch: Watch, used: Ints | None = None
) -> LabelledData:
    """Returns instructions, or labelled texts as instructions, tokenised for a causal language model. used: as in `decode`.

    Tells `watch` how texts are asked, and how many prompts are cut.
    """
    assert backbone.tokenizer is not None
    section = config.data
    if source.kind == "text":
        source = data.as_instructions(source, section.template)
        watch(None, Event(task=0, phase="load", note=f"layout: {source.layout}"))
    labelled = data.load_instructions(
        source,
        backbone.tokenizer,
        max_length=section.max_length,
        positions=backbone.positions,
        vocabulary=backbone.vocabulary,
        form=section.form,
        used=used,
    )
    cut = {split: rows for split, rows in data.truncation(labelled).items() if rows}
    if cut:
        told = ", ".join(f"{split} {rows}" for split, rows in cut.items())
        watch(None, Event(task=0, phase="load", note=f"truncated: the middle of {sum(cut.values())} prompts ({told})"))
    return labelled


def image_transform(config: RunConfig, backbone: Backbone) -> data.ImageTransform:
    """Returns how images are prepared for a backbone of images."""
    assert backbone.image is not None
    section = config.data
    return data.ImageTransform(
        size=backbone.image.size,
        mean=backbone.image.mean,
        std=backbone.image.std,
        evaluate=section.evaluate,
        train=section.augment,
        scale=section.crop_scale,
    )


def make_stream(config: RunConfig, labelled: LabelledData) -> Stream:
    """Returns the stream that a configuration describes. Raises DataError where the data cannot be split that way."""
    section = config.stream
    if section.scenario == "mixed":
        if section.plan is None:
            raise ConfigError(
                "stream.scenario = 'mixed' needs stream.plan: a list of tasks with name, classes, domains."
            )
        plan = streams.named_plan(labelled, [(p.name, p.classes, p.domains) for p in section.plan])
    elif section.scenario == "domain":
        plan = streams.domain_plan(labelled, section.domains, section.order_seed)
    else:
        plan = streams.class_plan(labelled, section.tasks, section.order_seed)
    stream = streams.make_stream(
        labelled,
        plan,
        section.scenario,
        per_class=config.data.per_class,
        validation=section.validation,
        measured_per_class=config.evaluation.per_class,
        per_task=config.data.per_task,
        measured_per_task=config.evaluation.per_task,
    )
    if section.first is not None:
        stream = stream.first(section.first)
    return stream.joint() if section.joint else stream


def check_stream(config: RunConfig) -> None:
    """Raises what `make_stream` raises for this configuration, without decoding any data."""
    make_stream(config, data.undecoded(open_source(config)))
