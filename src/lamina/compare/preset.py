"""Presets: the protocols of the papers as grids, each setting with its source, and what a run must show to count for one.

A preset is a file in `presets/`. Its `sources` say where every setting comes from; one that begins with `inferred` was found in
no source. `data` says what layout is expected, and its counts and names are checked before anything runs.
"""

import copy
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lamina import config as configuration
from lamina import data, runs
from lamina.compare.grid import Grid
from lamina.config import RunConfig, as_yaml, flat, read_yaml
from lamina.data import Source
from lamina.errors import ConfigError
from lamina.files import replace_text

OWN_SIZE = ("backbone.image_size", "backbone.mean", "backbone.std")
"""Settings that belong to the preset's backbone, and are left out with another."""
LEAST = 4
"""Least number of examples of a class in a scaled run."""


class Part(BaseModel):
    """A part of a preset's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Expected(Part):
    """The data of a protocol."""

    what: str
    classes: int | None = None
    train: int | None = None
    test: int | None = None
    total: int | None = None
    """Training and test examples together, where the split is not known."""
    names: str | None = None
    """A pattern that every class name matches."""
    domains: tuple[str, ...] | None = None


class Reported(Part):
    """A value that was published."""

    row: str
    figure: Literal["final_accuracy", "final_accuracy_micro", "average_accuracy"]
    value: float
    spread: float | None = None
    source: str
    stream: str | None = None
    """Name of the stream, where the preset has several."""


class PresetFile(Part):
    title: str
    paper: str
    data: Expected
    grid: dict[str, Any]
    sources: dict[str, str] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    reported: tuple[Reported, ...] = ()


@dataclass(frozen=True)
class Preset:
    name: str
    file: PresetFile

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of its grid by dotted key, each once; where rows or streams differ, all values."""
        return _settings(self.file.grid)

    def grid(self, source: str, backbone: str | None = None, scale: float = 1.0) -> dict[str, Any]:
        """Returns its grid for the data at `source`. backbone: another one than the protocol's. scale: below 1, the same
        protocol with so much of the epochs and the examples, on whatever data there is. Raises ConfigError for a scale outside
        (0, 1]."""
        if not 0 < scale <= 1:
            raise ConfigError(f"--scale {scale}: must be above 0 and at most 1")
        grid = copy.deepcopy(self.file.grid)
        base = dict(flat(grid["base"])) | {"data.source": source}
        if backbone:
            base = {key: value for key, value in base.items() if key not in OWN_SIZE} | {"backbone.name": backbone}
        grid["title"] = self.file.title
        if scale < 1:
            self._shrink(grid, base, source, scale)
        grid["base"] = base
        return grid

    def _shrink(self, grid: dict[str, Any], base: dict[str, Any], source: str, scale: float) -> None:
        expected, there = self.file.data, _open(source)
        examples = (expected.train or 100 * (expected.classes or 4)) / (expected.classes or 4)
        classes = len(there.class_names)
        base["training.epochs"] = max(1, round(scale * base["training.epochs"]))
        base["training.batch_size"] = min(base["training.batch_size"], 8)
        base["data.per_class"] = base["evaluation.per_class"] = max(LEAST, round(scale * examples))
        for key, most in (("data.max_length", 64), ("evaluation.max_new_tokens", 8)):
            if key in base:
                base[key] = min(base[key], most)
        base["training.milestones"] = [e for e in base.get("training.milestones", ()) if e < base["training.epochs"]]
        if not set(base.get("stream.domains", ())) <= set(there.domain_names):
            base.pop("stream.domains")
        for layer in (base, *grid.get("streams", {}).values()):
            if layer.get("stream.tasks", 1) > classes:
                layer["stream.tasks"] = classes
        grid["title"] += f", scaled to {scale:g}"
        grid["note"] = (
            f"This is not {self.file.title}, but a trial of its protocol: data {Path(source).name}, backbone "
            f"{base['backbone.name']}, {scale:g} of its epochs and examples, one seed, small batches. No published value can "
            "be compared with it."
        )
        grid["seeds"] = grid["seeds"][:1]

    def problems(self, record: Mapping[str, Any]) -> Iterator[str]:
        """Yields what differs from the data of the protocol. record: how the data was understood, as a run records it."""
        expected = self.file.data
        found = {"classes": len(record["classes"]), "train": record["splits"].get("train", 0)}
        found |= {"test": record["splits"].get("test", 0), "total": sum(record["splits"].values())}
        for what, number in found.items():
            wanted = getattr(expected, what)
            if wanted is not None and number != wanted:
                yield f"{number:,} {_WORDS[what]}, where the protocol has {wanted:,}"
        if expected.names:
            odd = [name for name in record["classes"] if not re.fullmatch(expected.names, name)]
            if odd:
                yield f"class names such as {odd[0]!r}, where the protocol's are like {expected.names}"
        if expected.domains and set(expected.domains) != set(record["domains"]):
            missing = sorted(set(expected.domains) - set(record["domains"]))
            more = sorted(set(record["domains"]) - set(expected.domains))
            said = [f"without the domains {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(more)}"] * bool(
                more
            )
            yield f"data {' and '.join(said)}, where the protocol has {', '.join(expected.domains)}"

    def check(self, source: Source) -> None:
        """Raises ConfigError naming everything in which the data is not that of the protocol."""
        if found := list(self.problems(data.as_dict(source))):
            raise ConfigError(
                configuration.listed(found, Path(source.name))
                + f"\nPreset {self.name} expects: {self.file.data.what}. "
                "Give --scale, such as --scale 0.02, to try the protocol on other data."
            )


