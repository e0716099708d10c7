"""YAML as configurations use it: numbers such as 1e-3, no aliases, no key twice, limited size and depth."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from lamina.config.schema import RunConfig
from lamina.errors import ConfigError

MOST_BYTES = 2**20
MOST_DEPTH = 30
MOST_DIGITS = 40
_INTEGER = "tag:yaml.org,2002:int"


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads a plain 1e-3 as text; here it is a number. Quoted values stay text."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Raises ConfigError for aliases and deep nesting, which can take far more memory than their text."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _problem(f"the alias *{event.anchor} is not allowed. Write the value out", event)
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _problem(f"more than {MOST_DEPTH} levels of nesting", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that `Loader` would take for a number."""


for _side in (Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse(text: str) -> tuple[Any, dict[str, int]]:
    """Returns the content, and the line of every key by its dotted path.

    Raises ConfigError for text that is not YAML, holds a key twice, or exceeds a limit.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"longer than {MOST_BYTES:,} characters, which no configuration is")
    lines: dict[str, int] = {}
    try:
        loader = Loader(text)
        node: Any = loader.get_single_node()
        _check(node, "", lines)
        content = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"not YAML: {where}{', '.join(filter(None, (error.context, error.problem)))}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from error
    return content, lines


def _check(node: Any, path: str, lines: dict[str, int]) -> None:
    """Notes the line of every key within a node. Raises ConfigError for a key that is set twice, and huge integers."""
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(node, yaml.MappingNode):
        inner = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(str(i), value, value) for i, value in enumerate(node.value)]
    elif isinstance(node, yaml.ScalarNode) and node.tag == _INTEGER and len(node.value) > MOST_DIGITS:
        raise _problem(f"an integer of {len(node.value):,} digits", node)
    for name, start, value in inner:
        where, line = f"{path}{name}", start.start_mark.line + 1
        if where in lines:
            raise _problem(f"{where} is set twice, on lines {lines[where]} and {line}. Keep one of them", start)
        lines[where] = line
        if start is not value:
            _check(start, "", {})
        _check(value, f"{where}.", lines)


def _problem(text: str, where: Any) -> ConfigError:
    return ConfigError(f"line {where.start_mark.line + 1}: {text}")


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the content of a file, and the line of every key by its dotted path.

    Raises ConfigError for what `parse` refuses, and for a file that cannot be read or holds no mapping.
    """
    try:
        with file.open(encoding="utf-8") as opened:
            content, lines = parse(opened.read(MOST_BYTES + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    if content is None:
        return {}, {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold keys and values, not a {type(content).__name__}")
    return content, lines


def as_yaml(content: Mapping[str, Any]) -> str:
    """Returns a mapping as YAML, its keys in their order."""
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)


def to_yaml(config: RunConfig, without: Collection[str] = ()) -> str:
    """Returns every setting as YAML that `read_yaml` reads back. without: sections that are left out."""
    content = {key: value for key, value in config.model_dump(mode="json").items() if key not in without}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
