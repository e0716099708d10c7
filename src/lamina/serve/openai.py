"""Requests and responses of OpenAI's interface that apply to greedy completion."""

import json
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lamina.config import wording
from lamina.model import Completion
from lamina.serve.limits import Refusal

STOPS = 4
"""Most stop texts of a request, as at OpenAI."""
STOP_CHARACTERS = 256


def _zero(value: float | None) -> float | None:
    if value:
        raise ValueError(
            f"{value:g} is not supported: completions are greedy. Give 0, or leave it out; to sample, export the model "
            "merged and serve it with vLLM"
        )
    return value


def _one(value: int | None) -> int | None:
    if value not in (None, 1):
        raise ValueError(
            f"{value} is not supported: completions are greedy, so all would be the same. Leave it out, or give 1"
        )
    return value


def _off(value: bool | None) -> bool | None:
    if value:
        raise ValueError("it is not supported. Leave it out, or give false")
    return value


def _empty(value: Any) -> Any:
    if value:
        raise ValueError("it is not supported. Leave it out, or give null")
    return value


def _one_text(value: str | list[str]) -> str | list[str]:
    if not isinstance(value, str) and len(value) != 1:
        raise ValueError(f"{len(value)} prompts are given; a request holds one. Send a request for each")
    return value


Empty = Annotated[Any, AfterValidator(_empty)]
"""Only null, or a list, an object or a text that is empty: clients and frameworks send such values."""
Zero = Annotated[float | None, AfterValidator(_zero)]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Shape):
    include_usage: bool = False
    """Whether a last part of the stream counts the tokens."""
    include_obfuscation: bool | None = None
    """Has no effect."""


class Sampling(Shape):
    """What all requests share."""

    model: str
    """The name of the model: that of its directory."""
    max_tokens: int | None = Field(None, ge=1)
    """Most generated tokens."""
    stream: bool | None = False
    """Whether the text comes in parts, as server-sent events."""
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    """Texts that end the completion."""
    n: Annotated[int | None, AfterValidator(_one)] = None
    """Only 1."""
    temperature: Zero = None
    """Only 0, which is also the default: the likeliest token is taken."""
    presence_penalty: Zero = None
    """Only 0."""
    frequency_penalty: Zero = None
    """Only 0."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Has no effect: the likeliest token is in every nucleus."""
    seed: int | None = None
    """Has no effect: nothing is random."""
    user: str | None = None
    """Has no effect."""
    logit_bias: Empty = None
    """Only empty."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Part(Shape):
    type: Literal["text"]
    text: str


class Message(Shape):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    """Has no effect."""
    refusal: Empty = None
    """Only null: a client sends back the message that it got."""
    annotations: Empty = None
    """Only empty."""
    audio: Empty = None
    """Only null."""
    tool_calls: Empty = None
    """Only empty."""
    function_call: Empty = None
    """Only null."""

    def plain(self) -> dict[str, str]:
        """Returns the message as chat templates know it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(Shape):
    type: Literal["text"]


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of max_tokens."""
    logprobs: Annotated[bool | None, AfterValidator(_off)] = None
    """Only false."""
    store: Annotated[bool | None, AfterValidator(_off)] = None
    """Only false."""
    metadata: dict[str, str] | None = None
    """Has no effect."""
    tools: Empty = None
    """Only empty."""
    tool_choice: Literal["none", "auto"] | None = None
    """Has no effect: there are no tools."""
    parallel_tool_calls: bool | None = None
    """Has no effect."""
    functions: Empty = None
    """Only empty."""
    top_logprobs: Empty = None
    """Only null or 0."""
    response_format: TextFormat | None = None
    """Only text."""

    @property
    def characters(self) -> int:
        """Characters of all messages."""
        return sum(len(one.plain()["content"]) for one in self.messages)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same limit; give one of them")
        return self

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def most_param(self) -> str:
        """The parameter that `most` comes from."""
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"


class TextRequest(Sampling):
    """The body of /v1/completions."""

    prompt: Annotated[str | list[str], AfterValidator(_one_text)]
    """A text, or a list of one."""
    echo: Annotated[bool | None, AfterValidator(_off)] = None
    """Only false."""
    best_of: Annotated[int | None, AfterValidator(_one)] = None
    """Only 1."""
    logprobs: Annotated[bool | None, AfterValidator(_off)] = None
    """Only null or false."""
    suffix: Empty = None
    """Only empty."""

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def characters(self) -> int:
        """Characters of the prompt."""
        return len(self.text)

    @property
    def most(self) -> int | None:
        return self.max_tokens

    @property
    def most_param(self) -> str:
        """The parameter that `most` comes from."""
        return "max_tokens"


Asking = TypeVar("Asking", bound=Sampling)


def refused(status: int, message: str, code: str, param: str | None = None) -> Refusal:
    """Returns a refusal with OpenAI's code, and the parameter that is wrong."""
    return Refusal(status, message, "malformed" if status == 400 else code, code=code, param=param)


