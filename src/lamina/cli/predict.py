"""`lamina predict`: classes, probabilities and tasks of files or texts; completions of prompts."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lamina.cli.complete import Given, complete, standard_input
from lamina.cli.tables import print_table
from lamina.errors import DataError

if TYPE_CHECKING:
    from lamina.model import Prediction

Where = Annotated[Path, typer.Argument(help="Directory of the model.", metavar="MODEL")]
Format = Literal["table", "json", "csv"]
LANGUAGE = "Language models"


def predict(
    model: Where,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Image files, folders of them, or `-` for standard input (an image, or paths, one a line). For text "
            "models: .txt files with a text on each line, .csv or .jsonl files with a column `text`, or `-`. For language "
            "models: prompts, or `-` (a prompt on each line).",
            metavar="[INPUTS]...",
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text to classify, or a prompt. Repeatable.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Number of classes shown for each input.")] = 1,
    form: Annotated[
        Format, typer.Option("--format", "-f", help="table, json (a line for each input) or csv.")
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            rich_help_panel=LANGUAGE,
            help="A .txt file with a prompt on each line, or a .jsonl file with `prompt` or `messages`, and perhaps "
            "`options`. Repeatable.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=LANGUAGE,
            help="Texts to rank by their likelihood, separated by commas, instead of generating. Given several times, each "
            "is one text, which may hold commas.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", rich_help_panel=LANGUAGE, help="Ask with the tokenizer's chat template, as a user."),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=LANGUAGE, help="Most generated tokens. Default: evaluation.max_new_tokens (64)."
        ),
    ] = None,
) -> None:
    """Print class, probability, and the task that the class was learnt in. A language model completes prompts, greedily, or
    ranks options.

    An input that cannot be read is named in its place. Exit code 0: all predicted. 1: some could not be read. 2: none could,
    or an error.

    Examples:

        lamina predict groceries cat.jpg photos/ --top 5

        lamina predict intents --text "what is my balance" --format json

        find . -name '*.jpg' | lamina predict groceries - --format csv > labels.csv

        lamina predict assistant "Which date is on invoice 17?" --chat

        lamina predict assistant --file prompts.jsonl --options yes,no --json
    """
    from lamina.model import Model

    opened = Model(model)
    form = "json" if as_json else form
    if opened.facts.kind == "language":
        if top != 1 or form == "csv":
            raise DataError("--top and --format csv are for classifiers. Leave them out; --options ranks texts.")
        given = options or []
        listed = tuple(one.strip() for one in (given[0].split(",") if len(given) == 1 else given))
        asked = Given(files or [], text or [], prompts or [], listed, max_new_tokens, chat, form == "json")
        complete(opened, asked)
        return
    if prompts or options or chat or max_new_tokens is not None:
        raise DataError("--file, --options, --chat and --max-new-tokens are for language models. Leave them out.")
    named = _texts(files or [], text or []) if opened.facts.kind == "text" else _images(files or [], text or [])
    if not files and not text:
        raise DataError("there is nothing to predict. Give files, a folder, --text, or `-` for standard input.")
    first = next(named, None)  # what is missing is said before anything is loaded
    predictor = opened.predictor()
    names: list[str] = []

    def payloads() -> Iterator[Any]:
        for shown, payload in chain([] if first is None else [first], named):
            names.append(shown)
            yield payload

    found = predictor.stream(payloads(), top)
    bad = _print_predictions(found, names, top, form)
    if not names:
        raise DataError("there is nothing to predict. Give files, a folder, --text, or `-` for standard input.")
    if bad:
        print(f"{bad} of {len(names)} inputs could not be read", file=sys.stderr)
        raise typer.Exit(2 if bad == len(names) else 1)


def _images(files: list[str], texts: list[str]) -> Iterator[tuple[str, Any]]:
    from lamina.data.inputs import image_files, read_file

    if texts:
        raise DataError("--text: this model takes images. Give image files, or a folder of them.")
    paths: list[Path] = []
    for name in files:
        if name != "-":
            paths += image_files(Path(name))
            continue
        content = sys.stdin.buffer.read()
        try:
            lines = [line for line in content.decode().splitlines() if line.strip()]
            if "\0" in content.decode():
                raise ValueError("no text")
        except ValueError:
            yield "-", content
            continue
        paths += [file for line in lines for file in image_files(Path(line))]
    for path in paths:
        try:
            yield str(path), read_file(path)
        except DataError as error:
            yield str(path), error


def _texts(files: list[str], texts: list[str]) -> Iterator[tuple[str, Any]]:
    yield from ((text, text) for text in texts)
    for name in files:
        for text in _lines(name):
            yield text, text


def _lines(name: str) -> Iterable[str]:
    """Yields the texts of a file."""
    if name == "-":
        return (line.rstrip("\r\n") for line in standard_input() if line.strip())
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"{name} is no file. Give .txt, .csv or .jsonl files, --text TEXT, or `-` for standard input.")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read as UTF-8 text ({error}).") from error
    if path.suffix.lower() == ".csv":
        rows = list(csv.DictReader(io.StringIO(content)))
        if rows and "text" not in rows[0]:
            raise DataError(f"{name} has no column `text`; it has {', '.join(map(str, rows[0]))}.")
        return [row["text"] or "" for row in rows]
    if path.suffix.lower() == ".jsonl":
        from lamina.data.json_files import read_json_lines

        return [_text_of(found, f"{name} line {number}") for found, number in zip(*read_json_lines(path), strict=True)]
    return [line for line in content.split("\n") if line.strip()]  # U+2028 and the like may stand inside a text


def _text_of(found: Any, where: str) -> str:
    text = found.get("text") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise DataError(f"{where} holds no text: it must be a text, or an object with the key `text`.")
    return text


def _print_predictions(found: "Iterable[Prediction]", names: list[str], top: int, form: Format) -> int:
    """Print predictions as they come. Returns how many inputs could not be read."""
    bad = 0
    rows: list[tuple[str, ...]] = []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        writer.writerow(("input", "rank", "class", "probability", "task", "error"))
    for number, prediction in enumerate(found):
        name = names[number]
        bad += prediction.error is not None
        if form == "json":
            best = [
                {"class": g.label, "probability": round(g.probability, 6), "task": g.task} for g in prediction.guesses
            ]
            line: dict[str, Any] = {"input": name}
            if prediction.error is not None:
                line["error"] = prediction.error
            else:
                line |= best[0] | ({"top": best} if top > 1 else {})
            print(json.dumps(line, ensure_ascii=False), flush=True)
            continue
        lines = [
            (name, str(rank), g.label, f"{g.probability:.4f}", g.task, "")
            for rank, g in enumerate(prediction.guesses, 1)
        ] or [(name, "", "", "", "", prediction.error or "")]
        if form == "csv":
            writer.writerows(lines)
        else:
            rows += [(one[0] if one[1] in ("1", "") else "", one[2] or one[5], one[3], one[4]) for one in lines]
    if form == "table" and rows:
        print_table(("input", "class", "probability", "task"), rows, left=2)
    return bad
