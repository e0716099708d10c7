"""The settings of a run: frozen, strict, with a sentence under each."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Role = Literal["q", "k", "v", "out", "fc1", "fc2", "gate", "up", "down"]
LARGEST_RATE = 1000.0
"""Larger learning rates overflow float32 within a few steps."""


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class MethodConfig(BaseModel):
    """Base of every method's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    around: ClassVar[Mapping[str, Any]] = {}
    """Defaults of this method for settings outside its own, by dotted key. They replace the general defaults."""
    around_language: ClassVar[Mapping[str, Any]] = {}
    """The same for causal language models."""


class Columns(Section):
    image: str = "image"
    """Column with encoded images."""
    text: str = "text"
    """Column with texts."""
    label: str = "label"
    """Column with class ids or names."""
    domain: str = "domain"
    """Column with the domain, if any."""
    split: str = "split"
    """Column saying train, val or test, if any."""
    prompt: str = "prompt"
    """Column with the prompts of instructions."""
    completion: str = "completion"
    """Column with the completions of instructions."""
    options: str = "options"
    """Column with lists of candidate completions, if any."""
    messages: str = "messages"
    """Column with chats (lists of role and content), in place of prompt and completion."""
    answer: str = "answer"
    """Column with what a language model is to say of a labelled text, if any."""


class DataConfig(Section):
    source: str = "digits"
    """A folder of class folders, a Parquet, CSV or JSON lines file, a folder of such files, a saved datasets folder,
    `hf:owner/name`, or `digits` (scikit-learn's handwritten digits)."""
    kind: Literal["auto", "image", "text", "instructions"] = "auto"
    """Kind of the examples."""
    columns: Columns = Columns()
    """Names of the columns of Parquet, CSV and JSON files."""
    template: str = "{text}\nOptions: {options}\nAnswer:"
    """Prompt of a language model for labelled texts. Fields: {text}, {options} (the completions of the classes), {domain}."""
    form: Literal["plain", "chat"] = "plain"
    """Form of prompts that are texts: as they are, or as one message of a user in the tokenizer's chat template."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the examples held out for testing, if the source has no test split."""
    per_class: int | None = Field(None, ge=1)
    """Use at most this many training examples of each class (in each domain)."""
    per_task: int | None = Field(None, ge=1)
    """Use at most this many training examples of each task, as equally many of each class as there are."""
    on_damaged: Literal["error", "skip"] = "error"
    """Treatment of an unreadable image: stop and name it, or leave it out and record it."""
    cache: str | None = None
    """Folder for decoded images. Not set: lamina's folder in the user's cache directory."""
    evaluate: Literal["resize", "resize-crop"] = "resize"
    """Test transform: resize to the input size, or resize the short side to 256/224 of it and crop the centre."""
    augment: Literal["crop-flip", "crop", "none"] = "crop-flip"
    """Training transform: random resized crop and horizontal flip, the crop alone (for digits and letters), or neither."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image that a random crop covers."""
    max_length: int | None = Field(None, ge=2)
    """Maximum length of a text in tokens. Longer texts are truncated. Not set: 128; for instructions 512 (or what the backbone
    has positions for, if that is less)."""

    @property
    def text_length(self) -> int:
        """The maximum length of a text for an encoder, in tokens."""
        return 128 if self.max_length is None else self.max_length

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("must be two numbers with 0 < smallest <= largest <= 1")
        return value


class PlanConfig(Section):
    name: str
    """Name of the task."""
    classes: tuple[str, ...] = Field(min_length=1)
    """Names of its classes."""
    domains: tuple[str, ...] | None = None
    """Names of its domains. Not set: all."""


class StreamConfig(Section):
    scenario: Literal["class", "domain", "task", "mixed"] = "class"
    """class: new classes in each task. domain: the same classes in a new domain. task: new classes, and the task's identity is
    given at test time. mixed: the tasks of `plan`."""
    tasks: int = Field(10, ge=1)
    """Number of tasks that the classes are split into (class and task scenarios)."""
    order_seed: int | None = None
    """Seed of the order of classes, or of domains (domain scenario). Not set: the dataset's own order, or that of
    `domains`."""
    domains: tuple[str, ...] | None = None
    """The domains in their order of arrival (domain scenario). Not set: the dataset's order."""
    plan: tuple[PlanConfig, ...] | None = None
    """The tasks one by one (mixed scenario)."""
    joint: bool = False
    """Joint training: all tasks at once, as a reference."""
    first: int | None = Field(None, ge=1)
    """Use only the first tasks, this many, for example to choose settings. Not set: all."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of the training examples held out for validation, if the source has no validation split. It is taken before
    data.per_class applies, and holds at most data.per_class examples of each class."""


