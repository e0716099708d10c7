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
from lamina.config import ModelConfig, fingerprint
from lamina.data.names import listed
from lamina.data.streams import Scenario, Stream
from lamina.data.summary import count
from lamina.engine import checkpoint
from lamina.engine.loop import Event, Loop
from lamina.engine.rehearsal import chosen, keep
from lamina.engine.state import Clock, Position, RunState, now
from lamina.errors import CheckpointError, LaminaError, ModelError
from lamina.files import replace_text, write_checked
from lamina.maths.metrics import AccuracyMatrix
from lamina.model import kept
from lamina.model.card import Card, Facts, LearntTask
from lamina.model.gate import GateResult, Outcomes, Probes, judged
from lamina.model.predictor import Predictor, load_backbone, milliseconds, outcomes, temperature_of
from lamina.model.settings import load_model_config, refuse_fixed
from lamina.model.store import WORK, Store
from lamina.model.tasks import Request, figures_of, labelled_examples, new_task
from lamina.record import CodeRecord, MachineRecord, SourceRecord
from lamina.runs.setup import Setup, Watch, image_transform
from lamina.runs.signals import stop_on_signals
from lamina.speed import keeping_memory
from lamina.types import SPLITS, Examples, Ints, LabelledData, Task

PLAN, BEFORE = "plan.json", "before"


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
        self.facts = store.facts()
        self.lineage = store.lineage(self.facts.head)
        self.started = time.perf_counter()
        self.config = self._config()
        names = [task.name for card in self.lineage for task in card.tasks]
        if request.name in names:
            raise ModelError(
                f"{store.path} has learnt a task named {request.name!r} already. Give this one another name with --name."
            )

    def _config(self) -> ModelConfig:
        settings = {"data.source": self.request.source, **dict(self.request.settings)}
        if self.facts.head is not None:
            refuse_fixed(self.request.settings, self.store.path)
        return load_model_config(None, list(settings.items()), base=self.facts.config)

    # -- what is learnt -----------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.lineage[-1].class_names if self.lineage else ()

    def cut(self, labelled: LabelledData) -> Stream:
        """Returns the tasks learnt before, with the examples that are kept of them, and the new one."""
        task, names, mark = new_task(self.request, self.config.run, labelled, self.class_names)
        known = {name for card in self.lineage for part in card.tasks for name in part.classes}
        theirs = [names[label] for label in task.classes]
        self.new_classes = tuple(name for name in theirs if name not in known)
        scenario: Scenario = "mixed"
        if len(self.new_classes) in (0, len(theirs)):
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

    earlier: tuple[Task, ...] = ()

    def _describe(self, task: Task) -> None:
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

    def tell(self, note: str) -> None:
        self.watch(None, Event(task=len(self.earlier), phase="load", note=note))

    # -- the transaction ----------------------------------------------------------------------------------------------

    def run(self) -> Learnt:
        store, facts, config = self.store, self.facts, self.config
        backbone_config = config.run
        if facts.base.embedded:
            section = config.backbone.model_copy(update={"name": str(store.path / "base")})
            backbone_config = backbone_config.model_copy(update={"backbone": section})
        self.earlier = self._earlier()
        setup = Setup(backbone_config, None, self.watch, cut=self.cut)
        if setup.backbone.hash != facts.base.hash:
            load_backbone(facts, store.path)  # says what is wrong
        setup.task_count = facts.task_count
        task = setup.stream[-1]
        self._describe(task)
        self._prepare(setup)
        before = self._before(setup)
        loop = setup.loop(store.path / WORK)
        with stop_on_signals() as should_stop, keeping_memory(), closing(setup.accelerated):
            loop.on_event, loop.should_stop = partial(self.watch, setup.stream), should_stop
            self._start(loop)
            loop.run(until="evaluate")
            temperature = temperature_of(loop.learner, loop.consolidation, task, config.evaluation.batch_size)
            new = outcomes(loop.learner, loop.consolidation, task.test, config.evaluation.batch_size, temperature)
            gate = self._judge(loop, before, new, temperature)
        self._report(task, new)
        if gate is not None and not gate.accepted and not self.request.force:
            write_checked(store.path / WORK / "gate.json", gate.model_dump(mode="json"))
            store.note("refused", task=task.name, problems=list(gate.problems), version=facts.version)
            raise GateRefused(
                f"{store.path}: the gate refused task {task.name!r}, and the model is as it was before. "
                + ". ".join(f"{problem[0].upper()}{problem[1:]}" for problem in gate.problems)
                + ". Check the data; give the command again with --force to accept it all the same (it is trained already), or "
                "go on with other data and --discard.",
                gate,
            )
        return self._commit(setup, loop, task, new, gate, temperature)

    def _earlier(self) -> tuple[Task, ...]:
        """Returns the tasks learnt before, with their probes as test and their kept training examples as train."""
        transform = None
        found: list[Task] = []
        if self.facts.kind == "image" and self.lineage:
            transform = image_transform(self.config.run, load_backbone(self.facts, self.store.path))
        ids = {name: label for label, name in enumerate(self.class_names)}
        for card in self.lineage:
            sets = {
                what: kept.unpacked(self.store.kept(card.folder, what), transform)
                for what in (kept.PROBES, kept.REHEARSAL)
            }
            for part in card.tasks:
                classes = tuple(ids[name] for name in part.classes)
                last = part == card.tasks[-1]
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
            "settings": dict(self.request.settings),
        }
        if (work / PLAN).is_file():
            try:
                found = checkpoint.read_json(work / PLAN)
            except CheckpointError:
                found = None
            if found == plan:
                self.tell(f"going on with {self.request.name!r}, which was interrupted or refused before")
                return
            if not self.request.discard and isinstance(found, dict) and checkpoint.load_newest(work / "checkpoints"):
                raise ModelError(self._waiting(found, plan))
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_plan(work / PLAN, plan)

    def _waiting(self, found: dict[str, Any], plan: dict[str, Any]) -> str:
        """Returns what to say where the training in MODEL/work is not the one asked for."""
        where = f"{self.store.path} holds the training of task {found.get('name')!r}, which was interrupted or refused"
        if (found.get("name"), found.get("source")) == (plan["name"], plan["source"]):
            same = found.get("stream") == plan["stream"]
            what = "with other settings" if same else "and the data or the model has changed since"
            return f"{where}, {what}. Restore what changed to go on with it, or give --discard to train it anew."
        again = f"lamina learn {self.store.path} {found.get('source')}"
        return f"{where}. `{again}` goes on with it; give --discard to drop it and learn {plan['name']!r} instead."

    def _before(self, setup: Setup) -> list[tuple[str, Examples, Outcomes]]:
        """Returns the probes of earlier tasks, and what the newest version predicts for them."""
        if self.facts.head is None:
            return []
        sets = [(task.name, task.test) for task in self.earlier if len(task.test)]
        if self.request.probe is not None:
            sets.append((f"probe {Path(self.request.probe).name}", self._probe(setup)))
        file = self.store.path / WORK / f"{BEFORE}.json"
        mark = [[name, len(examples), int(examples.labels_n.sum())] for name, examples in sets]
        saved = checkpoint.read_json(file) if file.is_file() else None
        self.milliseconds = 0.0
        if saved is None or saved["sets"] != mark:
            predictor = open_version(self.store, self.facts, self.lineage[-1], setup.device)
            try:
                found = [predictor.outcomes(examples) for _, examples in sets]
                one = setup.stream[-1].test
                saved = {
                    "sets": mark,
                    "predicted": [outcome.predicted_n.tolist() for outcome in found],
                    "confidence": [outcome.confidence_n.tolist() for outcome in found],
                    "milliseconds": predictor.milliseconds(one) if len(one) else 0.0,
                }
            finally:
                predictor.close()
            write_plan(file, saved)
        self.milliseconds = float(saved["milliseconds"])
        return [
            (
                name,
                examples,
                Outcomes(examples.labels_n, np.array(predicted, np.int64), np.array(confidence, np.float64)),
            )
            for (name, examples), predicted, confidence in zip(
                sets, saved["predicted"], saved["confidence"], strict=True
            )
        ]

    def _probe(self, setup: Setup) -> Examples:
        """Returns the examples of known classes of the data given as a probe. Others are named and left out."""
        config = load_model_config(None, [("data.source", self.request.probe)], base=self.config)
        found = labelled_examples(config.run, setup.backbone, self.class_names, self.watch)
        if found.unknown:
            self.tell(
                f"probe {self.request.probe}: left out, since no earlier task has them: {listed(found.unknown, 10)}"
            )
        if not len(found.examples):
            raise ModelError(
                f"--probe {self.request.probe} has no example of a class that the model knows: {listed(self.class_names, 10)}."
            )
        return found.examples

    def _start(self, loop: Loop) -> None:
        """Set a loop to where this task's training is."""
        loop.restore()
        if loop.state != RunState():
            return
        number = len(self.earlier)
        if self.facts.head is not None:
            loop.adopt(*self.store.state(self.facts.head))
        loop.last_predictions = {}
        loop.state = replace(loop.state, position=Position(number, "begin"), clock=Clock())

    def _judge(
        self, loop: Loop, before: Sequence[tuple[str, Examples, Outcomes]], new: Outcomes, temperature: float
    ) -> GateResult | None:
        if self.facts.head is None:
            return None
        size = self.config.evaluation.batch_size
        probes = [
            Probes(name, then, outcomes(loop.learner, loop.consolidation, examples, size, temperature))
            for name, examples, then in before
        ]
        one = loop.stream[-1].test
        times = (self.milliseconds, milliseconds(loop.learner, loop.consolidation, one)) if len(one) else None
        return judged(
            self.request.name,
            probes,
            self.all_names,
            self.config.gate,
            new=new,
            milliseconds=times,
            unmeasured=[task.name for task in self.earlier if not len(task.test)] if self.request.probe is None else (),
        )

    def _report(self, task: Task, new: Outcomes) -> None:
        self.watch(
            None,
            Event(
                task=len(self.earlier),
                phase="load",
                note=f"accuracy on {len(task.test)} held-out examples of {task.name!r}: {new.accuracy:.1%}",
            ),
        )

    def _commit(
        self, setup: Setup, loop: Loop, task: Task, new: Outcomes, gate: GateResult | None, temperature: float
    ) -> Learnt:
        store, config = self.store, self.config
        positions_n = chosen(task.test, config.probes.per_class)
        sets = {kept.PROBES: task.test.select(positions_n)}
        sets[kept.REHEARSAL] = keep(task.train, config.rehearsal.per_class)
        packed = {what: kept.packed(examples) for what, examples in sets.items() if len(examples)}
        loop.state = self._state(loop, new, positions_n)
        loop.last_predictions = {}
        card = self._card(setup, loop, task).model_copy(
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

    def _card(self, setup: Setup, loop: Loop, task: Task) -> Card:
        """Returns the card of the new version, without what was measured and what is kept."""
        entry, seconds = loop.state.lineage[-1], loop.state.clock.seconds
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
                ),
            ),
            class_names=self.all_names,
            data=self.request.source,
            fingerprint=setup.data.fingerprint,
            source=SourceRecord(**setup.source),
            settings=dict(self.request.settings),
            seconds={phase: round(value, 3) for phase, value in seconds.items()}
            | {"total": round(time.perf_counter() - self.started, 3)},
            steps=entry.steps,
            trainable_parameters=entry.trainable_parameters,
            stored_parameters=entry.stored_parameters,
            machine=MachineRecord(**setup.environment.to_json()),
            code=CodeRecord(version=__version__, commit=setup.environment.commit),
        )

    def _state(self, loop: Loop, new: Outcomes, positions_n: Ints) -> RunState:
        """Returns the state with the new task done. Its accuracies are those on the probes, or on the held-out examples of a
        task without any."""
        number = len(self.earlier)
        subset = new.select(positions_n) if len(positions_n) else new
        state = loop.state.with_entry(
            accuracy_when_learnt=new.accuracy if len(new.labels_n) else None,
            stored_parameters=loop.learner.stored_parameters(),
            memory_bytes=loop.method.memory_bytes + loop.consolidation.memory_bytes,
        )
        rows = AccuracyMatrix.empty()
        for row in range(number):  # an older matrix may have been measured otherwise
            rows = rows.with_row({j: _cell(state.matrix, row, j) for j in range(row + 1)})
        return replace(
            state,
            matrix=rows.with_row({number: (subset.correct, len(subset.labels_n))}),
            position=Position(number, "done"),
            clock=replace(state.clock, finished={str(number): now()}),
        )

    def _domains(self, setup: Setup, task: Task) -> tuple[str, ...]:
        if len(setup.data.domain_names) < 2:
            return ()
        found = np.unique(setup.data.domains_n[task.train.rows_n])
        return tuple(setup.data.domain_names[domain] for domain in found.tolist())


def _cell(matrix: AccuracyMatrix, row: int, column: int) -> tuple[int, int]:
    if row >= matrix.tasks or column >= matrix.correct_ij.shape[1]:
        return 0, 0
    return int(matrix.correct_ij[row, column]), int(matrix.total_ij[row, column])


def open_version(store: Store, facts: Facts, card: Card, device: str = "cpu") -> Predictor:
    """Returns one version of a model in memory."""
    documents, tensors = store.state(card.folder)
    return Predictor(facts, card, documents, tensors, load_backbone(facts, store.path), device)


def write_plan(path: Path, content: Any) -> None:
    """Write JSON as a whole."""
    replace_text(path, json.dumps(content) + "\n")
