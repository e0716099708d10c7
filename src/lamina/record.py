"""Record: what a run leaves for its readers. `results.json` holds one; reports, comparisons and tables read it.

Written and read in this file only. Fields that are None or empty were not recorded: the file of records that `lamina compare`
keeps holds only what a table needs.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from lamina.errors import RunError
from lamina.files import read_checked, read_json, write_checked
from lamina.maths import metrics
from lamina.maths.metrics import AccuracyMatrix

FORMAT = 2
"""It changes whenever an older or newer lamina could not read a record."""
FILE = "results.json"


def _matrix(value: object) -> object:
    return AccuracyMatrix.from_dict(value) if isinstance(value, Mapping) else value


Matrix = Annotated[AccuracyMatrix, BeforeValidator(_matrix), PlainSerializer(AccuracyMatrix.as_dict)]


class Part(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class MethodRecord(Part):
    name: str
    title: str | None = None
    authors: str | None = None
    venue: str | None = None
    link: str | None = None
    departures: tuple[str, ...] = ()
    """Departures from the paper, as sentences."""


class TaskRecord(Part):
    """A task of the stream: its classes, and its number of examples in every split."""

    name: str
    classes: tuple[str, ...]
    domain: str | None = None
    train: int | None = None
    val: int | None = None
    test: int | None = None


class StreamRecord(Part):
    data: str | None = None
    kind: str | None = None
    """image or text."""
    scenario: str | None = None
    fingerprint: str | None = None
    joint: bool = False
    """All tasks at once."""
    tasks: tuple[TaskRecord, ...] = ()


class LeftOut(Part):
    """Files that were not read, for one reason."""

    reason: str
    count: int
    examples: tuple[str, ...] = ()


class LongestRecord(Part):
    """The longest text of a kind."""

    characters: int
    where: str


class InstructionsRecord(Part):
    """What is special about a source of instructions."""

    chats: int
    """Rows whose prompt is a chat."""
    without_options: int
    options: tuple[int, int] | None = None
    """Fewest and most options of a row that has any."""
    longest: dict[str, LongestRecord]
    """By kind of text: prompt, completion."""


class SourceRecord(Part):
    """How the data was understood."""

    name: str
    kind: str
    layout: str
    splits: dict[str, int]
    """Number of examples by split."""
    classes: dict[str, dict[str, int]]
    """Number of examples by class and split."""
    domains: dict[str, dict[str, int]] = Field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    instructions: InstructionsRecord | None = None


class BackboneRecord(Part):
    name: str
    hash: str | None = None
    """Of the weights, sha256."""
    parameters: int | None = None
    kind: str | None = None


class MachineRecord(Part):
    """The machine, and what was decided for it."""

    device: str | None = None
    gpu: str | None = None
    precision: str | None = None
    """Of the frozen weights."""
    threads: int | None = None
    processes: int = 1
    """That made the run together. Seconds and memory are those of the first one."""
    cpu: str | None = None
    cores: int | None = None
    memory_gb: float | None = None
    system: str | None = None
    python: str | None = None
    torch: str | None = None
    lamina: str | None = None
    commit: str | None = None
    started: str | None = None


class CodeRecord(Part):
    version: str
    commit: str | None = None


class ClassRecord(Part):
    """Predictions of the last model for one class, over all tasks."""

    name: str
    task: str | None = None
    """The task that brought the class."""
    correct: int
    total: int
    correct_when_learnt: int | None = None
    """The same examples, those of each task by the model right after that task; None in records of older runs."""

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.total if self.total else None

    @property
    def accuracy_when_learnt(self) -> float | None:
        known = self.total and self.correct_when_learnt is not None
        return (self.correct_when_learnt or 0) / self.total if known else None

    @property
    def forgetting(self) -> float | None:
        """Accuracy when learnt minus accuracy of the last model."""
        learnt, last = self.accuracy_when_learnt, self.accuracy
        return None if learnt is None or last is None else learnt - last


class BatchRecord(Part):
    """Whether predictions of the last model depend on the other examples of their batch."""

    examples: int
    """Test examples that were predicted alone and among others."""
    dependent: int
    """Those whose scores differed by more than rounding."""


class CostRecord(Part):
    seconds: dict[str, float | None] = Field(default_factory=dict)
    """By phase, and `total`."""
    steps: int | None = None
    train_examples_per_second: float | None = None
    parallel_seconds: float | None = None
    """Wall-clock time of training tasks side by side; None where that was not done."""
    outside_training_share: float | None = None
    peak_memory_mb: float | None = None
    peak_gpu_memory_mb: float | None = None
    trainable_parameters: int | None = None
    stored_parameters: int | None = None
    memory_bytes: int | None = None
    """Without `kept_examples`."""
    kept_examples: int | None = None
    """Training examples kept for rehearsal after the last task; None without rehearsal."""
    kept_per_class: int | None = None
    """Most of them for each class and task."""

    @property
    def total_seconds(self) -> float | None:
        return self.seconds.get("total")


class PredictionRecord(Part):
    """An example and its predictions."""

    task: str
    prompt: str
    expected: str
    before: str
    """Before the stream."""
    learnt: str | None = None
    """Right after its task was learnt."""
    end: str
    """After the last task."""


class LanguageRecord(Part):
    """What is recorded of language models only."""

    zero_shot: tuple[tuple[int, int], ...]
    """Correct predictions and examples of each task, before the stream."""
    rouge_l: tuple[tuple[float | None, ...], ...] = ()
    """Mean ROUGE-L of each task before the stream and after each task; None where no text was generated."""
    perplexity: tuple[float, ...] = ()
    """Of a text from outside the stream, before it and after each task."""
    predictions: tuple[PredictionRecord, ...] = ()
    tokens: int | None = None
    """Tokens trained on, padding and kept examples not included."""
    padding_share: float | None = None
    """Share of padding in the training batches."""
    truncated: int | None = None
    """Examples whose prompt was cut."""


class LineageRecord(Part):
    """How one task was learnt."""

    task: str
    classes: tuple[str, ...] = ()
    finished: str | None = None
    """UTC."""
    steps: int | None = None
    seconds: float | None = None
    """Of training."""
    loss_first: float | None = None
    loss_last: float | None = None
    accuracy_when_learnt: float | None = None
    accuracy_at_end: float | None = None
    negative_flips: float | None = None
    """Share of test examples that this task turned from correct to wrong, averaged over earlier tasks."""
    trainable_parameters: int | None = None
    stored_parameters: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of a run, as `maths.metrics.DEFINITIONS` defines them; nan where the record has no grounds for one."""

    final_accuracy: float = math.nan
    average_accuracy: float = math.nan
    forgetting: float = math.nan
    task_aware_accuracy: float = math.nan
    final_accuracy_micro: float = math.nan
    average_accuracy_micro: float = math.nan
    learning_accuracy: float = math.nan
    backward_transfer: float = math.nan
    forward_transfer: float = math.nan
    task_inference_accuracy: float = math.nan
    zero_shot_accuracy: float = math.nan
    backward_transfer_trace: float = math.nan
    perplexity_before: float = math.nan
    perplexity_after: float = math.nan

    def known(self) -> dict[str, float]:
        """Returns those that are not nan, by name."""
        return {name: value for name, value in asdict(self).items() if not math.isnan(value)}


