"""One record as an instruction, with everything that can be wrong with it."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lamina.data.names import listed, shown
from lamina.data.records import Columns, Message, Row
from lamina.errors import DataError

ROLES = ("system", "user", "assistant")


def row_of(record: Any, columns: Columns, where: str) -> Row:
    """Returns the instruction of a record. Raises DataError, naming `where`, for anything missing or wrong in it."""
    if not isinstance(record, Mapping):
        raise DataError(
            f"{where} is {shown(repr(record))} ({type(record).__name__}); allowed is an object with a prompt and a completion."
            " Correct it"
        )
    messages, completion = record.get(columns.messages), record.get(columns.completion)
    if messages is not None and completion is not None:
        raise DataError(
            f"{where} has both {shown(columns.messages)!r} and {shown(columns.completion)!r}; allowed is one. Remove one, or"
            " name the columns with --set data.columns.messages=NAME and --set data.columns.completion=NAME"
        )
    prompt: str | tuple[Message, ...]
    if messages is not None:
        *before, last = _messages(messages, where)
        prompt, completion = tuple(before), last.content
    else:
        prompt = text_of(record.get(columns.prompt), "prompt", where)
        completion = text_of(completion, "completion", where)
    options = record.get(columns.options)
    if options is None:
        return Row(prompt, completion)
    checked = check_options(options, where)
    rank = rank_of(completion, checked)
    if rank < 0:
        raise DataError(
            f"{where} has the completion {shown(completion)!r}, which is none of its options ({listed(checked)})."
            " Correct the completion, or add it to the options"
        )
    return Row(prompt, checked[rank], checked)


def text_of(value: Any, what: str, where: str) -> str:
    """Returns a text. Raises DataError where it is missing, blank, of another type or not valid Unicode."""
    if value is None:
        raise DataError(f"{where} has no {what}. Add one")
    if not isinstance(value, str):
        raise DataError(
            f"{where} has the {what} {shown(repr(value))} ({type(value).__name__}); allowed is text. Correct it"
        )
    if not value.strip():
        raise DataError(f"{where} has a blank {what} ({shown(repr(value))}). Put a text in it")
    return unicode_of(value, what, where)


def rank_of(completion: str, options: Sequence[str]) -> int:
    """Returns the position of a completion among the options, compared in Unicode NFC; -1 where it is none."""
    wanted = unicodedata.normalize("NFC", completion)
    return next((k for k, option in enumerate(options) if unicodedata.normalize("NFC", option) == wanted), -1)


def unicode_of(value: str, what: str, where: str) -> str:
    """Returns the text. Raises DataError where it is not valid Unicode."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the {what} of {where} is not valid Unicode ({error.reason}, character {error.start}). Correct the text"
        ) from error
    return value


def _messages(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where} has the messages {shown(repr(messages))}; allowed is a list of {{role, content}}. Correct them"
        )
    found = []
    for k, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise DataError(
                f"message {k + 1} of {where} has the role {shown(repr(role))}; allowed are {', '.join(ROLES)}, with a content."
                " Correct it, or remove the message"
            )
        content = message.get("content")
        # Chats without a system prompt are often written with an empty one, and a model may have replied nothing.
        optional = role == "system" or (role == "assistant" and k < len(messages) - 1)
        blank = optional and isinstance(content, str) and not content.strip()
        what = f"content of message {k + 1} ({role})"
        found.append(Message(role, unicode_of(content, what, where) if blank else text_of(content, what, where)))
    if found[-1].role != "assistant":
        raise DataError(
            f"the last message of {where} has the role {found[-1].role!r}; allowed is assistant, as it is the completion."
            " Add the reply"
        )
    if not any(message.role == "user" for message in found[:-1]):
        raise DataError(f"the messages of {where} hold none of the role user: there is no prompt. Add one")
    return found


def check_options(options: Any, where: str) -> tuple[str, ...]:
    """Returns options as texts. Raises DataError for fewer than two, and for those that are no texts, blank or not distinct."""
    if not isinstance(options, list | tuple):
        raise DataError(
            f"{where} has the options {shown(repr(options))} ({type(options).__name__}); allowed is a list of texts. Correct"
            " them, or remove them where any completion is allowed"
        )
    if not options:
        raise DataError(
            f"{where} has an empty list of options. List them, or leave options out where any completion is allowed"
        )
    if len(options) == 1:
        raise DataError(
            f"{where} has the single option {shown(repr(options[0]))}, which would always be predicted. List all options,"
            " or none where any completion is allowed"
        )
    checked = tuple(text_of(option, f"option {k + 1}", where) for k, option in enumerate(options))
    names = [class_name(option) for option in checked]
    if len(set(names)) < len(names):
        twice = next(option for option, name in zip(checked, names, strict=True) if names.count(name) > 1)
        raise DataError(
            f"{where} has the option {shown(twice)!r} more than once (white space aside). Remove the others, or make them"
            " differ"
        )
    return checked


def class_name(text: str) -> str:
    """Returns a completion as the name of a class: on one line, in Unicode NFC."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def unused(record: Mapping[str, Any], columns: Columns) -> Iterator[str]:
    """Yields the columns of a record that nothing is made of."""
    used = {columns.options, columns.domain, columns.split}
    messages = record.get(columns.messages)
    if messages is None:
        used |= {columns.prompt, columns.completion}
    else:
        used.add(columns.messages)
        for message in messages:
            yield from (
                f"{columns.messages}.{key}"
                for key, value in message.items()
                if key not in ("role", "content") and value is not None
            )
    yield from (str(key) for key, value in record.items() if key not in used and value is not None)