_WORDS = {"classes": "classes", "train": "training examples", "test": "test examples", "total": "examples"}


def names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in files(__package__).joinpath("presets").iterdir())


def load(name: str) -> Preset:
    """Raises ConfigError for a name that no preset has."""
    if name not in names():
        raise ConfigError(configuration.unknown("preset", name, names(), "presets"))
    with as_file(files(__package__).joinpath("presets", f"{name}.yaml")) as file:
        content, _ = read_yaml(file)
    return Preset(name, PresetFile.model_validate(content))


def write_grid(preset: Preset, out: Path, source: str, backbone: str | None, scale: float) -> Path:
    """Writes the grid of a preset into a folder, after the data was checked, and returns its path. Raises ConfigError where the
    data is not that of the protocol and nothing is scaled."""
    grid = preset.grid(source, backbone, scale)
    if scale == 1:
        preset.check(_open(source))
    out.mkdir(parents=True, exist_ok=True)
    head = f"# Preset {preset.name}: {preset.file.paper}\n"
    file, text = out / f"{out.resolve().name}.yaml", head + as_yaml(grid)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{file} is there already and says something else: it was changed, or made for other data. `lamina compare {file}` "
            "runs it; give --out to begin another."
        )
    replace_text(file, text)
    return file


def row_of(preset: Preset, config: RunConfig) -> tuple[str, str]:
    """Returns the stream and the row of a preset that a run followed. Raises ConfigError saying what differs where it followed
    none."""
    wanted = dict(flat(preset.file.grid["base"]))["backbone.name"].rpartition("/")[2]
    used = config.backbone.name.rstrip("/").rpartition("/")[2]
    other = [] if used == wanted else [f"backbone.name = {used!r} in place of {wanted!r}"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "grid.yaml"
        file.write_text(as_yaml(preset.grid(config.data.source)), encoding="utf-8")
        grid = Grid(file)
    closest: list[str] | None = None
    for row in grid.rows:
        for cell in grid.cells(row, {}):
            differs = [*other, *_differences(cell.config, config)]
            if not differs:
                return row.stream if len(grid.streams) > 1 else "", row.method
            if closest is None or len(differs) < len(closest):
                closest = differs
    raise ConfigError(f"the run did not follow preset {preset.name}: " + "; ".join((closest or [])[:8]))


FREE = (
    *("seed", "device", "threads", "jobs", "checkpoint_seconds", "precision", "data.source", "data.cache"),
    *("backbone.name", "backbone.shard", "evaluation.batch_size", "evaluation.unseen"),
    *("tracking.to", "tracking.project", "tracking.every"),
)
"""Settings in which a run may differ from the protocol: they say where and how it ran."""


def _differences(wanted: RunConfig, found: RunConfig) -> Iterator[str]:
    ours, theirs = (dict(flat(json.loads(c.model_dump_json()))) for c in (wanted, found))
    for key in ours | theirs:
        if key not in FREE and ours.get(key) != theirs.get(key):
            yield f"{key} = {theirs.get(key)!r} in place of {ours.get(key)!r}"


def _open(source: str) -> Source:
    return runs.open_source(RunConfig.model_validate({"data": {"source": source}}))


def _settings(grid: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    layers = [grid["base"], *(grid.get("streams") or {}).values(), *grid["methods"].values()]
    own = {key: grid[key] for key in ("seeds", "orders") if key in grid}
    for layer in (*layers, own):
        for key, value in flat(layer or {}):
            if value not in found.setdefault(key, []):
                found[key].append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}
