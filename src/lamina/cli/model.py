"""`lamina create`, `learn`, `status`, `history`, `rollback`, `gate`, `configure` and `forget`: a model that keeps
learning."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.predict import Where
from lamina.cli.progress import Watcher
from lamina.cli.run import Settings, stoppable
from lamina.cli.tables import print_table, size_of
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from lamina.config import ModelConfig
    from lamina.model import Card, GateResult, Model


def create(
    model: Annotated[Path, typer.Argument(help="Directory to make.", metavar="MODEL")],
    file: Annotated[Path | None, typer.Argument(help="YAML file with settings. Flags and --set override it.")] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="`nano`, a folder or file with weights, or a hub name.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Method; `lamina methods` lists them. Default: lamina.")
    ] = None,
    probes: Annotated[
        int | None,
        typer.Option(
            help="Held-out examples of each class that the model may keep (downscaled images, or token ids), to measure "
            "how later tasks change its accuracy. Default: none."
        ),
    ] = None,
    rehearsal: Annotated[
        int | None,
        typer.Option(help="Training examples of each class that the model may keep and train on again. Default: none."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width of the input in pixels.")] = None,
    tasks: Annotated[
        int | None,
        typer.Option("--tasks", "-t", min=1, help="Number of tasks to come, if it is known, for methods that use it."),
    ] = None,
    settings: Settings = None,
    from_run: Annotated[Path | None, typer.Option(help="Begin with what a finished run has learnt.")] = None,
    embed_base: Annotated[bool, typer.Option("--embed-base", help="Copy the backbone's files into the model.")] = False,
) -> None:
    """Make a model that keeps learning. It has learnt nothing yet.

    Examples:

        lamina create groceries --probes 10

        lamina create intents --backbone all-MiniLM-L6-v2/ --set gate.task_drop=0.02

        lamina create assistant --backbone SmolLM2-135M-Instruct/ --method olora

        lamina create groceries --from-run runs/groceries-lamina-seed0
    """
    from lamina.model import Model

    flags = {"probes.per_class": probes, "rehearsal.per_class": rehearsal, "backbone.image_size": image_size}
    given = _given(flags, settings)
    if from_run is not None:
        if file is not None or backbone is not None or method is not None:
            raise ConfigError("--from-run takes backbone, method and settings from the run. Leave the others out.")
        made = Model.from_run(from_run, model, settings=given, embed_base=embed_base)
    else:
        made = Model.create(
            model,
            backbone=backbone,
            method=method,
            settings=given,
            file=file,
            embed_base=embed_base,
            task_count=tasks,
        )
    facts, name = made.facts, shlex.quote(str(model))
    print(f"{model}: method {facts.config.method['name']}, backbone {facts.base.name}, {_known(made)} learnt")
    if not facts.config.probes.per_class:
        print(
            f"It keeps no examples, so earlier tasks are measured only on data that you give. `lamina configure {name} "
            "--probes 10` lets it keep 10 held-out examples of each class that it learns from then on."
        )
    if said := _method_keeps(facts.config):
        print(said)
    print(f"Next: lamina learn {name} DATA   ({_examples(facts.kind)})")


def learn(
    model: Where,
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders, Parquet, CSV or JSON lines file(s), saved dataset, or `hf:owner/name`."
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", "--task", "-n", help="Name of the task. Default: that of the data.")
    ] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Learn only this class of the data. Repeatable.")
    ] = None,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="Learn only this domain of the data. Repeatable.")
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option("--probe", help="Labelled data to measure earlier classes on, besides the kept probes."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the adapters.")] = None,
    settings: Settings = None,
    force: Annotated[
        bool, typer.Option("--force", help="Accept the task whatever the gate finds. This is recorded.")
    ] = False,
    discard: Annotated[
        bool, typer.Option("--discard", help="Drop another task that was interrupted, or that the gate refused.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the gate found as JSON.")] = False,
) -> None:
    """Learn the next task: new classes, known classes from a new domain, or both.

    Before training, lamina prints which classes are new. Afterwards the gate compares the model with the version before, and
    adds the task if no limit is broken (`lamina configure` sets limits). Until then, and after any crash, the model is as it
    was before; the same command goes on from the last checkpoint.

    Exit code 0: learnt. 1: the gate refused. 2: an error. 130: stopped.

    Examples:

        lamina learn groceries 2026-11/

        lamina learn groceries photos.parquet --name november --class Kiwi --class Lime

        lamina learn assistant invoices.jsonl --task invoices
    """
    from lamina.model import GateRefused, Model

    opened = Model(model)
    given = _given({"training.epochs": epochs, "training.lr": lr}, settings)
    again = f"{shlex.join(['lamina', *sys.argv[1:]])}"
    try:
        with Watcher(model.resolve().name, listing=False) as watch:
            learnt = stoppable(
                again,
                lambda: opened.learn(
                    data,
                    name=name,
                    classes=classes,
                    domains=domains,
                    settings=given,
                    probe=probe,
                    force=force,
                    discard=discard,
                    watch=watch,
                ),
            )
    except GateRefused as refused:
        print_gate(refused.gate, as_json)
        print(
            f"refused: {model} is as it was before. Check the data; the same command with --force accepts the task anyway "
            "(it is trained already), and other data with --discard drops it.",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    if learnt.gate is not None:
        print_gate(learnt.gate, as_json)
    elif as_json:
        print("null")
    if not as_json:
        _print_learnt(model, learnt.card, opened)
        if said := _method_keeps(opened.facts.config):
            print(said)


def status(model: Where, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what a model has learnt, how well, what it keeps, and what may be done next."""
    from lamina.model import Model
    from lamina.model.store import WORK, file_bytes

    opened = Model(model)
    facts, cards = opened.facts, opened.cards
    if as_json:
        content = {"version": facts.version, "facts": facts.model_dump(mode="json")}
        print(json.dumps(content | {"cards": [card.model_dump(mode="json") for card in cards]}, indent=1))
        return
    print(f"{model}: version {facts.version}, {_known(opened)}, method {facts.config.method['name']}")
    print(f"backbone: {facts.base.name} ({facts.base.parameters:,} parameters, {facts.base.hash[:12]})")
    if cards:
        own = facts.kind != "language"
        rows = [
            (
                task.name,
                *((str(len(task.classes)), str(len(task.new_classes))) if own else ()),
                _share(task.accuracy),
                str(sum(kept.examples for kept in opened.store.kept_now(card).values())),
                "forced" if card.forced else "imported" if card.imported_from else "passed" if card.gate else "-",
            )
            for card in cards
            for task in card.tasks
        ]
        print()
        names = ("task", *(("classes", "new") if own else ()), "accuracy when learnt", "examples kept", "gate")
        print_table(names, rows)
    kept = sum(part.bytes for card in cards for part in opened.store.kept_now(card).values())
    work = file_bytes(model / WORK) if (model / WORK).is_dir() else 0
    waits = f" and {size_of(work)} work that waits" if work else ""
    print(f"\n{size_of(file_bytes(model))} on disk, of them {size_of(kept)} kept examples{waits}")
    if said := _method_keeps(facts.config):
        print(said)
    name = shlex.quote(str(model))
    plan = opened.store.plan()
    if opened.waiting() is not None:
        print(f"A task waits that the gate refused: `lamina gate {name}` shows why.")
    elif plan is not None and f"/{facts.head or 'none'}/" in str(plan.get("stream")):
        print(f"A task was interrupted: `{plan.get('command')}` goes on with it.")
    elif plan is not None:
        print(
            f"Task {plan['name']!r} was trained on another version, so it cannot be accepted now. --discard drops it."
        )
    given, taught = ('"..."', "DATA") if facts.kind == "language" else ("FILE", "FOLDER")
    print(f"Next: lamina predict {name} {given}" if cards else f"Next: lamina learn {name} {taught}")


