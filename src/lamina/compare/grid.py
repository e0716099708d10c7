"""Grid: methods, seeds, class orders, streams and settings of a comparison, checked with every error reported at once.

A row of the table is a method of the grid on one of its streams. A cell is one run of a row: one seed and one class order.
Settings of a cell come in layers: base, stream, method, and the values of the search. Later layers override earlier ones.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator

from lamina import config as configuration
from lamina.backbones import is_language
from lamina.compare.runners import Resources
from lamina.config import ConsolidationConfig, MethodConfig, RunConfig, Section
from lamina.errors import ConfigError
from lamina.methods import METHODS

Settings = dict[str, Any]
"""By dotted key."""
OWNED = {"seed": "seeds", "stream.order_seed": "orders"}
"""Settings that the grid sets for every cell, and the key of the grid that gives them."""


DEFAULTS = {f"consolidation.{name}": field.default for name, field in ConsolidationConfig.model_fields.items()}


class SearchConfig(Section):
    over: dict[str, list[Any]] = Field(min_length=1)
    """Settings to choose, each with the values to try. Every combination is tried for every row."""
    tasks: int = Field(3, ge=1)
    """Number of first tasks to search on."""
    seed: int = Field(0, ge=0)
    """Seed of the trials. Their class order is the first of `orders`."""
    validation: float = Field(0.2, gt=0, lt=1)
    """Share of the training examples held out for validation, where neither the source nor the base gives one."""

    @field_validator("over")
    @classmethod
    def _something_to_try(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if empty := [key for key, values in value.items() if not values]:
            raise ValueError(f"no value to try for {', '.join(empty)}")
        return value


class HeadroomConfig(Section):
    frozen: str
    """The row that trains nothing."""
    joint: str
    """The row of joint training with the same classifier."""


class GridConfig(Section):
    title: str | None = None
    """Title of the page."""
    note: str | None = None
    """What a reader must know first: said at the top of the page."""
    out: str | None = None
    """Directory of the tables. Default: runs/NAME of the grid file."""
    cells: str = "runs/cells"
    """Directory of the runs. Several grids may share it."""
    base: str | dict[str, Any] = Field(default_factory=dict)
    """Settings of all runs, or a file of them relative to the grid file."""
    streams: dict[str, str | dict[str, Any] | None] = Field(default_factory=dict)
    """Settings on top of the base, or a file of them, by name. Default: one stream, that of the base."""
    methods: dict[str, dict[str, Any] | None] = Field(min_length=1)
    """Settings on top, by name of the row. method.name defaults to the name of the row. `search` adds to the search of this
    row; false leaves it out. `resources` says what its runs need. `each` makes a row of every combination of values."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the runs of every row."""
    orders: Literal["seeds"] | tuple[int | None, ...] = (None,)
    """Class orders: values of stream.order_seed; null is the dataset's own order. `seeds`: each seed has a class order of its
    own, with stream.order_seed equal to the seed."""
    baseline: str | None = None
    """The row from which differences are taken."""
    headroom: HeadroomConfig | None = None
    """What training can gain on a stream at all: the rows of a frozen backbone and of joint training. The table then has the
    share that every row reaches."""
    search: SearchConfig | None = None
    """Search for settings of each row, on validation data of the first tasks."""
    resources: Resources = Resources()
    """What a run needs: on a cluster this is asked for. A row may have `resources` of its own."""
    jobs: int = Field(1, ge=1)
    """Runs at a time on this machine."""

    @property
    def runs(self) -> list[tuple[int, int | None]]:
        """Seed and class order of every run of a row."""
        if self.orders == "seeds":
            return [(seed, seed) for seed in self.seeds]
        return [(seed, order) for order in self.orders for seed in self.seeds]

    @field_validator("seeds", mode="before")
    @classmethod
    def _are_seeds(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or not value or not all(type(v) is int and v >= 0 for v in value):
            raise ValueError("must be a list of whole numbers, such as [0, 1, 2]")
        return value

    @field_validator("orders", mode="before")
    @classmethod
    def _are_orders(cls, value: Any) -> Any:
        known = (
            isinstance(value, list | tuple) and value and all(v is None or (type(v) is int and v >= 0) for v in value)
        )
        if value != "seeds" and not known:
            raise ValueError("must be `seeds`, or a list of whole numbers and null, such as [null, 1, 2]")
        return value

    @field_validator("seeds", "orders")
    @classmethod
    def _once(cls, values: Any) -> Any:
        if isinstance(values, tuple) and len(set(values)) < len(values):
            raise ValueError("a value occurs twice, and both runs would be the same. Remove one of them")
        return values


class Row(NamedTuple):
    stream: str
    method: str
    """Name of the row: a method may have several rows with different settings."""


@dataclass(frozen=True)
class Cell:
    """One run of a row."""

    row: Row
    seed: int
    order: int | None
    config: RunConfig
    tried: Mapping[str, Any] | None = None
    """Values of the search in this cell; None for the runs of the table."""

    @property
    def name(self) -> str:
        if self.tried is not None:
            return f"{self.row.stream}/{self.row.method}/search/{said(self.tried)}"
        order = "" if self.order is None else f"-order{self.order}"
        return f"{self.row.stream}/{self.row.method}/seed{self.seed}{order}"


@dataclass(frozen=True)
class Layer:
    """Settings of one part of the grid, and their place in a file."""

    settings: Settings
    file: Path
    prefix: str
    """Prefix of these settings in the file, for example `methods.inflora.`."""
    lines: Mapping[str, int]

    def place(self, key: str) -> str | None:
        """Returns the place of a wrong setting; None where this layer does not have it."""
        if not any(key == s or key.startswith(f"{s}.") or s.startswith(f"{key}.") for s in self.settings):
            return None
        whole = self.prefix + key
        while whole and whole not in self.lines:
            whole = whole.rpartition(".")[0]
        return f"line {self.lines[whole]}: {self.prefix}" if whole else self.prefix


class Grid:
    """A checked grid: every possible cell has a valid configuration."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError naming every error of the grid and of its base."""
        raw, self._lines = configuration.read_yaml(file)
        self.file, self.text = file, file.read_text(encoding="utf-8")
        try:
            self.settings = GridConfig.model_validate(raw)
        except ValidationError as error:
            problems = configuration.explain(error, GridConfig)
            raise ConfigError(
                configuration.listed([configuration.with_line(p, self._lines) for p in problems], file)
            ) from error
        base = self.settings.base
        self.base = self._layer(base, "base")
        default = Path(base).stem if isinstance(base, str) else file.stem
        self.streams = {
            name: self._layer(value or {}, f"streams.{name}")
            for name, value in (self.settings.streams or {default: {}}).items()
        }
        rows = {
            name: value
            for base_name, given in self.settings.methods.items()
            for name, value in self._each(base_name, dict(given or {}))
        }
        if not rows:
            raise ConfigError(configuration.listed(["methods: no combination of `each` is valid for its method"], file))
        self._searches = {name: value.pop("search", None) for name, value in rows.items()}
        self._resources = {name: self._needed(name, value.pop("resources", None)) for name, value in rows.items()}
        self.methods = {name: self._layer(value, f"methods.{name}") for name, value in rows.items()}
        for name, layer in self.methods.items():
            layer.settings.setdefault("method.name", name)
        self._check()

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def rows(self) -> list[Row]:
        return [Row(stream, method) for stream in self.streams for method in self.methods]

    def resources(self, row: Row) -> Resources:
        """Returns what a run of this row needs."""
        return self._resources[row.method]

    def _needed(self, name: str, own: Any) -> Resources:
        """Returns the resources of a row. Raises ConfigError where its own are wrong."""
        key, common = f"methods.{name}.resources", self.settings.resources.model_dump()
        try:
            return Resources.model_validate(common | own if isinstance(own, dict) else common if own is None else own)
        except ValidationError as error:
            problems = [f"{key}.{problem}" for problem in configuration.explain(error, Resources)]
            raise ConfigError(configuration.listed([self._at(key, p) for p in problems], self.file)) from error

    def searches(self, method: str) -> dict[str, list[Any]]:
        """Returns the settings and values to try for a row of this name; nothing where it is not searched."""
        own = self._searches[method]
        return {} if self.settings.search is None or own is False else self.settings.search.over | (own or {})

    def trials(self, row: Row) -> list[Cell]:
        """Returns the cells of the search for a row."""
        search, over = self.settings.search, self.searches(row.method)
        if search is None or not over:
            return []
        tried = [dict(zip(over, values, strict=True)) for values in product(*over.values())]
        order = search.seed if self.settings.orders == "seeds" else self.settings.orders[0]
        return [Cell(row, search.seed, order, self._config(row, search.seed, order, t, True), t) for t in tried]

    def cells(self, row: Row, chosen: Mapping[str, Any]) -> list[Cell]:
        """Returns the cells of the table for a row, with the settings that the search has chosen."""
        return [
            Cell(row, seed, order, self._config(row, seed, order, chosen, False)) for seed, order in self.settings.runs
        ]

    def _each(self, name: str, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the rows of a row with `each`: one for every valid combination of values."""
        each = row.pop("each", None)
        if each is None:
            yield name, row
            return
        key = f"methods.{name}.each"
        if not isinstance(each, dict) or not each or not all(isinstance(v, list) and v for v in each.values()):
            problem = f"{key} = {each!r}: must be settings, each with a list of values"
            raise ConfigError(configuration.listed([self._at(key, problem)], self.file))
        whole = {part: row.pop(part) for part in ("search", "resources") if part in row}
        settings = dict(configuration.flat(row))
        method = METHODS.get(settings.get("method.name", name))
        refused = {f"consolidation.{part}" for part, _ in method.refuses} if method else set()
        for values in product(*each.values()):
            chosen = dict(zip(each, values, strict=True))
            said = settings | chosen
            own = dict(method.config_type.around) if method else {}
            if said.get("consolidation.classifier") == "own":
                own = {key: value for key, value in own.items() if key not in configuration.OF_A_CLASSIFIER}
            around = DEFAULTS | own | said
            idle = around["consolidation.drift"] != "none" and around["consolidation.classifier"] == "own"
            if idle or any(around[key] != DEFAULTS[key] for key in refused):
                continue
            short = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in chosen.items())
            yield f"{name}, {short}", {"method.name": name} | said | whole

    # -- settings ---------------------------------------------------------------------------------------------------

    def _layer(self, given: str | dict[str, Any], key: str) -> Layer:
        if isinstance(given, dict):
            return Layer(dict(configuration.flat(given)), self.file, f"{key}.", self._lines)
        file = self.file.parent / Path(given).expanduser()
        content, lines = configuration.read_yaml(file)
        return Layer(dict(configuration.flat(content)), file, "", lines)

    def _layers(self, row: Row, tried: Mapping[str, Any]) -> list[Layer]:
        own = self._searches[row.method] or {}
        common = {key: value for key, value in tried.items() if key not in own}
        return [
            self.base,
            self.streams[row.stream],
            self.methods[row.method],
            Layer(common, self.file, "search.over.", self._lines),
            Layer(
                {k: v for k, v in tried.items() if k in own}, self.file, f"methods.{row.method}.search.", self._lines
            ),
        ]

    def _raw(self, row: Row, seed: int, order: int | None, tried: Mapping[str, Any], searching: bool) -> Settings:
        raw: Settings = {}
        cpus = self.resources(row).cpus
        merged: Settings = {"threads": cpus, "precision": "fp32"}  # not left to the load of the machine
        for layer in self._layers(row, tried):
            merged |= layer.settings
        merged |= {"seed": seed, "stream.order_seed": order}
        merged["threads"] = merged["threads"] or cpus
        merged["precision"] = "fp32" if merged["precision"] == "auto" else merged["precision"]
        if searching and self.settings.search is not None:
            merged |= {"stream.first": self.settings.search.tasks, "evaluation.split": "val"}
            merged["stream.validation"] = merged.get("stream.validation") or self.settings.search.validation
        for key, value in merged.items():
            configuration.put(raw, key, value)
        return raw

    def _config(self, row: Row, seed: int, order: int | None, tried: Mapping[str, Any], searching: bool) -> RunConfig:
        config, problems = configuration.check(
            self._raw(row, seed, order, tried, searching), _settings_types(), RunConfig, is_language
        )
        if config is None:  # `_check` has seen every combination of values
            raise ConfigError(configuration.listed(problems, self.file))
        return config

    # -- errors -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        problems = [*self._own_problems(), *self._problems_of_cells()]
        if problems:
            raise ConfigError(configuration.listed(list(dict.fromkeys(problems)), self.file))

    def _own_problems(self) -> Iterator[str]:
        settings = self.settings
        if settings.baseline is not None and settings.baseline not in self.methods:
            yield self._at("baseline", configuration.unknown("baseline", settings.baseline, self.methods, "methods"))
        for part, name in (dict(settings.headroom) if settings.headroom else {}).items():
            if name not in self.methods:
                yield self._at(
                    f"headroom.{part}", configuration.unknown(f"headroom.{part}", name, self.methods, "methods")
                )
        for layer in (*self.streams.values(), *self.methods.values()):
            for key, by in OWNED.items():
                if key in layer.settings:
                    yield f"{layer.place(key)}{key}: `{by}` of the grid sets it; leave it out here"
        for name, own in self._searches.items():
            key = f"methods.{name}.search"
            if own is False or own is None:
                continue
            if not isinstance(own, dict) or not all(isinstance(v, list) and v for v in own.values()):
                yield self._at(key, f"{key} = {own!r}: must be settings, each with a list of values to try, or false")
                self._searches[name] = {}
            elif settings.search is None:
                yield self._at(
                    key, f"{key}: the grid has no `search` that this could extend. Add one, or leave this out"
                )
        for name, layer in self.methods.items():
            for setting in self.searches(name).keys() & layer.settings.keys():
                yield (
                    f"{layer.place(setting)}{setting}: the search sets it too. Leave it out here, or take this row out of "
                    "the search with `search: false`"
                )

    def _problems_of_cells(self) -> Iterator[str]:
        """Yields the problems of every combination of stream, row and values of the search."""
        for row in self.rows:
            over = self.searches(row.method)
            for values in product(*over.values()):
                tried = dict(zip(over, values, strict=True))
                for searching in {False, bool(over)}:
                    seed, order = self.settings.runs[0]
                    raw = self._raw(row, seed, order, tried, searching)
                    config, problems = configuration.check(raw, _settings_types(), RunConfig, is_language)
                    layers = self._layers(row, tried)
                    yield from (self._placed(problem, layers) for problem in problems)
                    if config is not None:
                        yield from self._unfit(row, config)

    def _unfit(self, row: Row, config: RunConfig) -> Iterator[str]:
        scenario, method = config.stream.scenario, METHODS[config.method["name"]]
        if scenario not in method.scenarios:
            yield self._at(
                f"methods.{row.method}",
                f"methods.{row.method}: {method.name} does not fit the {scenario}-incremental stream {row.stream!r}; it is "
                f"made for {', '.join(method.scenarios)}",
            )
        for part, why in method.refuses:
            value = getattr(config.consolidation, part)
            if value != DEFAULTS[f"consolidation.{part}"]:
                yield self._at(
                    f"methods.{row.method}",
                    f"methods.{row.method}: consolidation.{part} = {value!r} does not go with {method.name}: {why}",
                )
        if config.rehearsal.per_class and not method.trains_on(1):
            yield self._at(
                f"methods.{row.method}",
                f"methods.{row.method}: rehearsal.per_class = {config.rehearsal.per_class} does not go with {method.name}: it "
                "trains nothing after the first task",
            )
        if scenario == "mixed" and self.settings.orders != (None,):
            given = self.settings.orders
            yield self._at(
                "orders",
                f"orders = {given if isinstance(given, str) else list(given)}: the mixed stream {row.stream!r} has the order "
                "of its plan; leave `orders` out and use more seeds",
            )
        first = config.stream.first
        if first is not None and scenario in ("class", "task") and first > config.stream.tasks:
            searching = config.evaluation.split == "val" and self.settings.search is not None
            key = "search.tasks" if searching else "stream.first"
            yield self._at(
                key,
                f"{key} = {first}: the stream {row.stream!r} has {config.stream.tasks} tasks",
            )

    def _placed(self, problem: str, layers: Iterable[Layer]) -> str:
        key = problem.partition(" = ")[0]
        for layer in reversed(list(layers)):
            place = layer.place(key)
            if place is not None:
                return (f"{layer.file}, " if layer.file != self.file else "") + place + problem
        return problem

    def _at(self, key: str, problem: str) -> str:
        return f"line {self._lines[key]}: {problem}" if key in self._lines else problem


def said(settings: Mapping[str, Any]) -> str:
    """Returns settings in one line: training.lr=0.001."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _settings_types() -> dict[str, type[MethodConfig]]:
    return {name: method.config_type for name, method in METHODS.items()}