def parsed(body: bytes, kind: type[Asking]) -> Asking:
    """Returns the request in a body. Raises Refusal naming the first parameter that is wrong."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise refused(400, f"the body is not JSON: {error}"[:200], "invalid_json") from None
    try:
        found = kind.model_validate(content)
    except ValidationError as error:
        first, names = _deepest(error)
        param = ".".join(names) or None
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        raise refused(400, f"{param or 'the body'}: {_told(error, first, names, kind)}"[:600], code, param) from None
    stops = found.stops
    if len(stops) > STOPS or not all(0 < len(stop) <= STOP_CHARACTERS for stop in stops):
        told = f"stop: at most {STOPS} texts of 1 to {STOP_CHARACTERS} characters are allowed"
        raise refused(400, told, "invalid_value", "stop")
    return found


def _told(error: ValidationError, first: Any, names: list[str], kind: type[BaseModel]) -> str:
    """Returns what is wrong with the parameter of these names, and what is allowed. first: its error."""
    if first["type"] == "missing":
        return "it is missing"
    if first["type"] == "extra_forbidden":
        known = f" There are {', '.join(kind.model_fields)}" if len(names) == 1 else ""
        return f"there is no such parameter.{known}"
    if first["type"] == "too_short":
        return "it is empty"
    value = json.dumps(first["input"], ensure_ascii=False).encode(errors="backslashreplace").decode()
    value = value if len(value) <= 80 else f"{value[:77]}..."
    if noun := wording.allowed(one["type"] for one in error.errors() if _place(one) == names):
        return f"{noun}, not {value}"
    return wording.told(first) + (f", not {value}" if first["type"] != "value_error" else "")


def _place(error: Any) -> list[str]:
    """Returns where an error lies, without the names of types."""
    return [str(part) for part in error["loc"] if part != "str" and not str(part).startswith(("list[", "function-"))]


def _deepest(error: ValidationError) -> tuple[Any, list[str]]:
    """Returns the first error, or the one that lies deepest in the same value: a list of parts is judged as a text first. Also
    returns its place."""
    found = [(one, _place(one)) for one in error.errors()]
    place = found[0][1]
    return max((one for one in found if one[1][: len(place)] == place), key=lambda one: len(one[1]))


@dataclass(frozen=True)
class Reply:
    """Makes the bodies of the responses to one request. version: of the model."""

    chat: bool
    model: str
    version: int
    id: str
    created: int

    @classmethod
    def new(cls, *, chat: bool, model: str, version: int) -> "Reply":
        prefix = "chatcmpl" if chat else "cmpl"
        return cls(chat, model, version, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, found: Completion) -> dict[str, Any]:
        """Returns the body of a response that is not streamed."""
        if self.chat:
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": found.text, "refusal": None}}
        else:
            choice = {"text": found.text}
        return self._body([self._choice(choice, found.ended)], streamed=False) | {"usage": usage(found)}

    def part(self, text: str, *, first: bool = False, usage: bool = False) -> dict[str, Any]:
        """Returns a part of a stream. first: with the role. usage: whether a last part will count the tokens."""
        delta = {"role": "assistant"} if first else {}
        choice = {"delta": {**delta, "content": text}} if self.chat else {"text": text}
        return self._streamed([self._choice(choice, None)], usage=usage)

    def end(self, found: Completion, *, usage: bool = False) -> dict[str, Any]:
        """Returns the part of a stream that says how it ended."""
        choice: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._streamed([self._choice(choice, found.ended)], usage=usage)

    def counted(self, found: Completion) -> dict[str, Any]:
        """Returns the part of a stream that counts the tokens."""
        return self._body([], streamed=True) | {"usage": usage(found)}

    def _choice(self, content: dict[str, Any], ended: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": ended}

    def _streamed(self, choices: list[dict[str, Any]], *, usage: bool) -> dict[str, Any]:
        return self._body(choices, streamed=True) | ({"usage": None} if usage else {})

    def _body(self, choices: list[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"version-{self.version}",
            "choices": choices,
        }


def usage(found: Completion) -> dict[str, int]:
    """Returns the number of tokens of a prompt and its completion."""
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.tokens,
        "total_tokens": found.prompt_tokens + found.tokens,
    }


def listing(name: str, created: int) -> dict[str, Any]:
    """Returns the entry of the model in /v1/models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "lamina"}
