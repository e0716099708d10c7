"""What a value should have been, in plain words, from an error of pydantic."""

from collections.abc import Iterable, Mapping
from typing import Any

NOUNS: Mapping[str, str] = {
    "string_type": "a text",
    "list_type": "a list [...]",
    "tuple_type": "a list [...]",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "dict_type": "an object {...}",
    "model_type": "an object {...}",
}


def allowed(types: Iterable[str]) -> str:
    """Returns "allowed is a text or a list [...]" for the types of one value's errors; nothing if some are not about
    its type."""
    listed = list(types)
    if not listed or any(one not in NOUNS for one in listed):
        return ""
    return f"allowed is {' or '.join(dict.fromkeys(NOUNS[one] for one in listed))}"


def told(error: Any) -> str:
    """Returns the message of an error without what pydantic puts around it, in lower case."""
    message: str = error["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    return message[:1].lower() + message[1:]
