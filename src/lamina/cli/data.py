"""`lamina data`: checks of data before a run."""

from typing import Annotated

import typer


def check(
    source: Annotated[str, typer.Argument(help="A source as for `lamina run --data`.")],
    kind: Annotated[str, typer.Option(help="auto, image, text or instructions.")] = "auto",
    min_per_class: Annotated[int, typer.Option(help="Report classes with fewer training examples than this.")] = 5,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="data.columns.label=..., data.test_fraction=...")
    ] = None,
) -> None:
    """Audit data: classes, counts per split, damaged files, exact duplicates across splits and tasks, scarce classes.

    Exit code 1 if problems were found, 0 if not.
    """
    from lamina import config as configuration
    from lamina import data

    overrides = [configuration.parse_override(text) for text in settings or []]
    section = configuration.load(
        None,
        [("data.source", source), ("data.kind", kind), *overrides],
        method_settings={"lamina": configuration.MethodConfig},
        schema=configuration.RunConfig,
    ).data
    opened = data.open_source(
        section.source,
        kind=section.kind,
        columns=data.Columns(**section.columns.model_dump()),
        test_fraction=section.test_fraction,
    )
    found = data.audit(opened, min_per_class=min_per_class)
    print(data.render(found))
    if found.problems:
        raise typer.Exit(1)
