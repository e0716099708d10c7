"""`lamina methods`: a table of the methods, or the details of one."""

import difflib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.errors import ConfigError

if TYPE_CHECKING:
    from lamina.methods.base import Needs


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method: paper, requirements, settings.")] = None,
) -> None:
    """List the methods, or show the paper, the requirements and the settings of one."""
    from lamina.methods import METHODS
    from lamina.methods.base import describe

    if name is None:
        rows = [("method", "paper", "examples", "task count", "cost per task")]
        rows += [
            (
                known,
                method.paper.venue,
                f"{method.needs.stored_examples}/class" if method.needs.stored_examples else "none",
                "used" if method.needs.task_count else "-",
                _cost(method.needs),
            )
            for known, method in METHODS.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        advice = ["when to use it", *(method.advice for method in METHODS.values())]
        for row, line in zip(rows, advice, strict=True):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            print(f"    {line}")
        print("\n`lamina methods NAME` shows the paper, the requirements and the settings of one method.")
        return
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no method {name!r}. There are: {', '.join(METHODS)}.{hint}")
    print("\n".join(_details(describe(METHODS[name]))))


def _cost(needs: "Needs") -> str:
    """Returns what every task adds: to the storage, and to which operations."""
    growing = [
        f"{name} grow" for name, cost in (("steps", needs.step), ("predictions", needs.prediction)) if cost == "linear"
    ]
    return "; ".join([needs.per_task, *growing])


def _details(facts: dict[str, Any]) -> list[str]:
    """Returns all that `describe` says of a method, in lines."""
    parallel = " Tasks can be trained in parallel (--jobs)." if facts["independent"] else ""
    lines = [
        f"{facts['name']}: {facts['title']}",
        f"{facts['authors']}, {facts['venue']}, {facts['link']}",
        "",
        facts["advice"],
        "",
        f"Streams: {', '.join(facts['scenarios'])}.{parallel}",
        f"Task count: {'used if it is known' if facts['task_count'] else 'not required'}.",
        f"Stored examples: {facts['stored_examples'] or 'none'}{' per class' if facts['stored_examples'] else ''}.",
        f"Storage: {facts['storage']}",
        facts["cost"],
        "",
        "Settings (--set method.NAME=VALUE, or under `method:` in YAML):",
    ]
    for key, setting in facts["settings"].items():
        lines += [f"  {key} = {setting['default']}", f"      {' '.join(setting['what'].split())}"]
    if facts["around"]:
        lines += ["", "Its defaults for settings of every run:"]
        lines += [f"  {key} = {value}" for key, value in facts["around"].items()]
    if facts["departures"]:
        lines += ["", "Departures from the paper:"]
        lines += [f"  - {departure}" for departure in facts["departures"]]
    return lines