class BackboneConfig(Section):
    name: str = "nano"
    """`nano` (embedded), a folder or file with weights, or a hub name."""
    image_size: int | None = Field(None, ge=1)
    """Height and width of the input in pixels. Not set: the backbone's own."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """Pooling of the tokens into one feature vector. auto: the class token for images, the mean over tokens for texts."""
    mean: tuple[float, float, float] | None = None
    """Pixel mean for normalisation. Not set: the value in the backbone's own files."""
    std: tuple[float, float, float] | None = None
    """Pixel standard deviation for normalisation. Not set: the value in the backbone's own files."""
    targets: tuple[Role, ...] = Field(("k", "v"), min_length=1)
    """Linear layers of each block that get adapters. In the MLP, encoders have fc1 and fc2; language models have gate, up and
    down."""
    blocks: tuple[int, ...] | None = None
    """Blocks that get adapters, counted from 0. Not set: all."""
    shard: bool = False
    """Under `torchrun`: every process holds a part of the frozen weights (FSDP2). For backbones that do not fit one GPU."""


class TrainingConfig(Section):
    epochs: int = Field(10, ge=1, le=100_000)
    """Passes over each task's training data."""
    least_steps: int = Field(0, ge=0, le=100_000)
    """Least number of training steps of a task. Small tasks get more epochs."""
    batch_size: int = Field(64, ge=1, le=1_000_000)
    """Examples per step. The last batch of an epoch may be smaller."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Adam with betas (0.9, 0.999), AdamW, or SGD with momentum. Every task starts with a new optimiser."""
    lr: float = Field(1e-3, gt=0, le=LARGEST_RATE)
    """Learning rate of the adapters."""
    head_lr: float | None = Field(5e-3, gt=0, le=LARGEST_RATE)
    """Learning rate of the head, which gets new, untrained outputs with every task. null: that of the adapters."""
    weight_decay: float = Field(0.0, ge=0, le=LARGEST_RATE)
    """Weight decay, as the optimiser defines it."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    schedule: Literal["constant", "cosine", "quarter-cosine", "step"] = "quarter-cosine"
    """Schedule of the learning rate over the epochs of a task: constant; half a cosine, down to 0; a quarter of a cosine
    (InfLoRA's released code); or step, multiplied by gamma at each milestone."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the `step` schedule multiplies the rate by gamma."""
    gamma: float = Field(0.1, gt=0, le=1)
    """Factor of the `step` schedule."""
    clip: float | None = Field(None, gt=0)
    """Maximum norm of the gradient. Not set: no clipping."""
    gradient_checkpointing: bool = False
    """Language models: keep the inputs of blocks only, and compute the rest again in the backward. It needs less memory and
    about a third more time."""
    later_lr: float = Field(1.0, gt=0, le=LARGEST_RATE)
    """Factor of the adapters' learning rate from the second task on. Use less than 1 for long streams of small tasks."""


class ConsolidationConfig(Section):
    init: Literal["chain", "fresh", "merged"] = "chain"
    """Weights that a task's training starts from: those the method left (chain), the pre-trained weights (fresh), or the
    deployed merged weights (merged)."""
    merging: Literal["none", "mean", "ema", "weighted"] = "none"
    """Deployed weights: as trained (none), or merged over the tasks: running mean, exponential moving average, or weighted by
    the second moments of the inputs."""
    drift: Literal["none", "linear", "linear+local", "random", "remeasured"] = "none"
    """Drift compensation of stored statistics: none; a linear map fitted on the new task; the map plus a local correction; or
    a random map of the same size (a control). remeasured: measured again on old examples (a diagnosis of the benchmarks)."""
    drift_variants: int = Field(1000, ge=0, le=1_000_000)
    """Drift compensation fits its map on the task's examples and on this many variants of them: turned, mixed and cut images,
    or texts of the tokens of two. Use more where the features move far."""
    classifier: Literal["own", "ncm", "lda", "ridge", "aligned", "lda+ridge", "gram"] = "own"
    """The method's own classifier, or a unified classifier of all classes. It is fitted on stored means and one shared
    covariance: nearest class mean, linear discriminant analysis, ridge on random features, LDA trained on draws, or LDA and
    ridge. Or least squares on random features, by their sums over all examples (gram)."""
    layers: int = Field(1, ge=1)
    """How many of the last blocks give the unified classifier its features (all blocks if there are fewer)."""
    random_features: int = Field(2048, ge=1)
    """Number of random features of ridge, lda+ridge and gram."""
    class_covariance_rank: int = Field(0, ge=0)
    """Rank of the part of each class's covariance that is stored beside the shared one."""

    @model_validator(mode="after")
    def _something_to_move(self) -> "ConsolidationConfig":
        if self.drift != "none" and self.classifier == "own":
            raise ValueError(
                f"drift = {self.drift!r} moves stored statistics, and classifier = 'own' stores none. Choose another "
                "classifier, such as lda, or drift = 'none'"
            )
        if self.layers > 1 and self.classifier == "own":
            raise ValueError(
                f"layers = {self.layers} applies to a unified classifier, and classifier = 'own' is not one. Choose another "
                "classifier, such as lda, or layers = 1"
            )
        return self


class RehearsalConfig(Section):
    per_class: int = Field(0, ge=0)
    """Training examples of each class that are kept of every finished task, and trained on again with later tasks. 0: none."""
    ratio: float = Field(1.0, gt=0, le=100)
    """Kept examples in a batch for every new one."""


class EvaluationConfig(Section):
    split: Literal["test", "val"] = "test"
    """Split that the accuracy matrix is measured on. Choose settings on val, never on test."""
    batch_size: int = Field(64, ge=1, le=1_000_000)
    """Examples per batch outside training. Texts are padded to the longest of their batch, so larger batches cost more."""
    unseen: bool = False
    """Also measure the tasks that are not learnt yet (above the diagonal). Forward transfer needs it."""
    per_class: int | None = Field(None, ge=1)
    """Measure on at most this many test and validation examples of each class and domain, the same for every run."""
    per_task: int | None = Field(None, ge=1)
    """Measure on at most this many test and validation examples of each task, as equally many of each class as there are."""
    max_new_tokens: int = Field(64, ge=1)
    """Language models: the most tokens that are generated for an example without options. A longer completion never matches."""
    text: str | None = None
    """Language models: a text file from outside the stream, whose perplexity is measured before the stream and after each
    task. Not set: a short English text that lamina carries."""


class TrackingConfig(Section):
    """Trackers for a run, beside its own record. They change no result."""

    to: tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...] = ()
    """Where figures are logged, too. W&B is offline unless WANDB_MODE says otherwise."""
    project: str = Field("lamina", min_length=1)
    """Name of the project or experiment there."""
    every: int = Field(10, ge=1)
    """Training steps between two losses that are logged."""


