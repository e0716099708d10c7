"""What a model says about itself: the facts of the whole, and the card of each version."""

from typing import Any

from pydantic import Field

from lamina.backbones import Kind
from lamina.config import ModelConfig
from lamina.model.gate import GateResult
from lamina.record import CodeRecord, MachineRecord, Part, SourceRecord


class Base(Part):
    """The backbone that the adapters belong to."""

    name: str
    """`nano`, a folder or file with weights, or a hub name; for embedded weights as it was when the model was made."""
    hash: str
    """Of its weights, sha256."""
    embedded: bool = False
    """Whether a copy lies in the model's own directory."""
    parameters: int
    licence: str | None = None
    """As its files say; None if they do not."""


class Facts(Part):
    """What `model.json` says."""

    created: str
    """UTC."""
    version: int = 0
    """Counts the changes of what is deployed: tasks learnt, and rollbacks."""
    head: str | None = None
    """Folder of the newest version; None before the first task."""
    versions: tuple[str, ...] = ()
    """Folders of all versions, in the order they were learnt in. Those that are not before `head` were rolled back."""
    kind: Kind
    base: Base
    config: ModelConfig
    task_count: int | None = None
    """Number of tasks in advance, for methods that use it."""


class Kept(Part):
    """Examples of a task that the model keeps."""

    examples: int
    bytes: int


class LearntTask(Part):
    """One task of a version."""

    name: str
    classes: tuple[str, ...]
    """In the order of its outputs."""
    new_classes: tuple[str, ...]
    """Those that no earlier task had."""
    domains: tuple[str, ...] = ()
    examples: dict[str, int] = Field(default_factory=dict)
    """Number of examples by split."""
    accuracy: float | None = None
    """When it was learnt, on its held-out examples."""


class ClassFigures(Part):
    """Predictions for the held-out examples of one class."""

    correct: int
    total: int


class Figures(Part):
    """What was measured of a task when it was learnt, on its held-out examples."""

    accuracy: float | None = None
    """Of a language model: the share of examples with the right option, or with an exact match."""
    calibration_error: float | None = None
    """Expected calibration error, 15 bins; None for language models."""
    rouge_l: float | None = None
    """Mean ROUGE-L (F1) of the texts that a language model generated; None without such texts, or without rouge-score."""
    classes: dict[str, ClassFigures] = Field(default_factory=dict)


class Card(Part):
    """A version: what was learnt with it, from what, and how well."""

    folder: str
    parent: str | None = None
    """Folder of the version before."""
    version: int
    created: str
    """UTC."""
    tasks: tuple[LearntTask, ...]
    """Usually one. A version that began as a finished run has all tasks of that run."""
    class_names: tuple[str, ...]
    """By class id: all classes so far. Some may have no outputs, if they were in the data of a run and never learnt."""
    data: str | None = None
    """The source, as it was given."""
    fingerprint: str | None = None
    """Of the data."""
    source: SourceRecord | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings given for this task only, by dotted key."""
    temperature: float = Field(1.0, gt=0)
    """Scores are divided by it before their softmax. Does not apply to language models."""
    figures: Figures = Figures()
    gate: GateResult | None = None
    """What was compared with the version before; None for the first."""
    forced: bool = False
    """Whether the gate refused the task and the user insisted."""
    kept: dict[str, Kept] = Field(default_factory=dict)
    """`probes` and `rehearsal`, as they were when the task was learnt; they may have been deleted since."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """By phase."""
    steps: int = 0
    trainable_parameters: int | None = None
    stored_parameters: int | None = None
    machine: MachineRecord | None = None
    code: CodeRecord | None = None
    imported_from: str | None = None
    """The adapter that it was imported from, if it was."""

    @property
    def name(self) -> str:
        return self.tasks[-1].name
