"""Learning one task: a transaction on the directory of a model.

    data  ->  what is new in it  ->  a run of one task on top of the newest version  ->  the gate  ->  the new version

The run keeps its checkpoints in MODEL/work, so after a crash the same command goes on from there. A task that the gate refused
stays there too, trained: `force` accepts it without training it again.
"""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lamina import __version__
from lamina.backbones import Backbone
from lamina.config import EvaluationConfig, ModelConfig, fingerprint
from lamina.data import load_tokenizer
from lamina.data.names import listed
from lamina.data.streams import Scenario, Stream
from lamina.data.summary import count
from lamina.engine import checkpoint
from lamina.engine.language_state import LanguageState
from lamina.engine.loop import Event, Loop
from lamina.engine.rehearsal import chosen, keep
from lamina.engine.state import Clock, Position, RunState, now
from lamina.errors import LaminaError, ModelError
from lamina.files import replace_text, write_checked
from lamina.model import kept
from lamina.model.card import Card, Facts, LearntTask
from lamina.model.gate import GateResult, Outcomes, Probes, judged
from lamina.model.language import LanguagePredictor, first_milliseconds, outcomes_of
from lamina.model.predictor import Predictor, check_hash, load_backbone, milliseconds, outcomes, temperature_of
from lamina.model.settings import load_model_config, refuse_fixed, refuse_inapplicable, refuse_method
from lamina.model.store import BASE, PLAN, WORK, Store
from lamina.model.tasks import Labelled, Request, figures_of, labelled_examples, new_task
from lamina.record import CodeRecord, MachineRecord, SourceRecord
from lamina.runs.setup import Setup, Watch, image_transform
from lamina.runs.signals import stop_on_signals
from lamina.speed import keeping_memory
from lamina.types import SPLITS, Examples, LabelledData, Task

BEFORE = "before.json"


class GateRefused(LaminaError):
    """The gate refused a task. It is trained, and `force` accepts it."""

    def __init__(self, message: str, gate: GateResult) -> None:
        super().__init__(message)
        self.gate = gate


@dataclass(frozen=True)
class Learnt:
    """What `learn` has done."""

    card: Card
    gate: GateResult | None


def learn(store: Store, request: Request, watch: Watch) -> Learnt:
    """Learn a task and add it to a model. See `Model.learn`."""
    with store.writing():
        return _Learning(store, request, watch).run()


