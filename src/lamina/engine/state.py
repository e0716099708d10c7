"""RunState: where a run is, what it has measured, and what it has cost. Written and read in this file only."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from lamina.engine.language_state import LanguageState
from lamina.maths.metrics import AccuracyMatrix

Phase = Literal["begin", "train", "end", "evaluate", "done"]


def now() -> str:
    """Returns the time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Position:
    """Where a run is. step counts the training steps done in this task."""

    task: int = 0
    phase: Phase = "begin"
    step: int = 0


class Loss(NamedTuple):
    """A recorded training loss: number of the task, step within it, value."""

    task: int
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """What is recorded of one task: its name and size at the beginning, the rest when it has been evaluated."""

    task: str
    trainable_parameters: int
    steps: int
    negative_flips: float | None = None
    """Share of test examples that this task turned from correct to wrong, averaged over earlier tasks; None for the first
    task."""
    accuracy_when_learnt: float | None = None
    class_correct: Mapping[str, int] | None = None
    """Correct predictions for the task's own test examples when it was learnt, by class id as text; None where predictions are
    no classes."""
    stored_parameters: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds spent, by phase and by task, when tasks were finished, and training examples seen."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    train_seconds: Mapping[str, float] = field(default_factory=dict)
    """By the number of the task, as text."""
    finished: Mapping[str, str] = field(default_factory=dict)
    """When each task was evaluated, UTC, by its number as text."""
    examples: int = 0
    parallel_seconds: float | None = None
    """Wall-clock time of training tasks side by side; None where that was not done."""

    def spent(self, phase: str, seconds: float, task: int | None = None) -> "Clock":
        """Returns the clock after so many more seconds in a phase, and in the training of a task if one is given."""
        by_task = dict(self.train_seconds)
        if task is not None:
            by_task[str(task)] = by_task.get(str(task), 0.0) + seconds
        by_phase = {**self.seconds, phase: self.seconds.get(phase, 0.0) + seconds}
        return replace(self, seconds=by_phase, train_seconds=by_task)


class StateJSON(TypedDict):
    """`RunState` as JSON. The clock is a document of its own, since it differs between runs with the same result."""

    position: dict[str, Any]
    matrix: dict[str, Any]
    task_aware: dict[str, Any]
    task_inference: list[list[int]]
    lineage: list[dict[str, Any]]
    losses: list[list[float]]
    notes: list[str]
    language: NotRequired[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Everything a run knows about itself but the learner's and the method's tensors."""

    position: Position = Position()
    matrix: AccuracyMatrix = field(default_factory=AccuracyMatrix.empty)
    task_aware: AccuracyMatrix = field(default_factory=AccuracyMatrix.empty)
    """The same if the task's identity were given at test time."""
    task_inference: tuple[tuple[int, ...], ...] = ()
    """[i][j]: examples of task j whose winning output belonged to task j, after learning task i."""
    lineage: tuple[TaskEntry, ...] = ()
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    """What a user should know about this run."""
    clock: Clock = Clock()
    language: LanguageState | None = None

    def to_json(self) -> StateJSON:
        """Returns everything but the clock."""
        content: StateJSON = {
            "position": asdict(self.position),
            "matrix": self.matrix.as_dict(),
            "task_aware": self.task_aware.as_dict(),
            "task_inference": [list(row) for row in self.task_inference],
            "lineage": [asdict(entry) for entry in self.lineage],
            "losses": [list(loss) for loss in self.losses],
            "notes": list(self.notes),
        }
        return content if self.language is None else {**content, "language": asdict(self.language)}

    @classmethod
    def from_json(cls, state: StateJSON, clock: Mapping[str, Any]) -> "RunState":
        """The inverse of `to_json` and of the clock as a dict. Raises KeyError, TypeError or ValueError on other content."""
        return cls(
            position=Position(**state["position"]),
            matrix=AccuracyMatrix.from_dict(state["matrix"]),
            task_aware=AccuracyMatrix.from_dict(state["task_aware"]),
            task_inference=tuple(tuple(row) for row in state["task_inference"]),
            lineage=tuple(TaskEntry(**entry) for entry in state["lineage"]),
            losses=tuple(Loss(int(task), int(step), value) for task, step, value in state["losses"]),
            notes=tuple(state["notes"]),
            clock=Clock(**clock),
            language=LanguageState.from_json(state["language"]) if "language" in state else None,
        )

    def with_entry(self, **facts: Any) -> "RunState":
        """Returns the state with these facts in the entry of the current task."""
        number = self.position.task
        entries = list(self.lineage)
        entries[number] = replace(entries[number], **facts)
        return replace(self, lineage=tuple(entries))
