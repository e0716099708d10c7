"""From the records of a comparison to its table: as Markdown, as a page, and as JSON for programs.

Every figure is a function of a run's counts, or of its record's costs. Nothing is left out silently: a row with missing runs,
runs of older code, another stream or a search of its own says so beneath the table.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina import report
from lamina.compare import stats
from lamina.compare.grid import Grid, Row, said
from lamina.compare.stats import Difference
from lamina.errors import ConfigError
from lamina.maths.metrics import DEFINITIONS, AccuracyMatrix
from lamina.report.page import figures as figures_of
from lamina.report.text import DASH, count, known, percent, scaled, signed

FORMAT = 1
COST_CAPTION = "Cost: means over the runs."
BEGIN, END = "<!-- compare -->", "<!-- /compare -->"
ACCURACIES = {
    "final_accuracy": "Final accuracy",
    "final_accuracy_micro": "Micro accuracy",
    "average_accuracy": "Average accuracy",
    "forgetting": "Forgetting",
    "task_aware_accuracy": "Task-aware",
    "task_inference_accuracy": "Task inference",
}
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("Seconds", lambda v: f"{v:,.0f}"),
    "trainable_parameters": ("Trainable", scaled),
    "stored_parameters": ("Stored", scaled),
    "memory_bytes": ("Memory kept", lambda v: scaled(v, "B")),
    "peak_memory_mb": ("Peak memory", lambda v: scaled(v * 2**20, "B")),
}
COST_DEFINITIONS = {
    "seconds": "of the whole run on the machine named below, loading and evaluation included",
    "trainable_parameters": "numbers trained in the last task, its rows of the head included",
    "stored_parameters": "numbers kept after the last task to go on learning and to predict, the frozen backbone apart",
    "memory_bytes": "what the method keeps from task to task besides",
    "peak_memory_mb": "of the process of the run",
}
ONLY_JOINT = "final_accuracy_micro"
"""The one figure of a row that learns all tasks at once; the others are about tasks, of which it has one."""


@dataclass(frozen=True)
class Run:
    """A finished run of a row."""

    seed: int
    order: int | None
    record: Mapping[str, Any]
    folder: str
    older: bool
    """Made with other code than this."""

    @property
    def joint(self) -> bool:
        return bool(self.record["config"]["stream"]["joint"])

    @property
    def figures(self) -> dict[str, float | None]:
        found = figures_of(self.record, AccuracyMatrix.from_dict(self.record["matrix"]))
        cost = self.record["cost"] | {"seconds": self.record["cost"]["seconds"]["total"]}
        accuracies = {key: found[key] if not self.joint or key == ONLY_JOINT else None for key in ACCURACIES}
        return accuracies | {key: cost.get(key) for key in COSTS}


@dataclass(frozen=True)
class Trial:
    """What the search tried, and its score on validation data; None where it is not done or has failed."""

    settings: Mapping[str, Any]
    score: float | None
    failed: bool
    older: bool = False
    """Made with other code than this."""


@dataclass(frozen=True)
class RowRuns:
    runs: Sequence[Run]
    planned: int
    trials: Sequence[Trial] = ()
    chosen: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Line:
    """A row as it is shown."""

    name: str
    accuracies: list[str]
    costs: list[str]
    record: dict[str, Any]
    """The same for programs."""


@dataclass(frozen=True)
class Section:
    """The table of a stream."""

    name: str
    caption: str
    lines: list[Line]
    notes: list[str]
    search: list[tuple[str, list[tuple[str, bool]]]]
    """For each row that was searched: its name, and each trial in words and whether it was chosen."""


@dataclass(frozen=True)
class Content:
    """All that the tables say."""

    title: str
    accuracies: list[str]
    costs: list[str]
    """Titles of the columns."""
    sections: list[Section]
    search_note: str
    definitions: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    command: str
    files: list[tuple[str, str]] = field(default_factory=list)
    """The grid and its base, as they were written."""


def content(grid: Grid, rows: Mapping[Row, RowRuns], command: str) -> Content:
    baseline = grid.settings.baseline
    minus = [f"Minus {baseline}"] if baseline else []
    base = grid.settings.base
    files = [(grid.file.name, grid.text)]
    if isinstance(base, str):
        files.append((base, (grid.file.parent / Path(base).expanduser()).read_text(encoding="utf-8")))
    return Content(
        title=grid.settings.title or grid.name,
        accuracies=[*ACCURACIES.values(), *minus, "Runs"],
        costs=[title for title, _ in COSTS.values()],
        sections=[
            _section(stream, {row.method: runs for row, runs in rows.items() if row.stream == stream}, baseline)
            for stream in grid.streams
        ],
        search_note=_search_note(grid),
        definitions=_definitions(baseline),
        facts=_facts([run.record for runs in rows.values() for run in runs.runs]),
        command=command,
        files=files,
    )


# ---------------------------------------------------------------------------------------------- one stream


def _section(stream: str, rows: Mapping[str, RowRuns], baseline: str | None) -> Section:
    if not any(row.runs or row.trials for row in rows.values()):
        planned = sum(row.planned for row in rows.values())
        return Section(stream, f"No run of this stream is done; {planned} are planned.", lines=[], notes=[], search=[])
    against = rows[baseline].runs if baseline else []
    gains = {name: _difference(row.runs, against) for name, row in rows.items() if name != baseline}
    lines = [_line(name, row, gains.get(name), baseline) for name, row in rows.items()]
    runs = [run for row in rows.values() for run in row.runs]
    seeds = sorted({run.seed for run in runs})
    orders = sorted({run.order for run in runs if run.order is not None})
    splits = sorted({str(run.record["config"]["evaluation"]["split"]) for run in runs})
    caption = "Accuracies in %, forgetting and differences in points: mean ± standard deviation over runs"
    if runs:
        drawn = f", class orders {', '.join(map(str, orders))}" if orders else ""
        caption += f" (seeds {', '.join(map(str, seeds))}{drawn}), measured on {' and '.join(splits)} data"
    notes = [
        *_row_notes(rows, baseline),
        *_code_notes(rows),
        *_difference_notes([gain for gain in gains.values() if gain]),
    ]
    return Section(
        name=stream,
        caption=f"{caption}.",
        lines=lines,
        notes=notes,
        search=[(name, _trials(row)) for name, row in rows.items() if row.trials],
    )


def _line(name: str, row: RowRuns, gain: Difference | None, baseline: str | None) -> Line:
    values: dict[str, list[float]] = {key: [] for key in (*ACCURACIES, *COSTS)}
    for run in row.runs:
        for key, value in run.figures.items():
            if value is not None and known(value):
                values[key].append(value)
    spread = {key: stats.mean_and_spread(found) if found else (None, None) for key, found in values.items()}
    texts = [_spread_text(*spread[key]) for key in ACCURACIES]
    if baseline:
        texts.append("baseline" if name == baseline else _gain_text(gain))
    costs = [DASH if (mean := spread[key][0]) is None else write(mean) for key, (_, write) in COSTS.items()]
    texts.append(str(len(row.runs)) if len(row.runs) == row.planned else f"{len(row.runs)} of {row.planned}")
    record = {
        "name": name,
        "method": row.runs[0].record["method"]["name"] if row.runs else None,
        "chosen": row.chosen,
        "figures": {key: {"mean": m, "std": s, "values": values[key]} for key, (m, s) in spread.items()},
        "difference": vars(gain) if gain else None,
        "trials": [vars(trial) for trial in row.trials],
        "runs": [
            {"seed": run.seed, "order": run.order, "cell": run.folder, "older_code": run.older, "figures": run.figures}
            for run in row.runs
        ],
        "planned": row.planned,
    }
    return Line(name, texts, costs, record)


def _difference(ours: Sequence[Run], theirs: Sequence[Run]) -> Difference | None:
    """Of the final accuracy, in shares; by example where all tasks were learnt at once."""
    key = ONLY_JOINT if any(run.joint for run in [*ours, *theirs]) else "final_accuracy"

    def by_run(runs: Sequence[Run]) -> dict[tuple[int, int | None], float]:
        return {(run.seed, run.order): value for run in runs if (value := run.figures[key]) is not None}

    return stats.paired(by_run(ours), by_run(theirs))


def _row_notes(rows: Mapping[str, RowRuns], baseline: str | None) -> Iterable[str]:
    usual_row = baseline or next(iter(rows))
    streams = {(run.seed, run.order): run.record["stream"]["fingerprint"] for run in rows[usual_row].runs}
    searched = [len(row.trials) for row in rows.values() if row.trials]
    usual = statistics.mode(searched) if searched else 0
    for name, row in rows.items():
        if missing := row.planned - len(row.runs):
            yield f"`{name}`: {count(missing, 'run')} of {row.planned} missing."
        if any(run.joint for run in row.runs):
            yield (
                f"`{name}` learns all tasks at once, so it is no continual learner: it has one task, and the only figure that "
                "can be compared is the one by example; so is its difference."
            )
        elif any(
            streams.get((r.seed, r.order), r.record["stream"]["fingerprint"]) != r.record["stream"]["fingerprint"]
            for r in row.runs
        ):
            yield f"`{name}` did not learn the same examples as `{usual_row}`: no difference is the method's alone."
        if usual and not row.trials:
            yield f"`{name}` took no part in the search."
        elif len(row.trials) != usual:
            yield f"`{name}`: its search had {count(len(row.trials), 'trial')}, where most had {usual}."


def _code_notes(rows: Mapping[str, RowRuns]) -> Iterable[str]:
    older = {name: [run for run in row.runs if run.older] for name, row in rows.items()}
    trials = {name: sum(trial.older for trial in row.trials) for name, row in rows.items()}

    def named(counts: Mapping[str, int], totals: Iterable[int]) -> str:
        whole = sum(counts.values()) == sum(totals)
        return "all" if whole else ", ".join(f"{number} of `{name}`" for name, number in counts.items() if number)

    if any(older.values()):
        code = sorted({_code(run.record) for runs in older.values() for run in runs})
        found = named({name: len(runs) for name, runs in older.items()}, (len(row.runs) for row in rows.values()))
        yield f"Runs made with other code than this one ({'; '.join(code)}): {found}."
    if any(trials.values()):
        found = named(trials, (len(row.trials) for row in rows.values()))
        yield f"Trials of the search made with other code than this one: {found}."


def _difference_notes(gains: Sequence[Difference]) -> Iterable[str]:
    if not gains:
        return
    pairs = min(gain.pairs for gain in gains)
    if pairs == 1:
        yield "One pair of runs says nothing about spread, so there is no interval: use more seeds."
        return
    yield (
        "In brackets: the 95 % percentile bootstrap interval of the mean difference over pairs of runs with the same seed and "
        f"class order ({'all resamples' if pairs <= stats.EXACT else f'{stats.DRAWS:,} resamples'})."
    )
    if pairs <= stats.EXACT:
        what = "is the range from the smallest difference to the largest" if pairs <= 3 else "is coarse"
        holds = percent(stats.coverage_bound(pairs), 0)
        yield (
            f"With {pairs} pairs it {what}. That range holds the true mean of symmetric differences {holds} of the time, "
            "whatever their distribution, and not 95 %: more seeds make it surer."
        )


def _trials(row: RowRuns) -> list[tuple[str, bool]]:
    return [
        (
            f"{said(trial.settings)}: "
            + ("failed" if trial.failed else DASH if trial.score is None else f"{100 * trial.score:.1f}"),
            trial.settings == row.chosen,
        )
        for trial in row.trials
    ]


def _spread_text(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return DASH
    return signed(f"{100 * mean:.1f}") + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _gain_text(gain: Difference | None) -> str:
    if gain is None:
        return DASH

    def text(value: float) -> str:
        return signed(f"{100 * value:+.1f}") if round(100 * value, 1) else "0.0"

    bracket = "" if gain.low is None or gain.high is None else f" [{text(gain.low)}, {text(gain.high)}]"
    return text(gain.mean) + bracket


# ---------------------------------------------------------------------------------------------- beneath the tables


def _search_note(grid: Grid) -> str:
    search = grid.settings.search
    if search is None:
        return ""
    return (
        f"Tried on the first {count(search.tasks, 'task')} of the stream with seed {search.seed}, and measured on "
        "validation examples: the source's own, or else held out of its training examples. Shown is the average accuracy "
        "there in %; the highest, in bold, was chosen. No test example was used."
    )


def _definitions(baseline: str | None) -> list[tuple[str, str]]:
    found = [(title, DEFINITIONS[key]) for key, title in ACCURACIES.items()]
    if baseline:
        found.append((f"Minus {baseline}", f"final accuracy minus that of {baseline} in the same seed and class order"))
    return found + [(COSTS[key][0], text) for key, text in COST_DEFINITIONS.items()]


def _facts(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the runs ran on; where they differ, all there is."""

    def all_of(read: Callable[[Mapping[str, Any]], Any]) -> str:
        return "; ".join(dict.fromkeys(str(read(record)) for record in records))

    def machine(key: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda record: record["machine"][key]

    if not records:
        return []
    return [
        ("Code", all_of(_code)),
        ("Torch", all_of(machine("torch"))),
        ("Python", all_of(machine("python"))),
        ("CPU", all_of(_processor)),
        ("Threads per run", all_of(machine("threads"))),
        ("Frozen weights in", all_of(machine("precision"))),
        ("Backbone", all_of(lambda r: f"{r['backbone']['name']}, sha256 {r['backbone']['hash']}")),
        ("Data", all_of(lambda r: f"{r['stream']['data']}, {r['stream']['scenario']}")),
        ("Stream fingerprint", all_of(lambda r: r["stream"]["fingerprint"])),
    ]


def _processor(record: Mapping[str, Any]) -> str:
    gpu = record["machine"].get("gpu")
    return str(record["machine"]["cpu"]) + (f", computing on {gpu}" if gpu else "")


def _code(record: Mapping[str, Any]) -> str:
    commit = record["code"]["commit"]
    return f"lamina {record['code']['version']}" + (f", commit {commit}" if commit else "")


# ---------------------------------------------------------------------------------------------- as text


def block(told: Content) -> str:
    """The Markdown of everything but the title."""
    parts: list[str] = []
    for section in told.sections:
        if len(told.sections) > 1:
            parts.append(f"## {section.name}")
        accuracies = [(f"`{line.name}`", *line.accuracies) for line in section.lines]
        costs = [(f"`{line.name}`", *line.costs) for line in section.lines]
        parts.append(section.caption)
        if section.lines:
            parts += [_markdown_table(["Method", *told.accuracies], accuracies), COST_CAPTION]
            parts.append(_markdown_table(["Method", *told.costs], costs))
        parts += ["\n".join(f"- {note}" for note in section.notes)] if section.notes else []
        if section.search:
            tried = [
                (f"`{name}`", " · ".join(f"**{text}**" if best else text for text, best in trials))
                for name, trials in section.search
            ]
            parts += ["### Search", told.search_note]
            parts.append(_markdown_table(["Method", "Tried"], tried, numbers=False))
    parts += ["### Columns", "\n".join(f"- **{name}**: {text}" for name, text in told.definitions)]
    parts.append("a[i, j] is the accuracy on the data of task j after learning task i, with tasks counted 0 to T-1.")
    parts += ["### How it was made", f"    {told.command}"]
    parts += [f"`{name}`:\n\n```yaml\n{text.strip()}\n```" for name, text in told.files]
    parts.append("\n".join(f"- {name}: {text}" for name, text in told.facts))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    return "\n".join(
        [line(columns), "|---" + ("|---:" if numbers else "|---") * (len(columns) - 1) + "|", *map(line, rows)]
    )


def check_page(file: Path) -> None:
    """Raises ConfigError where the block of the table would have no place in a page that is there already."""
    if file.exists() and not _parts(file.read_text(encoding="utf-8")):
        raise ConfigError(
            f"--page {file}: it needs one line {BEGIN} and, after it, one line {END}; what stands between them is replaced."
        )


def write(told: Content, out: Path, page: Path | None = None) -> Path:
    """table.md, table.html and table.json in `out`; the Markdown also in a page of yours, between its two markers. Returns
    the path of the HTML page."""
    text = block(told)
    report.write_text(f"# {told.title}\n\n{text}", out / "table.md")
    streams = [
        {"name": s.name, "caption": s.caption, "notes": s.notes, "rows": [line.record for line in s.lines]}
        for s in told.sections
    ]
    facts = {name.lower().replace(" ", "_"): text for name, text in told.facts}
    record = {"format": FORMAT, "title": told.title, "command": told.command, "streams": streams, "facts": facts}
    report.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", out / "table.json")
    if page is not None:
        check_page(page)
        old = page.read_text(encoding="utf-8") if page.exists() else f"# {told.title}\n\n{BEGIN}\n{END}\n"
        head, tail = _parts(old) or ("", "")
        report.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}", page)
    template = report.template("lamina.compare", "table.html.j2")
    return report.write_text(template.render(told=told, cost_caption=COST_CAPTION), out / "table.html")


def _parts(page: str) -> tuple[str, str] | None:
    """What stands before and after the block."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        return None
    return page[: page.index(BEGIN)], page[page.index(END) + len(END) :]
