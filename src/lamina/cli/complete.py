"""`lamina predict` for language models: generated text, or ranked options."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lamina.cli.tables import print_table
from lamina.errors import DataError

if TYPE_CHECKING:
    from lamina.model import Completion, Model

NOTHING = (
    "there is nothing to predict. Give a prompt, --text, --file, or `-` for standard input (a prompt on each line)."
)
KEYS = {"prompt", "text", "messages", "options", "completion", "domain", "split"}
"""What a line of JSON may hold. The last three are of training data, and are left out."""
SHOWN = 100
"""Characters of a prompt that are shown."""


@dataclass(frozen=True)
class Given:
    """What the command was given. prompts: `-` is standard input. options: texts to rank. most: tokens to generate."""

    prompts: Sequence[str]
    texts: Sequence[str]
    files: Sequence[Path]
    options: tuple[str, ...]
    most: int | None
    chat: bool
    as_json: bool


@dataclass(frozen=True)
class Line:
    """One prompt to predict for. shown: as text."""

    shown: str
    prompt: Any
    options: tuple[str, ...]


def complete(opened: "Model", given: Given) -> None:
    """Print the completion of each prompt. Exits with code 1 where some could not be read, and with 2 where none could."""
    from lamina.data.instruction_rows import check_options

    if given.options:
        check_options(given.options, "--options")
    lines = [*_lines(given)]
    if not lines:
        raise DataError(NOTHING)
    predictor = opened.language()
    if given.chat and not predictor.reader.chats:
        raise DataError(
            f"--chat: the tokenizer {predictor.backbone.tokenizer} has no chat template. Put chat_template.jinja beside "
            "tokenizer.json, or leave --chat out."
        )
    size, bad = predictor.config.evaluation.batch_size, 0
    alone = len(lines) == 1 and not given.as_json
    streamed = alone and sys.stdout.isatty()

    def show(_: int, text: str) -> bool:
        print(text, end="", flush=True)
        return False

    for start in range(0, len(lines), size):
        part = lines[start : start + size]
        found = predictor.complete(
            [line.prompt for line in part],
            [line.options for line in part],
            max_new_tokens=given.most,
            chat=True if given.chat else None,
            each=show if streamed else None,
        )
        for line, one in zip(part, found, strict=True):
            bad += one.error is not None
            _print(line, one, given, alone=alone, streamed=streamed)
    if bad:
        print(f"{bad} of {len(lines)} prompts could not be read", file=sys.stderr)
        raise typer.Exit(2 if bad == len(lines) else 1)


def _print(line: Line, found: "Completion", given: Given, *, alone: bool, streamed: bool) -> None:
    if given.as_json:
        print(json.dumps(_as_json(line, found), ensure_ascii=False), flush=True)
        return
    if not alone:
        shown = " ".join(line.shown.split())
        print(f"> {shown[:SHOWN]}{' …' * (len(shown) > SHOWN)}")
    if found.error is not None:
        print(f"error: {found.error}")
    elif found.options:
        rows = [(one.option, f"{one.log_likelihood:.3f}", f"{one.probability:.4f}") for one in found.options]
        print_table(("option", "log-likelihood", "probability"), rows)
    else:
        print("" if streamed else found.text, flush=True)
        if not found.text and found.ended == "stop":
            print("(no text: the completion ended at once)", file=sys.stderr)
        elif found.ended == "length" and alone:
            print(
                f"(cut after {found.tokens} tokens: --max-new-tokens, or the last position of the model)",
                file=sys.stderr,
            )
    if not alone:
        print()


def _as_json(line: Line, found: "Completion") -> dict[str, Any]:
    content: dict[str, Any] = {"prompt": line.prompt}
    if found.error is not None:
        return content | {"error": found.error}
    if found.options:
        ranked = [
            {"option": one.option, "log_likelihood": one.log_likelihood, "probability": one.probability}
            for one in found.options
        ]
        return content | {"text": found.text, "options": ranked, "prompt_tokens": found.prompt_tokens}
    return content | {
        "text": found.text,
        "finish_reason": found.ended,
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.tokens,
    }


def _lines(given: Given) -> Iterator[Line]:
    for prompt in given.prompts:
        if prompt == "-":
            yield from _texts("".join(standard_input()), "standard input", given)
        elif _names_file(prompt):
            raise DataError(
                f"{prompt} is a file. Give --file {prompt} to complete its prompts, or --text for the words themselves."
            )
        else:
            yield _text(prompt, given)
    for text in given.texts:
        yield _text(text, given)
    for file in given.files:
        yield from _file(file.expanduser(), given)


def standard_input() -> Iterator[str]:
    """Yields the lines of standard input. Raises DataError where one is not UTF-8 text."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"line {number} of standard input is not UTF-8 text ({error}).") from error


