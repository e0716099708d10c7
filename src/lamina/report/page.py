"""The page: its template, and writing it whole."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, Template

from lamina.errors import RunError
from lamina.record import Record
from lamina.report import charts
from lamina.report.comparison import comparison
from lamina.report.run_view import lowest_shown, run_view
from lamina.report.text import interval, number, percent, plain, points, scaled, seconds


def labels(runs: Sequence[Record]) -> list[str]:
    """Returns the name of each run; with its seed where names repeat, and with a number where that is not enough."""
    names = [run.name for run in runs]
    full = [
        f"{run.name} (seed {run.seed})" if names.count(run.name) > 1 and run.seed is not None else run.name
        for run in runs
    ]
    seen: Counter[str] = Counter()
    unique = []
    for name in full:
        seen[name] += 1
        unique.append(f"{name} #{seen[name]}" if full.count(name) > 1 else name)
    return unique


def machine_title(name: str) -> str:
    """Returns the title of a field of MachineRecord."""
    return {"gpu": "GPU", "cpu": "CPU", "memory_gb": "Memory, GB"}.get(name, name.capitalize())


@cache
def template(package: str = "lamina.report", name: str = "template.html.j2") -> Template:
    """Returns a template of ours, with the look and the words of the report."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (percent, points, seconds, scaled, number, plain)}
    style = files("lamina.report").joinpath("style.css").read_text(encoding="utf-8")
    environment.globals |= {"interval": interval, "machine_title": machine_title, "style": style}
    return environment.from_string(files(package).joinpath(name).read_text(encoding="utf-8"))


def render(runs: Sequence[Record], title: str | None = None) -> str:
    """Returns the page as text. The same records give the same page."""
    if not runs:
        raise RunError("there is no run to report on. Name at least one run directory.")
    names, low = labels(runs), lowest_shown(runs)
    data = sorted({run.stream.data for run in runs if run.stream.data})
    on = f" on {', '.join(data)}" if data else ""
    return template().render(
        title=title or (f"{names[0]}{on}" if len(runs) == 1 else f"{len(runs)} runs{on}"),
        compare=comparison(runs, names) if len(runs) > 1 else None,
        runs=[run_view(run, name, i, low) for i, (run, name) in enumerate(zip(runs, names, strict=True))],
        low=f"{low:g}",
        colours=range(charts.COLOURS),
    )


def write(runs: Sequence[Record], out: Path, *, title: str | None = None) -> Path:
    """Writes the page to `out`, whole or not at all, and returns `out`."""
    return write_text(render(runs, title), out)


def write_text(text: str, out: Path) -> Path:
    """Writes a file, whole or not at all, and returns `out`."""
    if out.is_dir():
        raise RunError(f"{out} is a directory. Give the name of a file, for example {out / 'report.html'}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out
