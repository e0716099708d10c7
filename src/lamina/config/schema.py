"""What a run is told: frozen, strict, every error at once, each with the nearest name and the line it stands on."""

import difflib
import hashlib
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lamina.errors import ConfigError

Role = Literal["q", "k", "v", "out", "fc1", "fc2"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class MethodConfig(BaseModel):
    """Base of every method's settings: frozen, strict, a sentence per field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    around: ClassVar[Mapping[str, Any]] = {}
    """Settings outside the method's own, by dotted key, that have this default with it instead of the general one."""


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


class DataConfig(Section):
    source: str = "digits"
    """A folder of class folders, a Parquet file or folder of them, a CSV file, a saved datasets folder, `hf:owner/name`,
    or `digits` (scikit-learn's handwritten digits)."""
    kind: Literal["auto", "image", "text"] = "auto"
    """What the examples are."""
    columns: Columns = Columns()
    """Names of the columns, where they are not the usual ones."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share held out for testing where the source has no split of its own."""
    per_class: int | None = Field(None, ge=1)
    """Use at most this many training examples of each class (in each domain)."""
    on_damaged: Literal["error", "skip"] = "error"
    """What to do about an unreadable image: stop and name it, or leave it out and record it."""
    cache: str | None = None
    """Folder of decoded images. Not set: lamina's folder in the user's cache directory."""
    evaluate: Literal["resize", "resize-crop"] = "resize"
    """Test images: squeezed to the input size, or short side to 256/224 of it and the centre cut out."""
    augment: Literal["crop-flip", "crop", "none"] = "crop-flip"
    """Training images: random resized crop and horizontal flip, crop alone (digits and letters do not flip), or neither."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the image a random crop covers."""
    max_length: int = Field(128, ge=2)
    """Longest text, in tokens; the rest is cut off."""

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("must be two numbers with 0 < least <= largest <= 1")
        return value


class PlanConfig(Section):
    name: str
    """Name of the task."""
    classes: tuple[str, ...] = Field(min_length=1)
    """Class names in it."""
    domains: tuple[str, ...] | None = None
    """Domains it draws from; all if not said."""


class StreamConfig(Section):
    scenario: Literal["class", "domain", "task", "mixed"] = "class"
    """New classes in each task; the same classes in a new domain; new classes with the task told when testing; or a plan."""
    tasks: int = Field(10, ge=1)
    """How many tasks the classes are split into (class and task scenarios)."""
    order_seed: int | None = None
    """Draws the order of the classes; not set: the dataset's own order."""
    domains: tuple[str, ...] | None = None
    """The domains in the order they arrive (domain scenario); not set: the dataset's order."""
    plan: tuple[PlanConfig, ...] | None = None
    """The tasks one by one (mixed scenario)."""
    joint: bool = False
    """Joint training: all tasks at once (an upper bound)."""
    first: int | None = Field(None, ge=1)
    """Use only this many tasks, the first ones, for example to choose settings; not set: all."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of the training examples held out for validation, where the source has no validation split; taken before
    data.per_class is counted, and at most as many."""


class BackboneConfig(Section):
    name: str = "nano"
    """`nano` (embedded), a folder or file with weights, or a hub name."""
    image_size: int | None = Field(None, ge=1)
    """Side of the input in pixels; not set: what the backbone was trained at."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """Which output is the feature; auto: the class token for images, the mean over tokens for texts."""
    mean: tuple[float, float, float] | None = None
    """Pixel mean the inputs are normalised with; not set: what the weights' own files say."""
    std: tuple[float, float, float] | None = None
    """Pixel deviation the inputs are normalised with."""
    targets: tuple[Role, ...] = Field(("k", "v"), min_length=1)
    """Which linear maps of each block get adapters."""
    blocks: tuple[int, ...] | None = None
    """Which blocks, counted from 0; not set: all."""


class TrainingConfig(Section):
    epochs: int = Field(10, ge=1)
    """Passes over each task's training data."""
    batch_size: int = Field(64, ge=1)
    """Examples in a step; the last batch of an epoch may be smaller."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Adam (0.9, 0.999), AdamW, or SGD with momentum. Started afresh with every task."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of the adapters."""
    head_lr: float | None = Field(5e-3, gt=0)
    """Learning rate of the head, which starts from nothing with every task; null: the adapters'."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay, as the optimiser defines it."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    schedule: Literal["constant", "cosine", "quarter-cosine", "step"] = "quarter-cosine"
    """Of the learning rate over the epochs of a task: constant; half a cosine to 0; a quarter of one (InfLoRA's released
    code); or times gamma at each milestone."""
    milestones: tuple[int, ...] = ()
    """Epochs at which `step` multiplies by gamma."""
    gamma: float = Field(0.1, gt=0)
    """Factor of `step`."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the gradient; not set: no limit."""
    later_lr: float = Field(1.0, gt=0)
    """What the adapters' learning rate is multiplied by from the second task on. Long streams of small tasks want less."""


class ConsolidationConfig(Section):
    init: Literal["chain", "fresh", "merged"] = "chain"
    """Start of a task's training: the weights the method left (chain), the pre-trained weights (fresh), or the deployed merged
    weights (merged)."""
    merging: Literal["none", "mean", "ema", "weighted"] = "none"
    """Deployed weights: as trained (none), or merged over the tasks: running mean, exponential moving average, or weighted by
    the second moments of the inputs."""
    drift: Literal["none", "linear", "linear+local", "random", "remeasured"] = "none"
    """Drift compensation of stored statistics: none; a linear map fitted on the new task; the map plus a local correction; or
    a random map of the same size (a control). remeasured: measured again on old examples (a diagnosis of the benchmarks)."""
    classifier: Literal["own", "ncm", "lda", "ridge", "aligned", "lda+ridge"] = "own"
    """The method's own classifier, or a unified classifier of all classes fitted on stored means and one shared covariance:
    nearest class mean, linear discriminant analysis, ridge on random features, LDA trained on draws, or LDA and ridge."""
    layers: int = Field(1, ge=1)
    """How many of the last blocks give the unified classifier its features (all blocks if there are fewer)."""
    random_features: int = Field(2048, ge=1)
    """Number of random features of ridge and lda+ridge."""
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


OF_A_CLASSIFIER = ("consolidation.drift", "consolidation.layers")
"""Defaults of a method that are dropped when its unified classifier is declined (`consolidation.classifier` = own)."""


class EvaluationConfig(Section):
    split: Literal["test", "val"] = "test"
    """What the accuracy matrix is measured on. Choose settings on val, never on test."""
    batch_size: int = Field(64, ge=1)
    """Examples in a batch when nothing is trained. Texts of a batch are padded to its longest, so many at a time cost more."""
    unseen: bool = False
    """Also measure tasks not learnt yet (above the diagonal), which forward transfer needs."""
    per_class: int | None = Field(None, ge=1)
    """Measure on at most this many test and validation examples of each class (in each domain), the same for every run."""


class RunConfig(Section):
    """Everything that decides the result of a run."""

    method: dict[str, Any] = Field(default_factory=lambda: {"name": "lamina"})
    """`name` and the method's own settings; `lamina methods NAME` lists them."""
    backbone: BackboneConfig = BackboneConfig()
    """The pre-trained model."""
    data: DataConfig = DataConfig()
    """The examples."""
    stream: StreamConfig = StreamConfig()
    """How they are cut into tasks."""
    training: TrainingConfig = TrainingConfig()
    """How a task is learnt."""
    consolidation: ConsolidationConfig = ConsolidationConfig()
    """What happens around the method at the end of a task: average, shift, tail."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How accuracy is measured."""
    seed: int = Field(0, ge=0)
    """Of initial weights, order of batches and augmentation. Not of the class order, see stream.order_seed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: the processor or an NVIDIA card; auto: the card where there is one. Recorded, and kept by a resumed
    run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the frozen weights; auto: bf16 where this processor is measured to be faster with it, and on cards of compute
    capability 8 or more. Adapters and head: fp32."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of the processor for each process; not set: PyTorch's choice, shared out among jobs. Recorded, since it can
    change the last bits."""
    jobs: int = Field(1, ge=1)
    """Tasks trained at a time, each by a process of its own, where the method learns each from the pre-trained model alone."""
    checkpoint_seconds: float = Field(30.0, ge=0)
    """Save at least this often within a task. Every phase of a task is saved anyway."""


def load(
    file: Path | None,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    method_settings: Mapping[str, type[MethodConfig]],
) -> RunConfig:
    """The configuration from a YAML file, with `key.path` = value on top. method_settings: the settings of each method.

    The result's `method` holds every setting of the method with its default filled in.
    Raises ConfigError listing every error: where it stands, the value, what is allowed, and the nearest name.
    """
    raw: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if file is not None:
        raw, lines = read_yaml(file)
    for key, value in overrides:
        put(raw, key, value)
        lines[key] = 0  # it does not stand in the file
    config, problems = check(raw, method_settings)
    if config is None:
        raise ConfigError(listed([with_line(problem, lines) for problem in problems], file))
    return config


def check(
    raw: Mapping[str, Any], method_settings: Mapping[str, type[MethodConfig]]
) -> tuple[RunConfig | None, list[str]]:
    """The configuration of nested settings, or None and every problem: `key.path = value: what is wrong`."""
    problems: list[str] = []
    settings: dict[str, Any] = {}
    whole = dict(raw)
    method = raw.get("method", {"name": "lamina"})
    method = {"name": method} if isinstance(method, str) else method
    if not isinstance(method, dict):
        problems.append(f"method = {method!r}: must be a name, or a name and settings")
    elif (name := method.get("name", "lamina")) not in list(method_settings):
        problems.append(unknown("method.name", name, method_settings, "methods"))
    else:
        asked = raw.get("consolidation")
        idle = OF_A_CLASSIFIER if isinstance(asked, Mapping) and asked.get("classifier") == "own" else ()
        for key, value in method_settings[name].around.items():
            if not _says(raw, key) and key not in idle:
                put(whole, key, value)
        given = {key: value for key, value in method.items() if key != "name"}
        try:
            settings = {"name": name} | method_settings[name].model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            problems += explain(error, method_settings[name], "method")
    try:
        config = RunConfig.model_validate({**whole, "method": settings})
    except ValidationError as error:
        return None, explain(error, RunConfig) + problems
    return (None if problems else config), problems


def _says(raw: Mapping[str, Any], key: str) -> bool:
    """Whether anything is said about a setting, be it nonsense."""
    inner: Any = raw
    for part in key.split("."):
        if not isinstance(inner, Mapping):
            return True
        if part not in inner:
            return False
        inner = inner[part]
    return True


def listed(problems: Sequence[str], file: Path | None = None) -> str:
    """All of them as one message."""
    where = f" in {file}" if file else ""
    lines = "\n".join(f"  {problem}" for problem in problems)
    return f"{len(problems)} error{'s' * (len(problems) > 1)}{where}:\n{lines}"


def fingerprint(config: RunConfig, method_settings: type[MethodConfig]) -> str:
    """A hash of every setting that decides the result and is not at its default, so that a setting which a later lamina
    adds makes no other run of an older one. Not of how often to save, how many processes train, how many examples are
    measured at a time (which may change last bits) or how much is kept for reuse, nor of where data, cache and weights
    lie: streams and backbones have fingerprints of their own content.
    method_settings: the settings of its method.
    """
    own = {key: value for key, value in config.method.items() if key != "name"}
    without = {"checkpoint_seconds", "jobs", "method"}
    record = config.model_dump(mode="json", exclude_defaults=True, exclude=without)
    record["method"] = method_settings(**own).model_dump(mode="json", exclude_defaults=True)
    record["method"]["name"] = config.method["name"]
    for section, key in (("data", "cache"), ("data", "source"), ("backbone", "name"), ("evaluation", "batch_size")):
        record.get(section, {}).pop(key, None)
    record = {key: value for key, value in record.items() if value != {}}
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def to_yaml(config: RunConfig) -> str:
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value`, the value read as YAML. Raises ConfigError where there is no `=`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write it as key=value, for example --set training.lr=0.001")
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads a plain 1e-3 as text; everyone means a number. What stands in quotes stays text."""


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would take for a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The content, and the line of every key by its dotted path."""
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)
        tree = yaml.compose(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {error}") from error
    if content is None:
        return {}, {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold keys and values, not a {type(content).__name__}")
    lines: dict[str, int] = {}

    def walk(node: Any, path: str) -> None:
        inner: list[tuple[str, Any, Any]] = []
        if isinstance(node, yaml.MappingNode):
            inner = [(key.value, key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            inner = [(str(i), value, value) for i, value in enumerate(node.value)]
        for name, start, value in inner:
            lines[f"{path}{name}"] = start.start_mark.line + 1
            walk(value, f"{path}{name}.")

    walk(tree, "")
    return content, lines


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a value in nested settings by its `key.path`."""
    *parents, leaf = key.split(".")
    for part in parents:
        child = raw.get(part)
        if part == "method" and isinstance(child, str):
            child = {"name": child}
        raw[part] = dict(child) if isinstance(child, dict) else {}
        raw = raw[part]
    raw[leaf] = value


def unknown(where: str, value: object, allowed: Iterable[str], noun: str) -> str:
    """What to say about a name that is none of the allowed ones."""
    names = list(allowed)
    near = difflib.get_close_matches(str(value), names, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{where} = {value!r}: not one of the {noun}: {', '.join(names)}.{hint}"


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every problem that validating settings has found, in our words."""
    return [_explain(details, prefix, model) for details in error.errors()]


def _explain(error: Any, prefix: str, model: type[BaseModel]) -> str:
    path = [str(part) for part in error["loc"]]
    where = ".".join([prefix, *path] if prefix else path)
    if error["type"] == "extra_forbidden":
        names = list(_fields_at(model, path[:-1]))
        near = difflib.get_close_matches(path[-1], names, 1, 0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{where} = {error['input']!r}: no such setting. There are: {', '.join(names)}.{hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(str(error["input"]), _quoted(message), 1, 0.5)
        message += f". Did you mean {near[0]!r}?" if near else ""
    return f"{where} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _quoted(message: str) -> list[str]:
    return message.split("'")[1::2]


def _fields_at(model: type[BaseModel], path: list[str]) -> Iterable[str]:
    for part in path:
        if part.isdigit():
            continue
        inner = _model_in(model.model_fields[part].annotation)
        if inner is None:
            return ()
        model = inner
    return model.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)


def with_line(problem: str, lines: Mapping[str, int]) -> str:
    """With the line of the setting, or, where it is missing, of what it is missing from."""
    key = problem.partition(" = ")[0]
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return f"line {lines[key]}: {problem}" if lines.get(key) else problem