class _Learning:
    def __init__(self, store: Store, request: Request, watch: Watch) -> None:
        self.store, self.request, self.watch = store, request, watch
        self.earlier: tuple[Task, ...] = ()
        self.new_classes: tuple[str, ...] = ()
        self.all_names: tuple[str, ...] = ()
        self.probe_names: tuple[str, ...] = ()
        self.milliseconds = 0.0
        self.facts = store.facts()
        self.lineage = store.lineage(self.facts.head)
        self.config = self._config()
        names = [task.name for card in self.lineage for task in card.tasks]
        if request.name in names:
            raise ModelError(
                f"{store.path} has learnt a task named {request.name!r} already. Give this one another name with --name."
            )

    def _config(self) -> ModelConfig:
        settings = {"data.source": self.request.source, **dict(self.request.settings)}
        refuse_method(settings, self.facts.config, self.store.path)
        config = load_model_config(None, list(settings.items()), base=self.facts.config)
        refuse_fixed(self.facts.config, config, self.store.path)
        refuse_inapplicable(config, self.facts.kind)
        if config.backbone.name != self.facts.config.backbone.name:
            raise ModelError(
                f"backbone.name = {config.backbone.name!r}: {self.store.path} has a backbone of its own. Leave it out; if its "
                f"files were moved, say where they are: `lamina configure {self.store.path} --backbone PLACE`."
            )
        return config

    # -- what is learnt -----------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.lineage[-1].class_names if self.lineage else ()

    def cut(self, labelled: LabelledData, backbone: Backbone) -> Stream:
        """Returns the tasks learnt before, with the examples that are kept of them, and the new one."""
        if not self.earlier:
            self.earlier = self._earlier(backbone)
        task, names, mark = new_task(self.request, self.config.run, labelled, self.class_names)
        known = {name for card in self.lineage for part in card.tasks for name in part.classes}
        theirs = [names[label] for label in task.classes]
        self.new_classes = tuple(name for name in theirs if name not in known)
        scenario: Scenario = "mixed"
        if labelled.kind == "instructions":
            scenario = "domain"
        elif len(self.new_classes) in (0, len(theirs)):
            scenario = "class" if self.new_classes else "domain"
        self.all_names = names
        return Stream(
            tasks=(*self.earlier, task),
            scenario=scenario,
            data_name=labelled.name,
            kind=labelled.kind,
            class_names=names,
            fingerprint=f"{mark}/{self.facts.head or 'none'}/{self.request.name}",
        )

    def _describe(self, task: Task) -> None:
        if self.facts.kind == "language":
            counts = ", ".join(f"{len(task.split(split))} {split}" for split in SPLITS if len(task.split(split)))
            names = [self.all_names[label] for label in task.classes]
            told = "" if names == [task.name] else f", completions {listed(names, 8)}"
            self.tell(f"task {len(self.earlier) + 1}, {self.request.name!r}: instructions{told}; {counts}")
            return
        new = [name for name in (self.all_names[label] for label in task.classes) if name in self.new_classes]
        known = [name for name in (self.all_names[label] for label in task.classes) if name not in self.new_classes]
        parts = []
        if new:
            parts.append(f"{count(len(new), 'new class')} ({listed(new, 8)})")
        if known:
            parts.append(f"{count(len(known), 'known class')} again ({listed(known, 8)})")
        counts = ", ".join(f"{len(task.split(split))} {split}" for split in SPLITS if len(task.split(split)))
        self.tell(f"task {len(self.earlier) + 1}, {self.request.name!r}: {' and '.join(parts)}; {counts}")
        for name in new:
            alike = [
                old for old in self.class_names if old.casefold().strip() == name.casefold().strip() and old != name
            ]
            if alike:
                self.tell(f"note: new class {name!r} and known class {alike[0]!r} differ only in case or space")

    def _warn(self, setup: Setup, task: Task) -> None:
        """Say what a user may have overlooked in the data."""
        for one in setup.data.skipped[:10]:
            self.tell(f"left out, since it is damaged: {one}")
        if len(setup.data.skipped) > 10:
            self.tell(f"and {len(setup.data.skipped) - 10} more damaged images")
        names = {self.all_names[label] for label in task.classes}
        for card in self.lineage:
            if card.fingerprint == setup.data.fingerprint and any(names & set(part.classes) for part in card.tasks):
                self.tell(
                    f"note: {card.name!r} was learnt from the same data, so its held-out examples are no new evidence"
                )

    def tell(self, note: str) -> None:
        self.watch(None, Event(task=len(self.earlier), phase="load", note=note))

    # -- the transaction ----------------------------------------------------------------------------------------------

    def run(self) -> Learnt:
        store, facts, config = self.store, self.facts, self.config
        backbone_config = config.run
        if facts.base.embedded:
            section = config.backbone.model_copy(update={"name": str(store.path / BASE)})
            backbone_config = backbone_config.model_copy(update={"backbone": section})
        setup = Setup(backbone_config, None, self.watch, cut=self.cut)
        check_hash(setup.backbone, facts, store.path)
        setup.task_count = facts.task_count
        task = setup.stream[-1]
        self._describe(task)
        self._warn(setup, task)
        self._prepare(setup)
        before = self._before(setup)
        loop = setup.loop(store.path / WORK)
        with stop_on_signals() as should_stop, keeping_memory(), closing(setup.accelerated):
            loop.on_event, loop.should_stop = partial(self.watch, setup.stream), should_stop
            self._start(loop)
            loop.spend("load", time.perf_counter() - setup.started)
            loop.run(until="evaluate")
            temperature = 1.0
            if not loop.learner.generates:
                temperature = temperature_of(loop.learner, loop.consolidation, task, config.evaluation.batch_size)
            new = self._outcomes(loop, task.test, temperature)
            gate = self._judge(loop, before, new, temperature)
        self.tell(f"accuracy on {len(task.test)} held-out examples of {task.name!r}: {new.accuracy:.1%}")
        if gate is not None and not gate.accepted and not self.request.force:
            write_checked(store.path / WORK / "gate.json", gate.model_dump(mode="json"))
            store.note("refused", task=task.name, problems=list(gate.problems), version=facts.version)
            raise GateRefused(
                f"{store.path}: the gate refused task {task.name!r}, and the model is as it was before. "
                + ". ".join(f"{problem[0].upper()}{problem[1:]}" for problem in gate.problems)
                + ". Check the data; give the command again with --force to accept it anyway (it is trained already), or "
                "go on with other data and --discard.",
                gate,
            )
        return self._commit(setup, loop, task, new, gate, temperature)

    def _earlier(self, backbone: Backbone) -> tuple[Task, ...]:
        """Returns the tasks learnt before, with their probes as test and their kept training examples as train."""
        transform = image_transform(self.config.run, backbone) if backbone.image is not None else None
        tokenise = None
        if backbone.language is not None and backbone.tokenizer is not None:
            tokenise = load_tokenizer(backbone.tokenizer)
        found: list[Task] = []
        ids = {name: label for label, name in enumerate(self.class_names)}
        for card in self.lineage:
            sets = {
                what: kept.unpacked(self.store.kept(card.folder, what), transform, tokenise)
                for what in (kept.PROBES, kept.REHEARSAL)
            }
            for part in card.tasks:
                classes = tuple(ids[name] for name in part.classes)
                last = part is card.tasks[-1]
                found.append(
                    Task(
                        name=part.name,
                        classes=classes,
                        train=sets[kept.REHEARSAL] if last else kept.nothing(),
                        val=kept.nothing(),
                        test=sets[kept.PROBES] if last else kept.nothing(),
                    )
                )
        return tuple(found)

    def _prepare(self, setup: Setup) -> None:
        """Make MODEL/work ready for this task. Raises ModelError where another task was interrupted, or refused, there."""
        work = self.store.path / WORK
        plan = {
            "name": self.request.name,
            "source": self.request.source,
            "stream": setup.stream.fingerprint,
            "configuration": fingerprint(setup.config, setup.method.config_type),
            "command": self.request.command(self.store.path),
        }
        found = self.store.plan()
        if found is not None and not self.request.discard:
            if {**found, "command": None} == {**plan, "command": None}:
                self.tell(f"going on with {self.request.name!r}, which was interrupted or refused before")
                return
            if (work / "checkpoints").is_dir():
                raise ModelError(self._waiting(found, plan))
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        replace_text(work / PLAN, json.dumps(plan) + "\n")

    def _waiting(self, found: dict[str, Any], plan: dict[str, Any]) -> str:
        """Returns what to say where the training in MODEL/work is not the one asked for."""
        where = f"{self.store.path} holds the training of task {found.get('name')!r}, which was interrupted or refused"
        if f"/{self.facts.head or 'none'}/" not in str(found.get("stream")):
            return f"{where}, and the model has changed since, so it cannot be accepted now. Give --discard to drop it."
        if (found.get("name"), found.get("source")) == (plan["name"], plan["source"]):
            same = found.get("stream") == plan["stream"]
            what = "with other settings" if same else "and the data has changed since"
            return f"{where}, {what}. Restore what changed to go on with it, or give --discard to train it anew."
        drop = f"give --discard to drop it and learn {plan['name']!r} instead"
        return f"{where}. `{found.get('command')}` goes on with it; {drop}."

    def _before(self, setup: Setup) -> list[tuple[str, Examples, Outcomes]]:
        """Returns the probes of earlier tasks, and what the newest version predicts for them."""
        self.milliseconds = 0.0
        if self.facts.head is None:
            return []
        sets = [(task.name, task.test, self.facts.head) for task in self.earlier if len(task.test)]
        if self.request.probe is not None:
            found = self._probe(setup)
            sets.append((f"probe {Path(self.request.probe).name}", found.examples, found.fingerprint))
        file = self.store.path / WORK / BEFORE
        mark = [[name, len(examples), data] for name, examples, data in sets]
        saved = checkpoint.read_json(file) if file.is_file() else None
        if saved is None or saved["sets"] != mark:
            predictor = open_deployed(self.store, self.facts, self.lineage[-1], setup.device)
            try:
                told = [predictor.outcomes(examples) for _, examples, _ in sets]
                saved = {
                    "sets": mark,
                    "predicted": [outcome.predicted_n.tolist() for outcome in told],
                    "confidence": [
                        None if outcome.confidence_n is None else outcome.confidence_n.tolist() for outcome in told
                    ],
                    "milliseconds": predictor.milliseconds(one) if len(one := setup.stream[-1].test) else 0.0,
                }
            finally:
                predictor.close()
            replace_text(file, json.dumps(saved) + "\n")
        self.milliseconds = float(saved["milliseconds"])
        return [
            (
                name,
                examples,
                Outcomes(
                    examples.labels_n,
                    np.array(predicted, np.int64),
                    None if confidence is None else np.array(confidence, np.float64),
                ),
            )
            for (name, examples, _), predicted, confidence in zip(
                sets, saved["predicted"], saved["confidence"], strict=True
            )
        ]

    def _probe(self, setup: Setup) -> Labelled:
        """Returns the examples of known classes of the data given as a probe. Others are named and left out."""
        config = load_model_config(None, [("data.source", self.request.probe)], base=self.config)
        known = {name for card in self.lineage for part in card.tasks for name in part.classes}
        names = [name if name in known else "" for name in self.class_names] if self.facts.kind != "language" else None
        learnt_from = [card.fingerprint for card in self.lineage]
        found = labelled_examples(config.run, setup.backbone, names, learnt_from, self.watch)
        if found.unknown:
            self.tell(
                f"probe {self.request.probe}: left out, since no earlier task has them: {listed(found.unknown, 10)}"
            )
        if not len(found.examples):
            raise ModelError(
                f"--probe {self.request.probe} has no example of a class that the model knows: {listed(sorted(known), 10)}."
            )
        if names is None:
            found = self._with_own_labels(found)
        return found

    def _with_own_labels(self, found: Labelled) -> Labelled:
        """Returns labelled data of a language model with the model's class ids, and further ids for classes that are new."""
        self.probe_names = tuple(dict.fromkeys((*self.all_names, *found.class_names)))
        ids = np.array([self.probe_names.index(name) for name in found.class_names], np.int64)
        examples = Examples(found.examples.table, found.examples.rows_n, ids[found.examples.labels_n])
        return found._replace(examples=examples, class_names=self.probe_names)

    def _start(self, loop: Loop) -> None:
        """Set a loop to where this task's training is."""
        loop.restore()
        if loop.state != RunState():
            return
        number = len(self.earlier)
        if self.facts.head is not None:
            loop.adopt(*self.store.state(self.facts.head))
        loop.last_predictions = {}
        # Before its first task, nothing of a model is measured.
        before = LanguageState(zero_shot=()) if loop.learner.generates else None
        loop.state = replace(loop.state, position=Position(number, "begin"), clock=Clock(), language=before)

    def _judge(
        self, loop: Loop, before: Sequence[tuple[str, Examples, Outcomes]], new: Outcomes, temperature: float
    ) -> GateResult | None:
        if self.facts.head is None and self.config.gate.new_accuracy is None:
            return None
        one = loop.stream[-1].test
        section = self.facts.config.evaluation  # as the version before was measured, and as others measure this one
        probes = [
            Probes(name, then, self._outcomes(loop, examples, temperature, section)) for name, examples, then in before
        ]
        measured = {label for _, examples, _ in before for label in np.unique(examples.labels_n).tolist()}
        time_of = first_milliseconds if loop.learner.generates else milliseconds
        after = time_of(loop.learner, loop.consolidation, one) if len(one) else 0.0
        return judged(
            self.request.name,
            probes,
            self.probe_names or self.all_names,
            self.config.gate,
            new=new,
            milliseconds=(self.milliseconds, after) if self.milliseconds else None,
            unmeasured=self._unmeasured(before, measured),
        )

    def _unmeasured(self, before: Sequence[tuple[str, Examples, Outcomes]], classes: set[int]) -> list[str]:
        """Returns the earlier tasks without any measurement. classes: those that were measured."""
        if self.facts.kind == "language":  # whose tasks may share classes, such as yes and no
            names = {name for name, _, _ in before}
            return [task.name for task in self.earlier if task.name not in names]
        return [task.name for task in self.earlier if not classes & set(task.classes)]

    def _outcomes(
        self, loop: Loop, examples: Examples, temperature: float, section: EvaluationConfig | None = None
    ) -> Outcomes:
        """Returns the predictions of what is trained. section: by default that of this task."""
        section = section or self.config.evaluation
        if loop.learner.generates:
            return outcomes_of(loop.learner, loop.consolidation, examples, section.batch_size, section.max_new_tokens)
        return outcomes(loop.learner, loop.consolidation, examples, section.batch_size, temperature)

    def _commit(
        self, setup: Setup, loop: Loop, task: Task, new: Outcomes, gate: GateResult | None, temperature: float
    ) -> Learnt:
        store, config = self.store, self.config
        positions_n = chosen(task.test, config.probes.per_class)
        sets = {kept.PROBES: task.test.select(positions_n)}
        sets[kept.REHEARSAL] = keep(task.train, config.rehearsal.per_class)
        packed = {what: kept.packed(examples) for what, examples in sets.items() if len(examples)}
        loop.state, loop.last_predictions = self._state(loop), {}
        card = self._card(setup, loop, task, new).model_copy(
            update={
                "temperature": temperature,
                "figures": figures_of(new, self.all_names),
                "gate": gate,
                "forced": gate is not None and not gate.accepted,
                "kept": {what: kept.facts_of(tensors) for what, tensors in packed.items()},
            }
        )
        documents, tensors = loop.content()
        source = self.request.source
        store.commit(card, documents, tensors, packed, "learnt", task=task.name, forced=card.forced, data=source)
        shutil.rmtree(store.path / WORK, ignore_errors=True)
        return Learnt(card, gate)

    def _card(self, setup: Setup, loop: Loop, task: Task, new: Outcomes) -> Card:
        """Returns the card of the new version, without what was measured and what is kept."""
        entry, seconds = loop.state.lineage[-1], dict(loop.state.clock.seconds)
        return Card(
            folder=self.store.new_folder(task.name),
            parent=self.facts.head,
            version=self.facts.version + 1,
            created=now(),
            tasks=(
                LearntTask(
                    name=task.name,
                    classes=tuple(self.all_names[label] for label in task.classes),
                    new_classes=self.new_classes,
                    domains=self._domains(setup, task),
                    examples={split: len(task.split(split)) for split in SPLITS},
                    accuracy=new.accuracy,
                ),
            ),
            class_names=self.all_names,
            data=self.request.source,
            fingerprint=setup.data.fingerprint,
            source=SourceRecord(**setup.source),
            settings=dict(self.request.settings),
            seconds={phase: round(value, 3) for phase, value in (seconds | {"total": sum(seconds.values())}).items()},
            steps=entry.steps,
            trainable_parameters=entry.trainable_parameters,
            stored_parameters=entry.stored_parameters,
            machine=MachineRecord(**setup.environment.to_json()),
            code=CodeRecord(version=__version__, commit=setup.environment.commit),
        )

    def _state(self, loop: Loop) -> RunState:
        """Returns what the next task needs to know: where the model is, and a line for every task."""
        number = len(self.earlier)
        state = loop.state.with_entry(
            stored_parameters=loop.learner.stored_parameters(),
            memory_bytes=loop.method.memory_bytes + loop.consolidation.memory_bytes,
        )
        return RunState(lineage=state.lineage, position=Position(number, "done"), clock=state.clock)

    def _domains(self, setup: Setup, task: Task) -> tuple[str, ...]:
        if len(setup.data.domain_names) < 2:
            return ()
        found = np.unique(setup.data.domains_n[task.train.rows_n])
        return tuple(setup.data.domain_names[domain] for domain in found.tolist())


def open_deployed(store: Store, facts: Facts, card: Card, device: str = "cpu") -> Predictor | LanguagePredictor:
    """Returns one version of a model in memory."""
    documents, tensors = store.state(card.folder)
    kind = LanguagePredictor if facts.kind == "language" else Predictor
    return kind(facts, card, documents, tensors, load_backbone(facts, store.path), device)


def open_version(store: Store, facts: Facts, card: Card, device: str = "cpu") -> Predictor:
    """Returns one version of a classifier in memory. Raises ModelError for a language model."""
    found = open_deployed(store, facts, card, device)
    if isinstance(found, LanguagePredictor):
        found.close()
        raise ModelError(f"{store.path} is a language model, and this needs a classifier.")
    return found
