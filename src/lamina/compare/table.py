"""The table of a comparison: as Markdown, as a page, and as JSON for programs."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from lamina import report
from lamina.compare import guards, stats
from lamina.compare.drawings import drawings, matrices
from lamina.compare.formats import Rows, as_csv, as_latex
from lamina.compare.grid import Grid, Row, said
from lamina.compare.notes import code_of, notes_of
from lamina.compare.rows import (
    ACCURACIES,
    COST_DEFINITIONS,
    COSTS,
    LANGUAGE,
    LANGUAGE_DEFINITIONS,
    LEAST_HEADROOM,
    Headroom,
    Line,
    RowRuns,
    difference,
    known_figures,
    line_of,
)
from lamina.compare.stats import Difference
from lamina.data.leaks import Leaks
from lamina.errors import ConfigError
from lamina.maths.metrics import DEFINITIONS
from lamina.record import Record
from lamina.report.text import DASH, count

FORMAT = 2
SHARE = "Share of headroom"
TEST = "p"
COST_CAPTION = "Cost: medians over the runs."
LANGUAGE_CAPTION = "Language models: means over the runs; of tokens per second the median."
BEGIN, END = "<!-- compare -->", "<!-- /compare -->"


@dataclass(frozen=True)
class Section:
    """The table of a stream."""

    name: str
    caption: str
    lines: list[Line]
    notes: list[str]
    search: list[tuple[str, list[tuple[str, bool]]]]
    """For each row that was searched: its name, and each trial in words and whether it was chosen."""
    drawings: list[report.Drawing] = field(default_factory=list)
    forgotten: list[tuple[str, str]] = field(default_factory=list)
    """For each row the classes that were forgotten most, in words."""
    matrices: list[tuple[str, Markup]] = field(default_factory=list)
    """Accuracy matrix of every row, the mean over its runs."""


@dataclass(frozen=True)
class Content:
    """Everything that the table shows."""

    title: str
    accuracies: list[str]
    costs: list[str]
    language: list[str]
    """Titles of the columns; none of language models if there are none."""
    sections: list[Section]
    search_note: str
    definitions: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    command: str
    warnings: list[str] = field(default_factory=list)
    """What a reader must know first: the note of the grid, and leaks that were found."""
    files: list[tuple[str, str]] = field(default_factory=list)
    """Names and text of the grid and of the files it names."""


def content(grid: Grid, rows: Mapping[Row, RowRuns], command: str, leaks: Mapping[str, Leaks] | None = None) -> Content:
    """Returns the content of the table of these runs. command: the command that makes it again. leaks: test examples among the
    training examples, by stream, as far as they were looked for."""
    baseline = grid.settings.baseline
    by_stream = {s: {row.method: runs for row, runs in rows.items() if row.stream == s} for s in grid.streams}
    gains = {stream: _gains(found, baseline) for stream, found in by_stream.items()}
    tested = any(gain and gain.units >= stats.LEAST_UNITS for found in gains.values() for gain in found.values())
    differences = [f"Minus {baseline}"] if baseline else []
    differences += [TEST] if tested else []
    differences += [SHARE] if grid.settings.headroom else []
    shown = known_figures(rows.values(), ACCURACIES) or list(ACCURACIES)
    of_language = known_figures(rows.values(), LANGUAGE)
    records = [run.record for runs in rows.values() for run in runs.runs]
    warned = [
        warning
        for stream, found in by_stream.items()
        for warning in guards.warnings(
            stream, (leaks or {}).get(stream), {name: row.runs for name, row in found.items()}
        )
    ]
    files = [(grid.file.name, grid.text)]
    for given in dict.fromkeys(
        layer for layer in (grid.settings.base, *grid.settings.streams.values()) if isinstance(layer, str)
    ):
        files.append((given, (grid.file.parent / Path(given).expanduser()).read_text(encoding="utf-8")))
    return Content(
        title=grid.settings.title or grid.name,
        accuracies=[*(ACCURACIES[key] for key in shown), *differences, "Runs"],
        costs=[title for title, _ in COSTS.values()],
        language=[LANGUAGE[key][0] for key in of_language],
        sections=[
            _section(stream, found, grid, gains[stream], shown, of_language, tested)
            for stream, found in by_stream.items()
        ],
        search_note=_search_note(grid),
        definitions=_definitions(grid, shown, of_language, tested=tested),
        facts=_facts(records) + guards.facts(leaks or {}, records),
        warnings=[*([grid.settings.note] if grid.settings.note else []), *warned],
        command=command,
        files=files,
    )


# ---------------------------------------------------------------------------------------------- one stream


Gains = Mapping[str, Difference | None]
"""Differences from the baseline by name of the row; None where they are not known."""


def _gains(rows: Mapping[str, RowRuns], baseline: str | None) -> Gains:
    against = rows[baseline].runs if baseline else []
    return {name: difference(row.runs, against) for name, row in rows.items() if name != baseline}


def _corrected(gains: Gains) -> dict[str, float]:
    """Returns the p-values of the differences with enough runs, corrected for their number."""
    found = {
        name: gain.p for name, gain in gains.items() if gain and gain.p is not None and gain.units >= stats.LEAST_UNITS
    }
    return dict(zip(found, stats.holm(list(found.values())), strict=True))


def _section(
    stream: str, rows: Mapping[str, RowRuns], grid: Grid, gains: Gains, shown: Sequence[str], of_language: Sequence[str],
    tested: bool,
) -> Section:  # fmt: skip
    if not any(row.runs or row.trials for row in rows.values()):
        planned = sum(row.planned for row in rows.values())
        return Section(stream, f"No run of this stream is done; {planned} are planned.", lines=[], notes=[], search=[])
    baseline, rooms = grid.settings.baseline, grid.settings.headroom
    headroom = Headroom(rooms.frozen, rooms.joint, rows) if rooms else None
    corrected = _corrected(gains) if tested else None
    lines = [
        line_of(
            name,
            row,
            gains.get(name),
            baseline,
            shown=shown,
            of_language=of_language,
            tested=corrected,
            headroom=headroom,
        )
        for name, row in rows.items()
    ]
    runs = [run for row in rows.values() for run in row.runs]
    seeds = sorted({run.seed for run in runs})
    drawn_orders = sorted({run.order for run in runs if run.order is not None})
    orders = ["the dataset's own"] * any(run.order is None for run in runs) + [str(order) for order in drawn_orders]
    splits = sorted({run.record.split for run in runs})
    caption = "Accuracies in %, forgetting and differences in points"
    if any(len(row.runs) > 1 for row in rows.values()):
        caption += ": mean ± standard deviation over runs"
    if runs:
        of = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
        drawn = f", class orders {', '.join(orders)}" if drawn_orders else ""
        caption += f" ({of}{drawn}), measured on {' and '.join(splits)} data"
    notes = [headroom.note()] if headroom else []
    notes += notes_of(rows, {name: gain for name, gain in gains.items() if gain}, baseline)
    return Section(
        name=stream,
        caption=f"{caption}.",
        lines=lines,
        notes=notes,
        search=[(name, _trials(row)) for name, row in rows.items() if row.trials],
        drawings=drawings(rows, baseline),
        forgotten=[
            (name, ", ".join(_class(*one) for one in worst))
            for name, row in rows.items()
            if (worst := row.forgotten(6))
        ],
        matrices=matrices(rows),
    )


def _class(name: str, forgetting: float) -> str:
    return f"{name} {100 * forgetting:.1f}"


def _trials(row: RowRuns) -> list[tuple[str, bool]]:
    return [
        (
            f"{said(trial.settings)}: "
            + ("failed" if trial.failed else DASH if trial.score is None else f"{100 * trial.score:.1f}"),
            trial.settings == row.chosen,
        )
        for trial in row.trials
    ]


# ---------------------------------------------------------------------------------------------- beneath the tables


def _search_note(grid: Grid) -> str:
    search = grid.settings.search
    if search is None:
        return ""
    return (
        f"Trained on the first {count(search.tasks, 'task')} of the stream with seed {search.seed}, and measured on validation "
        "examples: the source's own, or a part of its training examples. Values are average accuracies in %; the highest, in "
        "bold, was chosen. No test example was used."
    )


def _definitions(
    grid: Grid, shown: Sequence[str], of_language: Sequence[str], *, tested: bool
) -> list[tuple[str, str]]:
    found = [(ACCURACIES[key], DEFINITIONS[key]) for key in shown]
    baseline, headroom = grid.settings.baseline, grid.settings.headroom
    if baseline:
        found.append(
            (
                f"Minus {baseline}",
                f"final accuracy minus that of {baseline} in the same seed and class order; of joint training, micro accuracy",
            )
        )
    if tested:
        found.append(
            (TEST, "p-value of that difference: two-sided permutation test, corrected for the number of rows (Holm)")
        )
    if headroom:
        found.append(
            (
                SHARE,
                f"what the row gains over {headroom.frozen} in % of what {headroom.joint} gains over it, in micro accuracy; "
                f"shown where the latter is {100 * LEAST_HEADROOM:.0f} points or more",
            )
        )
    found += [(COSTS[key][0], text) for key, text in COST_DEFINITIONS.items()]
    return found + [(LANGUAGE[key][0], (DEFINITIONS | LANGUAGE_DEFINITIONS)[key]) for key in of_language]


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns code, machine and data of the runs; where runs differ, every value."""

    def all_of(read: Callable[[Record], object]) -> str:
        return "; ".join(dict.fromkeys(DASH if (value := read(record)) is None else str(value) for record in records))

    if not records:
        return []
    return [
        ("Code", all_of(code_of)),
        ("Torch", all_of(lambda r: r.machine.torch)),
        ("Python", all_of(lambda r: r.machine.python)),
        ("CPU", all_of(lambda r: r.machine.cpu)),
        *([("GPU", all_of(lambda r: r.machine.gpu))] if any(r.machine.gpu for r in records) else []),
        ("Threads per run", all_of(lambda r: r.machine.threads)),
        *(
            [("Processes per run", all_of(lambda r: r.machine.processes))]
            if any(r.machine.processes > 1 for r in records)
            else []
        ),
        ("Precision of frozen weights", all_of(lambda r: r.machine.precision)),
        ("Backbone", all_of(lambda r: r.backbone and f"{r.backbone.name}, sha256 {r.backbone.hash}")),
        ("Data", all_of(lambda r: f"{r.stream.data}, {r.stream.scenario}")),
        ("Stream fingerprint", all_of(lambda r: r.stream.fingerprint)),
    ]