def history(model: Where, as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False) -> None:
    """Show everything that happened to a model: tasks learnt, refused, forced, rolled back."""
    from lamina.model import Model

    for event in Model(model).history:
        if as_json:
            print(json.dumps(event, ensure_ascii=False))
            continue
        shown = {key: value for key, value in event.items() if key not in ("time", "event")}
        details = [
            f"{key} {_in_words(key, value)}" for key, value in shown.items() if value is not None and value is not False
        ]
        print(f"{event.get('time', '?')}  {event.get('event', '?')}: {', '.join(details)}")


def rollback(
    model: Where,
    task: Annotated[
        str | None,
        typer.Argument(help="Task (or folder in MODEL/tasks) whose version comes back. Left out with --all."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Go back to before the first task.")] = False,
) -> None:
    """Go back to the version right after a task. Later versions stay on disk, and a rollback to one of them brings it back."""
    from lamina.model import Model

    if (task is None) is not everything:
        raise ConfigError("name the task to go back to, or give --all to go back to before the first.")
    opened = Model(model)
    card = opened.rollback(task)
    known = _known(opened) if card else "nothing learnt"
    print(f"{model}: version {opened.version}, as after {card.name!r} ({known})" if card else f"{model}: {known}")
    print("Later versions stay on disk: a rollback to one of them brings it back.")


def gate(
    model: Where, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a pipeline.")] = False
) -> None:
    """Show what the newest task changed, against the limits. Exit code 0: accepted. 1: refused.

    If a task waits because it was refused, that one is shown.
    """
    from lamina.model import Model

    found = Model(model).gate()
    if found is None:
        print("null" if as_json else "there was nothing to compare: fewer than two tasks are learnt")
        return
    print_gate(found, as_json)
    if not found.accepted:
        raise typer.Exit(1)


def configure(
    model: Where,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="Where the backbone's files lie now. They must be the same.")
    ] = None,
    probes: Annotated[int | None, typer.Option(help="Held-out examples of each class to keep of later tasks.")] = None,
    rehearsal: Annotated[
        int | None, typer.Option(help="Training examples of each class to keep of later tasks.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Change settings of a model for the tasks to come: limits of the gate, probes, training; or say where the backbone lies
    now.

    Example: lamina configure groceries --probes 20 --set gate.task_drop=0.02
    """
    from lamina import config as configuration
    from lamina.model import Model

    flags = {"backbone.name": backbone, "probes.per_class": probes, "rehearsal.per_class": rehearsal}
    given = _given(flags, settings)
    opened = Model(model)
    before = opened.facts.config
    if given:
        after = opened.configure(given)
        for key, then, now in configuration.differences(before.model_dump(mode="json"), after.model_dump(mode="json")):
            print(f"{key}: {then} -> {now}")
        return
    print(configuration.to_yaml(before, without=("stream", "jobs")), end="")  # which do not apply


def prune(
    model: Where,
    keep: Annotated[
        int, typer.Option("--keep", min=1, help="Number of newest versions that a rollback can return to.")
    ],
) -> None:
    """Free the space of old versions. What the newest ones need stays, so the model predicts and learns as before.

    A rollback to an older version, or to one that was rolled back, is then no longer possible.
    """
    from lamina.model import Model

    size = Model(model).prune(keep)
    print(f"freed {size_of(size)}; a rollback can return to the newest {keep} version{'s' if keep > 1 else ''}")


def forget(
    model: Where,
    task: Annotated[
        str | None, typer.Argument(help="Task whose kept examples are deleted. Left out: all tasks.")
    ] = None,
) -> None:
    """Delete the examples that a model keeps. What it has learnt stays."""
    from lamina.model import Model

    size = Model(model).forget_kept(task)
    print(f"deleted {size_of(size)} of kept examples; later tasks are no longer measured on them")
    if said := _method_keeps(Model(model).facts.config):
        print(said)


# ---------------------------------------------------------------------------------------------------------------- inputs


def _given(flags: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    from lamina import config as configuration

    given = {key: value for key, value in flags.items() if value is not None}
    return given | dict(configuration.parse_override(text) for text in settings or [])


# --------------------------------------------------------------------------------------------------------------- outputs


def print_gate(found: "GateResult", as_json: bool = False) -> None:
    """Print what the gate has found, as tables or as JSON."""
    if as_json:
        print(json.dumps(found.model_dump(mode="json") | {"accepted": found.accepted}, indent=1))
        return
    print()
    if found.tasks:
        changes = [*found.tasks]
        worst = sorted((one for one in found.classes if one.drop > 0), key=lambda one: -one.drop)[:5]
        rows = [
            (
                name,
                str(one.examples),
                f"{one.before:.1%}",
                f"{one.after:.1%}",
                f"{100 * (one.after - one.before):+.1f}",
                f"{one.negative_flips:.1%}",
            )
            for name, one in [*((one.name, one) for one in changes), *((f"  class {one.name}", one) for one in worst)]
        ]
        print_table(("earlier task", "probes", "before", "after", "change", "newly wrong"), rows)
    if found.unmeasured:
        print(
            f"not measured, since no probes of them are kept: {', '.join(found.unmeasured)} (--probe DATA measures them)"
        )
    facts = []
    if found.negative_flips is not None:
        facts.append(f"newly wrong {found.negative_flips:.1%}")
    if found.calibration_after is not None and found.calibration_before is not None:
        facts.append(f"calibration error {found.calibration_before:.3f} -> {found.calibration_after:.3f}")
    if found.milliseconds_after is not None and found.milliseconds_before is not None:
        facts.append(f"one prediction {found.milliseconds_before:.1f} -> {found.milliseconds_after:.1f} ms")
    if facts:
        print(", ".join(facts))
    for problem in found.problems:
        print(f"limit broken: {problem}")


def _print_learnt(model: Path, card: "Card", opened: "Model") -> None:
    name, task = shlex.quote(str(model)), card.tasks[-1]
    kept = ", ".join(f"{part.examples} {what} ({size_of(part.bytes)})" for what, part in card.kept.items())
    print(
        f"\nlearnt {task.name!r}{' (forced)' if card.forced else ''}: version {card.version} knows "
        f"{_known(opened)}; {card.seconds['total']:.1f} s; kept: {kept or 'no examples'}"
    )
    given = '"..."' if opened.facts.kind == "language" else "FILE"
    print(f"Next: lamina predict {name} {given}, lamina serve {name}, or lamina learn {name} with the next data")


def _known(opened: "Model") -> str:
    """Returns how much a model has learnt: classes, or tasks of a language model."""
    if opened.facts.kind == "language":
        tasks = sum(len(card.tasks) for card in opened.cards)
        return f"{tasks} task{'s' * (tasks != 1)}"
    known = len(opened.classes)
    return f"{known} class{'es' * (known != 1)}"


def _method_keeps(config: "ModelConfig") -> str | None:
    """Returns what to say of a method that stores training examples in its own memory."""
    from lamina.methods import METHODS

    method = METHODS[config.method["name"]]
    if not method.needs.stored_examples:
        return None
    return (
        f"Method {method.name} itself stores training examples of every class, as part of what it has learnt "
        f"(`lamina methods {method.name}` says how many). `lamina forget` does not delete them."
    )


def _in_words(key: str, value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{name}={one}" for name, one in value.items())
    return "yes" if value is True else size_of(value) if key == "bytes" else str(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _examples(kind: str) -> str:
    if kind == "language":
        return "JSON lines or Parquet with prompt and completion, or messages; or labelled texts (CSV or Parquet)"
    images = "a folder with one folder of images for each class, or a Parquet file"
    return images if kind == "image" else "a CSV or Parquet file with the columns text and label"
