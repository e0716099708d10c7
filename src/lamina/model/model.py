"""Model: a directory that keeps learning."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina import backbones
from lamina.backbones import Backbone
from lamina.config import ModelConfig
from lamina.data import Chat
from lamina.data.inputs import Input, payloads
from lamina.data.names import listed
from lamina.engine import device
from lamina.engine.consolidate import Consolidation
from lamina.engine.fitting import check_rehearsal
from lamina.engine.state import now
from lamina.errors import DataError, ModelError
from lamina.files import read_checked
from lamina.learner import learner_of
from lamina.methods import METHODS
from lamina.model import kept, learning, readme
from lamina.model.card import Base, Card, Facts, Figures
from lamina.model.from_run import version_of_run
from lamina.model.gate import GateResult
from lamina.model.language import Completion, LanguagePredictor
from lamina.model.learning import Learnt, open_deployed
from lamina.model.predictor import Prediction, Predictor, load_backbone
from lamina.model.settings import load_model_config, refuse_fixed, refuse_inapplicable
from lamina.model.store import BASE, FILE, WORK, Store
from lamina.model.tasks import Request, figures_of, labelled_examples
from lamina.runs import directory, limits
from lamina.runs.setup import Watch
from lamina.speed import precision


@dataclass(frozen=True)
class Evaluation:
    """What a model predicts for labelled data."""

    source: str
    figures: Figures
    unknown: tuple[str, ...]
    """Classes of the data that the model does not know. Their examples were not measured."""
    skipped: tuple[str, ...] = ()
    """Damaged images, if they were left out."""


class Model:
    """A directory that keeps learning. Its methods read the directory anew, so several processes may use it at once.

    Raises ModelError where `path` is no model, is damaged, or is of another version of lamina.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.store = Store(self.path)
        self.store.facts()
        self._predictor: Predictor | LanguagePredictor | None = None
        self._loaded: tuple[Facts, str] | None = None

    # -- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        backbone: str | None = None,
        method: str | None = None,
        settings: Mapping[str, Any] | None = None,
        file: Path | None = None,
        embed_base: bool = False,
        task_count: int | None = None,
    ) -> "Model":
        """Make a model that has learnt nothing yet. Returns it.

        backbone: `nano` (the default), a folder or file with weights, or a hub name. method: one of `lamina methods`. settings:
        any setting by dotted key, such as {"probes.per_class": 20}. file: a YAML file with settings. embed_base: copy the
        backbone's files into the model, which otherwise remembers their name and hash. task_count: the number of tasks
        to come, if it is known, for methods that use it.
        Raises ModelError where something is at `path` already; ConfigError or BackboneError for what cannot be.
        """
        given = dict(settings or {})
        if backbone is not None:
            given["backbone.name"] = backbone
        if method is not None:
            given["method.name"] = method
        config = load_model_config(file, list(given.items()))
        return cls._begin(Path(path), config, embed_base=embed_base, task_count=task_count)

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        settings: Mapping[str, Any] | None = None,
        embed_base: bool = False,
    ) -> "Model":
        """Make a model of a finished run: it has learnt the run's tasks. Returns it. Raises RunError where it is not
        finished."""
        found = version_of_run(Path(run), dict(settings or {}))
        model = cls._begin(
            Path(path), found.config, embed_base=embed_base, task_count=found.task_count, weights=found.backbone
        )
        with model.store.writing():
            folder = model.store.new_folder(found.card.tasks[-1].name)
            card = found.card.model_copy(update={"folder": folder})
            names = [task.name for task in card.tasks]
            model.store.commit(card, found.documents, found.tensors, {}, "opened a run", run=str(run), tasks=names)
            readme.write(model.store)
        return model

    @classmethod
    def _begin(
        cls,
        path: Path,
        config: ModelConfig,
        *,
        embed_base: bool,
        task_count: int | None = None,
        weights: str | None = None,
    ) -> "Model":
        """weights: the hash that the backbone must have."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            what = "is a model already" if (path / FILE).is_file() else "exists and is not an empty directory"
            raise ModelError(f"{path} {what}. Choose another path, or remove it.")
        whole = directory.with_whole_paths(config.run)
        section = config.backbone
        backbone = backbones.load(
            section.name, image_size=section.image_size, pooling=section.pooling, mean=section.mean, std=section.std
        )
        if weights is not None and backbone.hash != weights:
            raise ModelError(
                f"the weights at {section.name} are not those of the run: their hash is {backbone.hash[:12]}, and it used "
                f"{weights[:12]}. Put the right ones there."
            )
        parameters = sum(p.numel() for p in backbone.module.parameters())
        refuse_inapplicable(config, backbone.kind)
        check(config, backbone)
        where = device.resolve(config.device)
        config = config.model_copy(
            update={
                "backbone": whole.backbone,
                "precision": precision.resolve(config.precision, backbone.width, where),
            }
        )
        try:
            path.mkdir(parents=True, exist_ok=True)
            if embed_base:
                backbones.copy_files(section.name, path / BASE)
        except OSError as error:
            raise ModelError(f"{path} cannot be made ({error.strerror}). Choose another path.") from error
        facts = Facts(
            created=now(),
            kind=backbone.kind,
            base=Base(
                name=whole.backbone.name,
                hash=backbone.hash,
                embedded=embed_base,
                parameters=parameters,
                licence=backbones.licence(section.name),
            ),
            config=config,
            task_count=task_count,
        )
        store = Store(path)
        store.write_facts(facts)
        store.note("created", backbone=whole.backbone.name, method=config.method["name"], version=0)
        readme.write(store)
        return cls(path)

    # -- learning -----------------------------------------------------------------------------------------------------

    def learn(
        self,
        data: str | os.PathLike[str],
        *,
        name: str | None = None,
        classes: Sequence[str] | None = None,
        domains: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        probe: str | os.PathLike[str] | None = None,
        force: bool = False,
        discard: bool = False,
        watch: Watch = lambda *_: None,
    ) -> Learnt:
        """Learn the next task, and add it to the model if the gate accepts it. Returns its card and what the gate has found.

        data: a folder of class folders, Parquet or CSV file(s), a saved or hub dataset. name: of the task; by default that of
        the data. classes, domains: learn only these of the data. settings: for this task only. probe: labelled data to measure
        earlier classes on, besides the probes that are kept. force: accept the task whatever the gate says; recorded. discard:
        drop another task that was interrupted or refused. watch: is told the progress.

        A crash, Ctrl-C or a full disk leaves the version before; learning the same data again goes on from the last checkpoint.
        Raises GateRefused where a limit is broken; ModelError where another process changes the model; DataError, ConfigError,
        BackboneError, MethodError or TrainingError where the task cannot be learnt; Interrupted when asked to stop.
        """
        source = os.fspath(data)
        folder = Path(source).expanduser().resolve()
        if folder.is_dir() and self.path.resolve().is_relative_to(folder):
            raise ModelError(
                f"{self.path} lies inside the data {folder}, where it would be read as data. Move it elsewhere."
            )
        request = Request(
            source=str(Path(source).expanduser().resolve()) if Path(source).expanduser().exists() else source,
            name=name or task_name(source),
            classes=None if classes is None else tuple(classes),
            domains=None if domains is None else tuple(domains),
            settings=tuple((settings or {}).items()),
            probe=None if probe is None else os.fspath(probe),
            force=force,
            discard=discard,
        )
        learnt = learning.learn(self.store, request, watch)
        readme.write(self.store)
        return learnt

    def rollback(self, task: str | None = None) -> Card | None:
        """Go back to the version right after a task; None: to before the first. Returns its card. Later versions stay on disk,
        and a rollback to one of them brings it back. Raises ModelError for a task that the model never learnt."""
        with self.store.writing():
            facts, card = self.store.facts(), None
            if task is not None:
                card = self._find(task)
                if self.store.pruned(card.folder):
                    raise ModelError(f"the version of task {task!r} was pruned or is damaged, so it cannot come back.")
            changed = facts.model_copy(update={"head": card.folder if card else None, "version": facts.version + 1})
            self.store.write_facts(changed)
            self.store.note("rolled back", task=task, version=changed.version, folder=card.folder if card else None)
            readme.write(self.store)
        return card

    def _find(self, task: str) -> Card:
        """Returns the newest version that ends with this task, or has this folder. Damaged versions are passed over."""
        if task in self.store.versions():
            return self.store.card(task)
        found: list[Card] = []
        for folder in self.store.versions():
            try:
                found.append(self.store.card(folder))
            except ModelError:
                continue
        for card in reversed(found):
            if task == card.name:
                return card
            if task in [part.name for part in card.tasks]:
                raise ModelError(
                    f"{self.path} has no version for task {task!r} alone: it came with the run that ends with {card.name!r}. "
                    f"Name {card.name!r}."
                )
        names = [part.name for card in found for part in card.tasks]
        raise ModelError(f"{self.path} never learnt a task {task!r}. It has learnt: {listed(names, 30) or 'nothing'}.")

    def configure(self, settings: Mapping[str, Any]) -> ModelConfig:
        """Change settings for the future: limits of the gate, probes, rehearsal, training, or the place of the backbone.
        Returns them all. Raises ConfigError for what the weights depend on, once a task is learnt."""
        with self.store.writing():
            facts = self.store.facts()
            config = load_model_config(None, list(settings.items()), base=facts.config)
            refuse_inapplicable(config, facts.kind)
            if facts.versions:
                refuse_fixed(facts.config, config, self.path)
            base = facts.base
            if config.backbone.name != facts.config.backbone.name:
                config = config.model_copy(update={"backbone": directory.with_whole_paths(config.run).backbone})
                base = base.model_copy(update={"embedded": False, "name": config.backbone.name})
            changed = facts.model_copy(update={"config": config, "base": base})
            if base != facts.base:
                load_backbone(changed, self.path)
            self.store.write_facts(changed)
            self.store.note("configured", settings=dict(settings))
            readme.write(self.store)
            return config

    def prune(self, keep: int) -> int:
        """Delete what only versions before the newest `keep` need, and versions that were rolled back. Returns how many bytes
        that took. Raises ModelError for a number below 1."""
        if keep < 1:
            raise ModelError(f"keep = {keep}: at least the newest version must stay. Give 1 or more.")
        with self.store.writing():
            size = self.store.prune(keep)
            self.store.note("pruned", keep=keep, bytes=size)
            return size

    def forget_kept(self, task: str | None = None) -> int:
        """Delete the examples that the model keeps, of one task or of all. Returns how many bytes they took."""
        with self.store.writing():
            folders = self.store.versions() if task is None else [self._find(task).folder]
            size = sum(self.store.delete_kept(f, what) for f in folders for what in (kept.PROBES, kept.REHEARSAL))
            self.store.note("deleted kept examples", task=task, bytes=size)
            return size

    # -- using it -----------------------------------------------------------------------------------------------------

    def predictor(self, where: str | None = None) -> Predictor:
        """Returns the newest version of a classifier in memory. It is loaded again when the model has changed.

        where: cpu or cuda; by default as configured. Raises ModelError for a language model.
        """
        found = self.deployed(where)
        if isinstance(found, LanguagePredictor):
            raise ModelError(f"{self.path} is a language model, and this needs a classifier.")
        return found

    def language(self, where: str | None = None) -> LanguagePredictor:
        """Returns the newest version of a language model in memory, as `predictor` does. Raises ModelError for a classifier."""
        found = self.deployed(where)
        if isinstance(found, Predictor):
            raise ModelError(f"{self.path} is a classifier, which ranks no options and writes no text.")
        return found

    def deployed(self, where: str | None = None) -> Predictor | LanguagePredictor:
        """Returns the newest version in memory, whatever it predicts."""
        facts = self.store.facts()
        wanted = (facts, where or device.resolve(facts.config.device))
        if self._predictor is None or self._loaded != wanted:
            if facts.head is None:
                raise ModelError(f"{self.path} has learnt no task yet. `lamina learn {self.path} DATA` teaches it one.")
            fresh = open_deployed(self.store, facts, self.store.card(facts.head), wanted[1])
            if self._predictor is not None:
                self._predictor.close()
            self._predictor, self._loaded = fresh, wanted
        return self._predictor

    def predict(
        self,
        inputs: Input | Iterable[Input | Chat],
        top: int = 1,
        *,
        options: Sequence[str] | Sequence[Sequence[str]] | None = None,
        max_new_tokens: int | None = None,
        chat: bool | None = None,
    ) -> list[Prediction] | list[Completion]:
        """Returns a prediction for each input: for images a file, a folder of files, encoded bytes, an array (h, w, 3) uint8 or
        a PIL image; for texts a string. An input that cannot be read gets an error in its place.

        A language model returns what `complete` returns, which documents options, max_new_tokens and chat. They are for
        language models only, and `top` is for classifiers only; a ModelError says so.
        """
        found = self.deployed()
        if isinstance(found, LanguagePredictor):
            if top != 1:
                raise ModelError(f"top = {top}: a language model has no classes. Give `options` to rank texts.")
            return self.complete(inputs, options, max_new_tokens=max_new_tokens, chat=chat)  # type: ignore[arg-type]
        if (options, max_new_tokens, chat) != (None, None, None):
            raise ModelError(
                "options, max_new_tokens and chat are for language models. Leave them out for a classifier."
            )
        return found.predict(payloads(inputs, found.kind), top)  # type: ignore[arg-type]

    def complete(
        self,
        prompts: str | Iterable[str | Chat],
        options: Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        chat: bool | None = None,
    ) -> list[Completion]:
        """Returns the completion of each prompt: generated text, or ranked options.

        prompts: a text, several, or chats (lists of {role, content}). options: texts to rank, for all prompts or one list for
        each. max_new_tokens: the most tokens that are generated; by default evaluation.max_new_tokens. stop: a text that
        ends a completion, or several. chat: whether texts are rendered with the tokenizer's chat template; by default as
        data.form says.
        A prompt that cannot be read has an empty text, and says why in `error`. Raises ModelError for a classifier, DataError
        for options that are wrong for all prompts, and ConfigError for a max_new_tokens that is not allowed or an empty stop
        text.
        """
        if not isinstance(prompts, Iterable):
            raise DataError(f"prompts are {prompts!r}. Give a text, a chat, or a list of them.")
        several: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if several and all(isinstance(one, Mapping) for one in several):
            several = [several]  # one chat
        return self.language().complete(several, options, max_new_tokens=max_new_tokens, stop=stop, chat=chat)

    def evaluate(self, data: str | os.PathLike[str], watch: Watch = lambda *_: None) -> Evaluation:
        """Measure the newest version on labelled data: on its test split, or on all of it where it has none. Classes are
        matched by name; a language model may be asked about any. Raises ModelError where there is nothing to measure."""
        predictor, facts = self.deployed(), self.store.facts()
        config = load_model_config(None, [("data.source", os.fspath(data))], base=facts.config).run
        names = None
        if isinstance(predictor, Predictor):
            names = [name if k in predictor.classes else "" for k, name in enumerate(predictor.class_names)]
        learnt_from = [card.fingerprint for card in self.cards]
        found = labelled_examples(config, predictor.backbone, names, learnt_from, watch)
        if not len(found.examples):
            known = predictor.labels if isinstance(predictor, Predictor) else ()
            told = f"no example of a class that {self.path} knows: {listed(known, 20)}" if known else "no example"
            raise ModelError(f"{data} has {told}.")
        figures = figures_of(predictor.outcomes(found.examples), found.class_names)
        return Evaluation(os.fspath(data), figures, tuple(found.unknown), found.skipped)

    def gate(self) -> GateResult | None:
        """Returns what the gate found for the newest task: of one that waits because it was refused, else of the newest
        version; None where there was nothing to compare."""
        waiting = self.waiting()
        if waiting is not None:
            return waiting
        facts = self.store.facts()
        return None if facts.head is None else self.store.card(facts.head).gate

    def waiting(self) -> GateResult | None:
        """Returns what the gate found for a task that it refused and that can still be accepted; None if there is none."""
        file, plan = self.path / WORK / "gate.json", self.store.plan()
        if (
            plan is None
            or not file.is_file()
            or f"/{self.store.facts().head or 'none'}/" not in str(plan.get("stream"))
        ):
            return None
        return GateResult.model_validate(read_checked(file))

    # -- what it says about itself ------------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        return self.store.facts()

    @property
    def version(self) -> int:
        """Counts tasks learnt, and rollbacks."""
        return self.store.facts().version

    @property
    def cards(self) -> list[Card]:
        """The cards of the newest version and of all before it, the oldest first."""
        return self.store.lineage(self.store.facts().head)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes it knows, in the order in which they came."""
        return tuple(dict.fromkeys(name for card in self.cards for task in card.tasks for name in task.classes))

    @property
    def history(self) -> list[dict[str, Any]]:
        """Everything that happened to it, the oldest first."""
        return self.store.events()


def check(config: ModelConfig, backbone: Backbone) -> None:
    """Raises ConfigError, BackboneError or MethodError for settings that do not go together, or with the backbone, which is
    used up by it."""
    method = METHODS[config.method["name"]]
    settings = method.config_type(**{key: value for key, value in config.method.items() if key != "name"})
    limits.check_machine(config)
    limits.check_backbone(config, settings, backbone)
    check_rehearsal(config.rehearsal, method)
    learner = learner_of(backbone, config.backbone.targets, config.backbone.blocks)
    Consolidation(config.consolidation, method(settings)).check(learner)


def task_name(source: str) -> str:
    """Returns the name of a task for which none is given: that of its data."""
    path = Path(source).expanduser()
    name = path.resolve().name if path.is_dir() else path.stem
    return name.removeprefix("hf:") or "task"