class RunConfig(Section):
    """Everything that decides the result of a run."""

    method: dict[str, Any] = Field(default_factory=lambda: {"name": "lamina"})
    """`name`, and the method's own settings. `lamina methods NAME` lists them."""
    backbone: BackboneConfig = BackboneConfig()
    """The pre-trained model."""
    data: DataConfig = DataConfig()
    """The examples."""
    stream: StreamConfig = StreamConfig()
    """How the examples are split into tasks."""
    training: TrainingConfig = TrainingConfig()
    """How a task is trained."""
    consolidation: ConsolidationConfig = ConsolidationConfig()
    """Weight merging, drift compensation and the classifier, at the end of each task."""
    rehearsal: RehearsalConfig = RehearsalConfig()
    """Old examples that are kept and trained on again."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How accuracy is measured."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of initial weights, batch order and augmentation. The class order has its own: stream.order_seed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The CPU or an NVIDIA GPU. auto: the GPU if there is one. It is recorded, and a resumed run keeps it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the frozen weights; adapters and head are always fp32. auto: bf16 on GPUs of compute capability 8 or more,
    and on CPUs that a short measurement finds faster with it."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of each process. Not set: PyTorch's default, divided by `jobs`. It is recorded, since it can change the last
    bits of a result."""
    jobs: int = Field(1, ge=1)
    """Number of tasks trained in parallel, each by a process of its own. For methods that learn every task from the pre-trained
    model alone."""
    tracking: TrackingConfig = TrackingConfig()
    """Trackers: TensorBoard, MLflow, Weights & Biases, trackio."""
    checkpoint_seconds: float = Field(30.0, ge=0)
    """Longest time between checkpoints within a task. The end of every phase is saved as well."""

    @property
    def name(self) -> str:
        """The name of the method, with `-joint` for joint training and `-rehearsal` for rehearsal."""
        name: str = self.method["name"]
        return name + "-joint" * self.stream.joint + "-rehearsal" * (self.rehearsal.per_class > 0)


class ProbesConfig(Section):
    per_class: int = Field(0, ge=0)
    """Held-out examples of each class of a task that the model keeps, to measure how later tasks change its accuracy."""


class GateConfig(Section):
    """Limits that a new task must meet. Shares are between 0 and 1; null: no limit."""

    task_drop: float | None = Field(0.05, ge=0, le=1)
    """Largest loss of accuracy on any earlier task."""
    class_drop: float | None = Field(None, ge=0, le=1)
    """Largest loss of accuracy on any class."""
    negative_flips: float | None = Field(0.1, ge=0, le=1)
    """Largest share of the probes that the task turns from correct to wrong."""
    calibration_error: float | None = Field(None, ge=0, le=1)
    """Largest expected calibration error (ECE) on the probes."""
    new_accuracy: float | None = Field(None, ge=0, le=1)
    """Smallest accuracy on the held-out examples of the new task."""
    slowdown: float | None = Field(None, ge=1)
    """Largest time of a prediction, as a multiple of the time before the task."""


class ModelConfig(RunConfig):
    """The settings of a model that keeps learning. `stream` does not apply: tasks come as they are learnt."""

    probes: ProbesConfig = ProbesConfig()
    """Held-out examples that the model keeps."""
    gate: GateConfig = GateConfig()
    """Limits that a new task must meet."""

    @property
    def run(self) -> RunConfig:
        """The settings of a run of one task."""
        return RunConfig(**{name: getattr(self, name) for name in RunConfig.model_fields})