# ---------------------------------------------------------------------------------------------- as text


def block(table: Content) -> str:
    """Returns the Markdown of everything but the title."""
    parts = [f"**{warning}**" for warning in table.warnings]
    for section in table.sections:
        if len(table.sections) > 1:
            parts.append(f"## {section.name}")
        accuracies = [(f"`{line.name}`", *line.accuracies) for line in section.lines]
        costs = [(f"`{line.name}`", *line.costs) for line in section.lines]
        parts.append(section.caption)
        if section.lines:
            parts += [_markdown_table(["Method", *table.accuracies], accuracies), COST_CAPTION]
            parts.append(_markdown_table(["Method", *table.costs], costs))
        if table.language and section.lines:
            language = [(f"`{line.name}`", *line.language) for line in section.lines]
            parts += [LANGUAGE_CAPTION, _markdown_table(["Method", *table.language], language)]
        parts += ["\n".join(f"- {note}" for note in section.notes)] if section.notes else []
        if section.search:
            tried = [
                (f"`{name}`", " · ".join(f"**{text}**" if best else text for text, best in trials))
                for name, trials in section.search
            ]
            parts += ["### Search", table.search_note]
            parts.append(_markdown_table(["Method", "Tried"], tried, numbers=False))
    parts += ["### Columns", "\n".join(f"- **{name}**: {text}" for name, text in table.definitions)]
    parts += ["### Reproduce", f"    {table.command}"]
    parts += [f"`{name}`:\n\n```yaml\n{text.strip()}\n```" for name, text in table.files]
    parts.append("\n".join(f"- {name}: {text}" for name, text in table.facts))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    return "\n".join(
        [line(columns), "|---" + ("|---:" if numbers else "|---") * (len(columns) - 1) + "|", *map(line, rows)]
    )


