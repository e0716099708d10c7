"""Streams: an immutable sequence of tasks cut from one labelled dataset.

    class-incremental   each task brings new classes
    domain-incremental  the same classes in a new domain each time
    task-incremental    like class-incremental, but a test example comes with the name of its task
    mixed               any plan: new classes, known ones in a new domain, or both

One plan (which classes and domains each task has) describes them all; nothing else knows the scenario.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lamina import rng
from lamina.data.names import listed
from lamina.errors import DataError
from lamina.types import SPLITS, Examples, Ints, Kind, LabelledData, Split, Task

Scenario = Literal["class", "domain", "task", "mixed"]


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """What one task is made of: class ids, and domain ids (None: all domains)."""

    name: str
    classes: tuple[int, ...]
    domains: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A sequence of tasks. There is no cursor on it: any number of loops may run over it at once."""

    tasks: tuple[Task, ...]
    scenario: Scenario
    data_name: str
    kind: Kind
    class_names: tuple[str, ...]
    fingerprint: str
    """Of the data, the plan, and every choice of rows: two streams with one fingerprint hold the same examples."""

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]

    @property
    def task_aware(self) -> bool:
        """Whether a test example comes with the name of its task."""
        return self.scenario == "task"

    def first(self, tasks: int) -> "Stream":
        """Its first tasks. Raises DataError where it has fewer."""
        if not 1 <= tasks <= len(self):
            raise DataError(f"stream.first = {tasks}: the stream has {len(self)} tasks. Choose 1 to {len(self)}.")
        return replace(self, tasks=self.tasks[:tasks], fingerprint=_hash("first", tasks, self.fingerprint))

    def joint(self) -> "Stream":
        """One task with the data of all: what continual learning gives up, and so its ceiling."""
        classes = tuple(dict.fromkeys(label for task in self.tasks for label in task.classes))

        def union(split: Split) -> Examples:
            parts = [task.split(split) for task in self.tasks]
            rows, labels = (np.concatenate([getattr(p, field) for p in parts]) for field in ("rows_n", "labels_n"))
            return Examples(parts[0].table, rows, labels)

        whole = Task(name="joint", classes=classes, train=union("train"), val=union("val"), test=union("test"))
        return replace(self, tasks=(whole,), fingerprint=_hash("joined", self.fingerprint))


def class_plan(data: LabelledData, tasks: int, order_seed: int | None = None) -> tuple[PlannedTask, ...]:
    """`tasks` groups of classes, as equal as can be (the first ones larger by one where it does not divide), in the
    dataset's order of classes or in one drawn from a seed. Raises DataError for more tasks than classes."""
    count = len(data.class_names)
    if not 1 <= tasks <= count:
        raise DataError(
            f"stream.tasks = {tasks}: {data.name!r} has {count} classes, and every class-incremental task brings at least "
            f"one. Choose 1 to {count} tasks."
        )
    order = np.arange(count) if order_seed is None else rng.permutation(count, order_seed, 0xC1A55)
    digits = max(2, len(str(tasks)))
    return tuple(
        PlannedTask(name=f"task-{t + 1:0{digits}d}", classes=tuple(int(c) for c in part))
        for t, part in enumerate(np.array_split(order, tasks))
    )


def domain_plan(
    data: LabelledData, domains: Sequence[str] | None = None, order_seed: int | None = None
) -> tuple[PlannedTask, ...]:
    """One task per domain, in the dataset's order or the one given, shuffled by a seed if there is one; each has all classes
    that occur in its domain.
    Raises DataError for an unknown domain, or where there is only one."""
    names = list(domains or data.domain_names)
    unknown = [name for name in names if name not in data.domain_names]
    if domains is None and len(names) < 2:
        raise DataError(
            f"{data.name!r} has a single domain, {names[0]!r}, and every task of a domain-incremental stream is a domain. Give "
            f"its rows domains, in a column or by folders; or learn it as one task of a model: `lamina create`, `lamina learn`."
        )
    if unknown:
        raise DataError(
            f"stream.domains: {', '.join(map(repr, unknown))} not found in {data.name!r}, whose domains are "
            f"{listed(data.domain_names, 20)}."
        )
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(
            f"stream.domains = {names}: a domain-incremental stream needs two or more different domains of {data.name!r}, "
            f"which has {list(data.domain_names)}."
        )
    if order_seed is not None:
        names = [names[k] for k in rng.permutation(len(names), order_seed, 0xD03A1)]
    plan = []
    for name in names:
        domain = data.domain_names.index(name)
        classes = np.unique(data.labels_n[(data.domains_n == domain) & (data.splits_n == 0)])
        plan.append(PlannedTask(name=name, classes=tuple(int(c) for c in classes), domains=(domain,)))
    return tuple(plan)


