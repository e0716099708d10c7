"""The shapes of requests and responses, for /openapi.json."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from lamina.serve.limits import Limits


class Guess(BaseModel):
    """A class with its probability, and the task that it was learnt in."""

    class_: str = Field(alias="class")
    probability: float
    task: str


class Predicted(Guess):
    """The best class for one input, and the `top` best ones."""

    name: str | None = None
    """Name of the uploaded file; absent for texts."""
    top: list[Guess]


class Predictions(BaseModel):
    """The predictions for all inputs of a request, in their order."""

    version: int
    """Of the model."""
    predictions: list[Predicted]


class Error(BaseModel):
    """Why a request was refused."""

    error: str


class OpenAIError(BaseModel):
    """What was wrong with a request below /v1/."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIRefusal(BaseModel):
    """Why a request below /v1/ was refused."""

    error: OpenAIError


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """A completed chat. With `stream`, its parts come as server-sent events."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    """The version of the model."""
    choices: list[ChatChoice]
    usage: Usage


class TextCompletion(BaseModel):
    """A completed text. With `stream`, its parts come as server-sent events."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    """The version of the model."""
    choices: list[TextChoice]
    usage: Usage


def json_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Returns what OpenAPI says about a body of JSON, with all parts in place: there is nowhere to refer to."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return whole(parts[value["$ref"].rpartition("/")[2]])
            return {key: whole(inner) for key, inner in value.items()}
        return [whole(inner) for inner in value] if isinstance(value, list) else value

    return {"required": True, "content": {"application/json": {"schema": whole(schema)}}}


def request_body(limits: Limits, kind: str) -> dict[str, Any]:
    """Returns what OpenAPI says about the body of /predict."""
    if kind == "text":
        text = {"type": "string", "minLength": 1, "maxLength": limits.text_characters}
        texts = {"type": "array", "items": text, "minItems": 1, "maxItems": limits.texts}
        schema = {
            "type": "object",
            "properties": {"texts": texts},
            "required": ["texts"],
            "additionalProperties": False,
        }
        return {"required": True, "content": {"application/json": {"schema": schema}}}
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "properties": {"file": {"type": "array", "items": file, "minItems": 1, "maxItems": limits.files}},
        "required": ["file"],
        "additionalProperties": False,
    }
    raw = {media: {"schema": file} for media in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")}
    return {"required": True, "content": {"multipart/form-data": {"schema": form}, **raw}}


def refusals(*statuses: int, openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """Returns what OpenAPI says about refused requests. openai: in OpenAI's shape."""
    told = {
        400: "The request, or an input, is malformed.",
        401: "The token is missing or wrong.",
        403: "A page of another site made a browser send the request.",
        404: "There is no such model.",
        408: "The upload stalled.",
        413: "The request is beyond a limit, which the message names.",
        415: "The media type is not accepted, or a file is no image.",
        421: "The Host header names another server.",
        422: "An input cannot be read; the message says which.",
        429: "Too many prompts wait. Retry-After says when to try again.",
        503: "The server is overloaded. Retry-After says when to try again.",
    }
    return {status: {"model": OpenAIRefusal if openai else Error, "description": told[status]} for status in statuses}
