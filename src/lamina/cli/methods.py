"""`lamina methods`: a table of the methods, or the details of one."""

import difflib
from typing import Annotated, Any

import typer

from lamina.errors import ConfigError


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method: paper, requirements, settings.")] = None,
) -> None:
    """List the methods, or show the paper, the requirements and the settings of one."""
    from lamina.methods import METHODS, table
    from lamina.methods.base import describe

    if name is None:
        width = max(map(len, METHODS))
        print(f"{'method'.ljust(width)}  when to use")
        for row in table():
            print(f"{row['method'].ljust(width)}  {row['when to use']}")
        print("\n`lamina methods NAME` shows one method in full: paper, storage, cost, settings.")
        print("With `run --rehearsal N` it stores N more examples per class.")
        return
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no method {name!r}. There are: {', '.join(METHODS)}.{hint}")
    print("\n".join(_details(describe(METHODS[name]))))


def _details(facts: dict[str, Any]) -> list[str]:
    """Returns all that `describe` says of a method, in lines."""
    more = "; --rehearsal N adds N per class" if facts["rehearses"] else ""
    parallel = " Tasks can be trained in parallel (--jobs)." if facts["independent"] else ""
    lines = [
        f"{facts['name']}: {facts['title']}",
        f"{facts['authors']}, {facts['venue']}, {facts['link']}",
        "",
        facts["advice"],
        "",
        f"Streams: {', '.join(facts['scenarios'])}.{parallel}",
        f"Task count: {'used if it is known' if facts['task_count'] else 'not required'}.",
        f"Stored examples: {facts['stored_examples'] or 'none'}{' per class' if facts['stored_examples'] else ''}{more}.",
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
    if facts["refuses_language"]:
        lines += ["", f"Language models: not with this method; {facts['refuses_language']}."]
    elif facts["around_language"]:
        lines += ["", "The same for causal language models:"]
        lines += [f"  {key} = {value}" for key, value in facts["around_language"].items()]
    if facts["departures"]:
        lines += ["", "Departures from the paper:"]
        lines += [f"  - {departure}" for departure in facts["departures"]]
    return lines