def check_page(file: Path) -> None:
    """Raises ConfigError where an existing page has no place for the table, or is not text."""
    try:
        parts = _parts(file.read_text(encoding="utf-8")) if file.exists() else ("", "")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--page {file}: cannot be read as text: {error}. Give a Markdown file.") from error
    if parts is None:
        raise ConfigError(
            f"--page {file}: it needs one line {BEGIN} and, after it, one line {END}. The text between them is replaced."
        )


def write(table: Content, out: Path, page: Path | None = None) -> Path:
    """Writes table.md, .html, .csv, .tex and .json into `out`, and the Markdown between the two markers of a page. Returns the
    path of table.html."""
    text = block(table)
    report.write_text(f"# {table.title}\n\n{text}", out / "table.md")
    streams = [
        {"name": s.name, "caption": s.caption, "notes": s.notes, "rows": [line.to_json() for line in s.lines]}
        for s in table.sections
    ]
    facts = {name.lower().replace(" ", "_"): text for name, text in table.facts}
    record = {
        "format": FORMAT,
        "title": table.title,
        "command": table.command,
        "warnings": table.warnings,
        "streams": streams,
    }
    record["facts"] = facts
    report.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", out / "table.json")
    if page is not None:
        check_page(page)
        old = page.read_text(encoding="utf-8") if page.exists() else f"# {table.title}\n\n{BEGIN}\n{END}\n"
        head, tail = _parts(old) or ("", "")
        report.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}", page)
    template = report.template("lamina.compare", "table.html.j2")
    rows = [Rows(section.name, section.caption, section.lines) for section in table.sections]
    report.write_text(as_csv(rows, language=bool(table.language)), out / "table.csv")
    told = "".join(f"% {warning}\n" for warning in table.warnings)
    report.write_text(told + as_latex(rows, table.accuracies), out / "table.tex")
    captions = {"costs": COST_CAPTION, "language": LANGUAGE_CAPTION}
    html = template.render(content=table, captions=captions, said=said, code_of=code_of)
    return report.write_text(html, out / "table.html")


def _parts(page: str) -> tuple[str, str] | None:
    """Returns the text before and after the table; None unless each marker occurs exactly once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        return None
    return page[: page.index(BEGIN)], page[page.index(END) + len(END) :]