def named_plan(
    data: LabelledData, plan: Sequence[tuple[str, Sequence[str], Sequence[str] | None]]
) -> tuple[PlannedTask, ...]:
    """A plan from names: (task, classes, domains or None for all). Raises DataError naming each unknown class or domain."""
    class_id = {name: i for i, name in enumerate(data.class_names)}
    domain_id = {name: i for i, name in enumerate(data.domain_names)}
    unknown = [f"class {c!r} of task {t!r}" for t, cs, _ in plan for c in cs if c not in class_id]
    unknown += [f"domain {d!r} of task {t!r}" for t, _, ds in plan for d in ds or () if d not in domain_id]
    if unknown:
        raise DataError(
            f"stream.plan: {data.name!r} has no {', no '.join(unknown)}. Its domains are {list(data.domain_names)}; "
            f"its classes are {list(data.class_names)[:20]}{' ...' if len(class_id) > 20 else ''}."
        )
    return tuple(
        PlannedTask(
            name=task,
            classes=tuple(class_id[c] for c in classes),
            domains=None if domains is None else tuple(domain_id[d] for d in domains),
        )
        for task, classes, domains in plan
    )


def make_stream(
    data: LabelledData,
    plan: Sequence[PlannedTask],
    scenario: Scenario,
    *,
    per_class: int | None = None,
    validation: float = 0.0,
    measured_per_class: int | None = None,
    per_task: int | None = None,
    measured_per_task: int | None = None,
) -> Stream:
    """Cut a dataset by a plan.

    per_class: at most this many training examples of each class in each domain, the same ones for every seed of a run.
    validation: where the data has no validation split of its own, this share of each class's training examples is held
    out for it (at least one is left to train on), before `per_class` is counted, and then at most as many as that.
    measured_per_class: at most this many test and validation examples of each class in each domain. per_task,
    measured_per_task: the same for each task as a whole, with as equal numbers of its classes as there are.
    Raises DataError where two tasks share a training example, a task has no example to train or test on, a class has no
    training example in a task that has it, or names repeat.
    """
    names = [task.name for task in plan]
    if len(set(names)) < len(names):
        raise DataError(f"stream: task names repeat: {names}. Every task needs a name of its own.")
    train_rows, val_rows = np.flatnonzero(data.splits_n == 0), np.flatnonzero(data.splits_n == 1)
    if validation > 0 and len(val_rows) == 0:
        train_rows, held_rows = _hold_out(data, train_rows, validation)
        val_rows = _limit(data, held_rows, per_class)
    train_rows = _limit(data, train_rows, per_class)
    chosen: dict[Split, Ints] = {
        "train": train_rows,
        "val": _limit(data, val_rows, measured_per_class),
        "test": _limit(data, np.flatnonzero(data.splits_n == 2), measured_per_class),
    }
    owner = np.full(len(data.labels_n), -1)
    tasks = []
    for position, planned in enumerate(plan):
        belongs = np.isin(data.labels_n, planned.classes)
        if planned.domains is not None:
            belongs &= np.isin(data.domains_n, planned.domains)
        parts = {split: rows[belongs[rows]] for split, rows in chosen.items()}
        for split in SPLITS:
            if split != "val" and len(parts[split]) == 0:
                raise DataError(
                    f"task {planned.name!r} of {data.name!r} has no {split} example: nothing could be {split}ed on. Add "
                    f"examples: where the data has no test split, a class needs two, one to train and one to test on."
                )
        parts = {
            split: _balanced(data, rows, per_task if split == "train" else measured_per_task)
            for split, rows in parts.items()
        }
        _check_classes(data, planned, parts)
        taken = owner[parts["train"]]
        if (taken >= 0).any():
            other = plan[int(taken[taken >= 0][0])].name
            raise DataError(
                f"tasks {other!r} and {planned.name!r} share training examples; give each its own classes or domain."
            )
        owner[parts["train"]] = position
        tasks.append(
            Task(
                name=planned.name,
                classes=planned.classes,
                domain=" + ".join(data.domain_names[d] for d in planned.domains) if planned.domains else None,
                train=Examples(data.table, parts["train"], data.labels_n[parts["train"]]),
                val=Examples(data.table, parts["val"], data.labels_n[parts["val"]]),
                test=Examples(data.table, parts["test"], data.labels_n[parts["test"]]),
            )
        )
    fingerprint = _hash(
        data.fingerprint, [[t.name, t.classes, *(t.split(s).rows_n.tolist() for s in SPLITS)] for t in tasks]
    )
    return Stream(
        tasks=tuple(tasks),
        scenario=scenario,
        data_name=data.name,
        kind=data.kind,
        class_names=data.class_names,
        fingerprint=fingerprint,
    )