class Record(Part):
    name: str
    """Of the method, with `-joint` where it learnt all tasks at once, and `-rehearsal` where it kept examples."""
    created: str | None = None
    """UTC."""
    seed: int | None = None
    split: str = "test"
    """What the accuracies were measured on."""
    method: MethodRecord
    stream: StreamRecord
    matrix: Matrix
    task_aware: Matrix = Field(default_factory=AccuracyMatrix.empty)
    """The same if the task's identity is given at test time."""
    task_inference_accuracy: tuple[float, ...] = ()
    """After each task: share of test examples so far whose winning output belongs to their own task."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Every setting, for people. What programs read of it has fields of its own."""
    source: SourceRecord | None = None
    backbone: BackboneRecord | None = None
    machine: MachineRecord = MachineRecord()
    code: CodeRecord | None = None
    classes: tuple[ClassRecord, ...] = ()
    batch: BatchRecord | None = None
    """None where it was not tried."""
    language: LanguageRecord | None = None
    cost: CostRecord = CostRecord()
    lineage: tuple[LineageRecord, ...] = ()
    losses: tuple[tuple[int, float], ...] = ()
    """Training step over all tasks, and loss."""
    skipped: tuple[str, ...] = ()
    """Damaged files that were left out."""
    notes: tuple[str, ...] = ()
    """What a user should know about this run, as sentences."""

    @cached_property
    def metrics(self) -> Metrics:
        """Every figure, computed from the counts."""
        found: dict[str, float] = metrics.summary(self.matrix) if self.matrix.tasks else {}
        if self.task_aware.tasks:
            found["task_aware_accuracy"] = metrics.final_accuracy(self.task_aware)
        if self.task_inference_accuracy:
            found["task_inference_accuracy"] = self.task_inference_accuracy[-1]
        classes = {name for task in self.stream.tasks for name in task.classes}
        if self.language is not None:
            found |= self._of_language(self.language)
        elif classes and self.matrix.tasks:
            chance_t = np.full(self.matrix.tasks, 1 / len(classes))
            found["forward_transfer"] = metrics.forward_transfer(self.matrix, chance_t)
        return Metrics(**found)

    def _of_language(self, language: LanguageRecord) -> dict[str, float]:
        """Returns the metrics of language models. Forward transfer is the gain over the model before the stream."""
        zero_shot_t = np.array([right / total if total else math.nan for right, total in language.zero_shot])
        found = {"zero_shot_accuracy": float(zero_shot_t.mean())}
        if self.matrix.tasks:
            found["backward_transfer_trace"] = metrics.backward_transfer_trace(self.matrix)
            found["forward_transfer"] = metrics.forward_transfer(self.matrix, zero_shot_t)
        if language.perplexity:
            found |= {"perplexity_before": language.perplexity[0], "perplexity_after": language.perplexity[-1]}
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns what `results.json` holds: the fields that were recorded, and the figures for people to read."""
        content = self.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        return {"format": FORMAT, **content, "metrics": self.metrics.known()}

    @classmethod
    def from_json(cls, content: object, where: str) -> "Record":
        """The inverse of `to_json`. where: names the record in messages.

        Raises RunError for what is no record, or one of another format.
        """
        if not isinstance(content, dict) or "format" not in content:
            raise RunError(f"{where} is damaged: it must hold a record, with its format, and holds {_short(content)}.")
        if content["format"] != FORMAT:
            raise RunError(
                f"{where} has format {content['format']!r}, and this version of lamina reads format {FORMAT}. Use the version "
                "that wrote it, or run it again in another directory."
            )
        try:
            return cls.model_validate({k: v for k, v in content.items() if k not in ("format", "metrics")})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            value = "" if first["type"] == "missing" else f" = {_short(first['input'])}"
            raise RunError(
                f"{where} is damaged: {key}{value}: {first['msg'].removeprefix('Value error, ')}."
            ) from error

    def for_table(self) -> "Record":
        """Returns the part that tables and searches read."""
        stream = self.stream
        return Record(
            name=self.name,
            created=self.created,
            seed=self.seed,
            split=self.split,
            method=MethodRecord(name=self.method.name),
            stream=StreamRecord(
                data=stream.data, scenario=stream.scenario, fingerprint=stream.fingerprint, joint=stream.joint
            ),
            matrix=self.matrix,
            task_aware=self.task_aware,
            task_inference_accuracy=self.task_inference_accuracy,
            backbone=self.backbone,
            machine=self.machine,
            code=self.code,
            batch=self.batch,
            language=self.language and self.language.model_copy(update={"predictions": ()}),
            cost=self.cost,
            **({"classes": self.classes} if self.classes else {}),
        )


def read(run_directory: Path) -> Record:
    """Returns the record of a finished run. Raises RunError where it is absent, damaged, or of another format."""
    path = run_directory / FILE
    if not run_directory.is_dir():
        raise RunError(f"there is no run directory {run_directory}. Check the path.")
    if not path.is_file():
        raise RunError(
            f"{run_directory} holds no {FILE}. If its run was interrupted, go on with `lamina resume {run_directory}`; "
            "otherwise it is not a run directory."
        )
    try:
        content = read_json(path)
        if content.get("format") == FORMAT:  # older formats have no checksum
            content = read_checked(path)
    except RunError as error:
        raise RunError(f"{error} `lamina resume {run_directory}` writes it anew.") from error
    return Record.from_json(content, str(path))


def write(record: Record, run_directory: Path) -> None:
    """Write the record of a finished run."""
    write_checked(run_directory / FILE, record.to_json())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