def _names_file(prompt: str) -> bool:
    try:
        return bool(Path(prompt).suffix) and Path(prompt).is_file()
    except OSError:  # longer than a path may be
        return False


def _text(prompt: str, given: Given) -> Line:
    return Line(prompt, prompt, given.options)


def _texts(content: str, where: str, given: Given) -> Iterator[Line]:
    """Yields a prompt for every line that is not blank."""
    lines = content.replace("\r\n", "\n").rstrip().split("\n")  # U+2028 and the like may stand inside a text
    found = [line for line in lines if line.strip()]
    if 0 < len(found) < len(lines):
        print(f"{where}: {len(lines) - len(found)} of {len(lines)} lines are blank and left out", file=sys.stderr)
    yield from (_text(line, given) for line in found)


def _file(path: Path, given: Given) -> Iterator[Line]:
    if not path.is_file():
        raise DataError(f"--file {path} does not exist. Give a .txt file (a prompt on each line) or a .jsonl file.")
    if path.suffix.lower() == ".jsonl":
        from lamina.data.json_files import read_json_lines

        records, numbers = read_json_lines(path)
        if unused := {key for record in records if isinstance(record, dict) for key in record} - KEYS:
            print(f"--file {path}: not used: {', '.join(sorted(unused))}", file=sys.stderr)
        own = sum(isinstance(record, dict) and bool(record.get("options")) for record in records)
        if own and given.options:
            print(
                f"--file {path}: {own} of {len(records)} rows have options of their own, in place of --options",
                file=sys.stderr,
            )
        for record, number in zip(records, numbers, strict=True):
            yield _record(record, f"{path} line {number}", given)
        return
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"--file {path} cannot be read as UTF-8 text ({error}).") from error
    if path.suffix.lower() in (".csv", ".parquet", ".json"):
        raise DataError(f"--file {path}: allowed are .jsonl files and files of text with a prompt on each line.")
    yield from _texts(content, f"--file {path}", given)


def _record(found: Any, where: str, given: Given) -> Line:
    """Returns the prompt of a line of JSON. The reply at the end of a chat is left out."""
    if isinstance(found, str):
        return _text(found, given)
    record = found if isinstance(found, dict) else {}
    listed = record.get("options") or given.options
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
        raise DataError(f"{where} has options that are no list of texts.")
    messages = record.get("messages")
    if messages is not None and record.get("prompt", record.get("text")) is not None:
        raise DataError(f"{where} has messages and a prompt. Leave one of them out.")
    if isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages):
        asked = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        shown = str(asked[-1].get("content", "")) if asked else ""
        return Line(shown, [{"role": one.get("role"), "content": one.get("content")} for one in asked], tuple(listed))
    prompt = record.get("prompt", record.get("text"))
    if not isinstance(prompt, str):
        raise DataError(
            f"{where} holds no prompt: it must be a text, or an object with `prompt`, `messages` or `text`."
        )
    return Line(prompt, prompt, tuple(listed))