def _check_classes(data: LabelledData, planned: PlannedTask, parts: Mapping[Split, Ints]) -> None:
    """Raises DataError for classes of a task that have no training example in it."""
    trained = set(data.labels_n[parts["train"]].tolist())
    missing = [label for label in planned.classes if label not in trained]
    if not missing:
        return

    def told(label: int) -> str:
        counts = (f"{int((data.labels_n[rows] == label).sum())} {split}" for split, rows in parts.items())
        return f"{data.class_names[label]!r} ({', '.join(counts)})"

    found = [told(label) for label in missing[:5]]
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    skipped = f" {len(data.skipped)} damaged items were skipped." if data.skipped else ""
    raise DataError(
        f"task {planned.name!r} of {data.name!r} has no training example of class {', '.join(found)}{more}; every class needs "
        f"at least one in each task that has it.{skipped} Add training examples, or leave the class out of the data or of "
        f"stream.plan."
    )


def _limit(data: LabelledData, rows: Ints, per_class: int | None) -> Ints:
    """At most `per_class` rows of each (class, domain), chosen by a hash of the row."""
    if per_class is None:
        return rows
    return np.sort(np.concatenate([rows[:0], *(part[:per_class] for part in _shuffled_cells(data, rows))]))


def _balanced(data: LabelledData, rows: Ints, most: int | None) -> Ints:
    """At most this many rows, with as equal numbers of each (class, domain) as there are, chosen by a hash of the row."""
    if most is None or len(rows) <= most:
        return rows
    turns = [
        (turn, number, row) for number, part in enumerate(_shuffled_cells(data, rows)) for turn, row in enumerate(part)
    ]
    return np.sort(np.array([row for _, _, row in sorted(turns)[:most]], np.int64))


def _hold_out(data: LabelledData, rows: Ints, share: float) -> tuple[Ints, Ints]:
    """(training rows, held-out rows), stratified over (class, domain)."""
    kept, held = [rows[:0]], [rows[:0]]
    for part in _shuffled_cells(data, rows):
        count = min(max(1, round(share * len(part))), len(part) - 1)
        held.append(part[:count])
        kept.append(part[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held))


def _shuffled_cells(data: LabelledData, rows: Ints) -> list[Ints]:
    """The rows of each (class, domain), each in an order that is a function of the rows alone."""
    cell = data.labels_n[rows] * len(data.domain_names) + data.domains_n[rows]
    shuffled = np.argsort(rng.bits(rows, 0x5EED), kind="stable")
    return [rows[shuffled[cell[shuffled] == value]] for value in np.unique(cell)]


def _hash(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
