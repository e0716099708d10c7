"""From YAML and `key=value` to a checked configuration. Every error is listed, with its line and the nearest name."""

import difflib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lamina.config import wording
from lamina.config.renamed import RENAMED_VALUES, advice
from lamina.config.schema import MethodConfig, RunConfig
from lamina.config.yaml_text import parse, read_yaml
from lamina.errors import ConfigError

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)
IsLanguage = Callable[[str], bool]
LANGUAGE_DEFAULTS: Mapping[str, Any] = {
    "stream.scenario": "domain",
    "backbone.targets": ["q", "v"],
    "training.epochs": 1,
    "training.batch_size": 8,
    "training.head_lr": None,
    "training.schedule": "constant",
    "evaluation.batch_size": 16,
}
"""Defaults for causal language models: tasks are domains, and q and v have adapters, as in O-LoRA's code."""
OF_A_CLASSIFIER = tuple(
    f"consolidation.{name}" for name in ("drift", "layers", "class_covariance_rank", "random_features")
)
"""Defaults of a method that do not apply if its unified classifier is declined (`consolidation.classifier` = own)."""
_LONGEST = 80
"""Characters of a value in a message."""


def load(
    file: Path | None,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    method_settings: Mapping[str, type[MethodConfig]],
    schema: type[AnyConfig],
    is_language: IsLanguage = lambda _: False,
) -> AnyConfig:
    """Returns the configuration of a YAML file, with `key.path` = value on top. method_settings: the settings of each method.
    schema: of a run or of a model. is_language: whether the backbone of this name is a causal language model, which has
    defaults of its own.

    The result's `method` holds every setting of the method, defaults included.
    Raises ConfigError listing every error: its line, the value, what is allowed, and the nearest name.
    """
    raw: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if file is not None:
        raw, lines = read_yaml(file)
    for key, value in overrides:
        put(raw, key, value)
        lines[key] = 0  # not in the file
    config, problems = check(raw, method_settings, schema, is_language)
    if config is None:
        raise ConfigError(listed([with_line(problem, lines) for problem in problems], file))
    return config


def check(
    raw: Mapping[str, Any],
    method_settings: Mapping[str, type[MethodConfig]],
    schema: type[AnyConfig],
    is_language: IsLanguage = lambda _: False,
) -> tuple[AnyConfig | None, list[str]]:
    """Returns the configuration of nested settings, or None and every problem: `key.path = value: reason`."""
    problems: list[str] = []
    settings: dict[str, Any] = {}
    whole = dict(raw)
    method = raw.get("method", {"name": "lamina"})
    method = {"name": method} if isinstance(method, str) else method
    if not isinstance(method, dict):
        problems.append(f"method = {_shown(method)}: must be a name, or a name and settings")
    elif (name := method.get("name", "lamina")) not in list(method_settings):
        problems.append(unknown("method.name", name, method_settings, "methods"))
    else:
        for key, value in _defaults(raw, method_settings[name], is_language).items():
            if not _says(raw, key):
                put(whole, key, value)
        given = {key: value for key, value in method.items() if key != "name"}
        try:
            settings = {"name": name} | method_settings[name].model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            problems += explain(error, method_settings[name], "method")
    try:
        config = schema.model_validate({**whole, "method": settings})
    except ValidationError as error:
        return None, explain(error, schema) + problems
    return (None if problems else config), problems


def _defaults(raw: Mapping[str, Any], settings: type[MethodConfig], is_language: IsLanguage) -> Mapping[str, Any]:
    """Returns the defaults of this method and kind of backbone that differ from the general ones."""
    backbone, asked = raw.get("backbone"), raw.get("consolidation")
    backbone = backbone.get("name") if isinstance(backbone, Mapping) else None
    if isinstance(backbone, str) and is_language(backbone):
        return {**LANGUAGE_DEFAULTS, **settings.around_language}
    own_classifier = isinstance(asked, Mapping) and asked.get("classifier") == "own"
    return {k: v for k, v in settings.around.items() if not (own_classifier and k in OF_A_CLASSIFIER)}


def _says(raw: Mapping[str, Any], key: str) -> bool:
    """Whether nested settings set this key, to any value."""
    inner: Any = raw
    for part in key.split("."):
        if not isinstance(inner, Mapping):
            return True
        if part not in inner:
            return False
        inner = inner[part]
    return True


def listed(problems: Sequence[str], file: Path | None = None) -> str:
    """Returns all problems as one message."""
    where = f" in {file}" if file else ""
    lines = "\n".join(f"  {problem}" for problem in problems)
    return f"{len(problems)} error{'s' * (len(problems) > 1)}{where}:\n{lines}"


def parse_override(text: str) -> tuple[str, Any]:
    """Returns the key and the value of `key.path=value`, the value read as YAML. Raises ConfigError for other text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {_shown(text)}: write it as key=value, for example --set training.lr=0.001")
    try:
        return key.strip(), parse(value)[0]
    except ConfigError as error:
        raise ConfigError(f"--set {_shown(text)}: {error}") from error


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields nested settings by dotted key. `method: NAME` is `method.name`."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from flat(value, f"{key}.")
        elif key == "method" and isinstance(value, str):
            yield "method.name", value
        elif value != {}:
            yield key, value


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


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Returns every setting that differs between two nested configurations: its `key.path`, and both values."""
    found: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys([*old, *new]):
        then, now = old.get(name), new.get(name)
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            found += differences(then, now, f"{prefix}{name}.")
        elif then != now:
            found.append((f"{prefix}{name}", then, now))
    return found


def unknown(where: str, value: object, allowed: Iterable[str], noun: str) -> str:
    """Returns the message about a name that is not one of the allowed ones."""
    names = list(allowed)
    return f"{where} = {_shown(value)}: not one of the {noun}: {', '.join(names)}.{_nearest(value, names)}"


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Returns a sentence for every problem that validation has found. prefix: of the model's keys."""
    return [_explain(details, prefix, model) for details in error.errors()]


def _explain(error: Any, prefix: str, model: type[BaseModel]) -> str:
    path = [str(part) for part in error["loc"]]
    where = ".".join([prefix, *path] if prefix else path)
    value = error["input"]
    start = f"{where} = {_shown(value)}: "
    if error["type"] == "extra_forbidden":
        if found := advice(where, value):
            return start + found
        names = list(_fields_at(model, path[:-1]))
        return f"{start}no such setting. There are: {', '.join(names)}.{_nearest(path[-1], names)}"
    if noun := wording.allowed([error["type"]]):
        return f"{start}{noun}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error":
        new = RENAMED_VALUES.get((where, value)) if isinstance(value, str) else None
        message += f". {value!r} is now called {new!r}." if new else "." + _nearest(value, _quoted(message))
    return f"{start}{message[0].lower()}{message[1:]}".removesuffix(".")


def _nearest(value: object, names: Iterable[str]) -> str:
    """Returns a question that names the nearest of these names; nothing if none is near."""
    near = difflib.get_close_matches(str(value)[:_LONGEST], list(names), 1, 0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _shown(value: object) -> str:
    """Returns a value as it is written in Python, cut to the length of a message."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


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
    """Returns the problem with the line of its setting, or of the section that lacks it."""
    key = problem.partition(" = ")[0]
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return f"line {lines[key]}: {problem}" if lines.get(key) else problem
