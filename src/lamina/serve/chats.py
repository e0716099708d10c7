"""The routes of a language model: OpenAI's interface."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lamina.data import Prompt, TooLong
from lamina.errors import DataError
from lamina.model import Asked, LanguagePredictor
from lamina.serve import schemas
from lamina.serve.body import Held, Share, read_body
from lamina.serve.generating import Generator, Job
from lamina.serve.guard import log
from lamina.serve.limits import Limits, Refusal, flag
from lamina.serve.metrics import Metrics
from lamina.serve.openai import ChatRequest, Reply, TextRequest, listing, parsed, refused
from lamina.serve.shapes import error_of
from lamina.serve.versions import Versions

CHAT, TEXT, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
ROUTES = frozenset({CHAT, TEXT, MODELS})
DONE = b"data: [DONE]\n\n"
REFUSALS = (400, 401, 403, 404, 408, 413, 415, 421, 429, 503)


class Parts(NamedTuple):
    """What the routes of a language model need."""

    limits: Limits
    versions: Versions
    generator: Generator
    held: Held
    metrics: Metrics
    chat: bool
    """Whether the tokenizer has a chat template."""

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.versions.path.resolve().name


def add_routes(app: FastAPI, parts: Parts) -> None:
    """Add OpenAI's routes to an application."""
    described = schemas.refusals(*REFUSALS, openai=True)

    if parts.chat:

        @app.post(
            CHAT,
            summary="Complete a chat",
            response_model=None,
            responses={200: {"model": schemas.ChatCompletion}, **described},
            openapi_extra={"requestBody": schemas.json_body(ChatRequest)},
        )
        async def chat(request: Request) -> Response:
            return await _respond(request, parts, ChatRequest)

    @app.post(
        TEXT,
        summary="Complete a text",
        response_model=None,
        responses={200: {"model": schemas.TextCompletion}, **described},
        openapi_extra={"requestBody": schemas.json_body(TextRequest)},
    )
    async def text(request: Request) -> Response:
        return await _respond(request, parts, TextRequest)

    @app.get(MODELS, summary="The model, in OpenAI's form", responses=schemas.refusals(401, 421, openai=True))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_entry(parts)]}

    @app.get(MODELS + "/{name}", summary="The model", responses=schemas.refusals(401, 404, 421, openai=True))
    async def model(name: str) -> dict[str, Any]:
        _check_name(parts, name)
        return _entry(parts)

    @app.post("/predict", include_in_schema=False)
    async def predict() -> None:
        raise Refusal(404, _what_there_is(parts), "route")

    if not parts.chat:

        @app.post(CHAT, include_in_schema=False)
        async def no_chat() -> None:
            raise refused(
                404, f"the tokenizer has no chat template, so there are no chats; use {TEXT}", "no_chat_template"
            )


def _what_there_is(parts: Parts) -> str:
    return f"a language model is served, which has no classes; use {f'{CHAT} or ' * parts.chat}{TEXT}"


def _entry(parts: Parts) -> dict[str, Any]:
    created = parts.versions.current.facts.created
    return listing(parts.name, int(datetime.fromisoformat(created).timestamp()))


def _check_name(parts: Parts, name: str) -> None:
    if name != parts.name:
        raise refused(
            404, f"the model {name[:100]!r} does not exist; there is {parts.name!r}", "model_not_found", "model"
        )


async def _respond(request: Request, parts: Parts, kind: type[ChatRequest] | type[TextRequest]) -> Response:
    """Returns the response to a request for a completion."""
    limits, versions, generator = parts.limits, parts.versions, parts.generator
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Refusal(415, "send the request as application/json", "media_type")
    share = Share(parts.held)
    try:
        body = await read_body(request, limits, share, "json_mb")
    finally:
        share.release()
    asking: ChatRequest | TextRequest = parsed(body, kind)
    _check_name(parts, asking.model)
    due = time.monotonic() + limits.deadline_seconds
    generator.admit()
    version = versions.take()

    def end(_: object = None) -> None:
        versions.give(version)
        generator.leave()

    try:
        asked = await generator.read(partial(_asked, version.language, asking, limits))
        job = generator.put(version, asked, due)
    except BaseException:
        end()
        raise
    job.done.add_done_callback(end)
    reply = Reply.new(chat=isinstance(asking, ChatRequest), model=parts.name, version=version.number)
    headers = {"X-Model-Version": str(version.number)}
    job.done.add_done_callback(partial(_count, parts.metrics))
    if asking.stream:
        counted = asking.stream_options is not None and asking.stream_options.include_usage
        return StreamingResponse(
            _parts_of(job, reply, counted=counted, path=request.url.path), 200, headers, "text/event-stream"
        )
    try:
        await _unless_gone(request, job)
        return JSONResponse(reply.whole(job.done.result()), headers=headers)
    finally:
        job.cancelled = True


def _asked(predictor: LanguagePredictor, asking: ChatRequest | TextRequest, limits: Limits) -> Asked:
    """Returns the prompt of a request. Raises Refusal for one that cannot be read, or is too long."""
    param = "messages" if isinstance(asking, ChatRequest) else "prompt"
    try:
        if isinstance(asking, ChatRequest):
            prompt = predictor.reader.read([one.plain() for one in asking.messages], where="the chat")
        else:
            prompt = predictor.reader.read(asking.text, chat=False)
    except TooLong as error:
        raise refused(400, str(error), "context_length_exceeded", param) from None
    except DataError as error:
        raise refused(400, str(error)[:300], "invalid_value", param) from None
    most, room = asking.most, predictor.reader.positions - len(prompt.ids)
    if most is not None and most > limits.new_tokens:
        told = f"{asking.most_param} is {most}; allowed are 1 to {limits.new_tokens} ({flag('new_tokens')})"
        raise refused(400, told, "invalid_value", asking.most_param)
    if most is not None and most > room:
        told = (
            f"the prompt has {len(prompt.ids)} tokens and {asking.most_param} is {most}; the backbone has positions for "
            f"{predictor.reader.positions}. Shorten the prompt, or ask for at most {room}"
        )
        raise refused(400, told, "context_length_exceeded", param)
    if isinstance(asking, TextRequest):  # what follows the prompt, its first space included
        prompt = Prompt(prompt.ids)
    return Asked(prompt, most or min(room, limits.new_tokens), asking.stops)


async def _unless_gone(request: Request, job: Job) -> None:
    """Wait for a job. Where the client goes first, nothing more is generated for it. Raises Refusal then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watching = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((watching, job.done), return_when=asyncio.FIRST_COMPLETED)
        if not job.done.done():
            raise Refusal(400, "the client closed the connection before the completion ended", "disconnected")
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _parts_of(job: Job, reply: Reply, *, counted: bool, path: str) -> AsyncIterator[bytes]:
    """Yields the server-sent events of a completion. A client that goes ends its generation."""
    try:
        if reply.chat:
            yield _event(reply.part("", first=True, usage=counted))
        while (text := await job.texts.get()) is not None:
            yield _event(reply.part(text, usage=counted))
        try:
            found = job.done.result()
        except Refusal as refusal:
            yield _event(error_of(path, refusal.status, refusal.message))
        except Exception as error:  # noqa: BLE001 - the response has begun
            log.error("a completion failed", exc_info=error)
            yield _event(error_of(path, 500, "internal error; the log of the server has the details"))
        else:
            yield _event(reply.end(found, usage=counted))
            if counted:
                yield _event(reply.counted(found))
        yield DONE
    finally:
        job.cancelled = True


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _count(metrics: Metrics, done: "asyncio.Future[Any]") -> None:
    if done.cancelled() or done.exception() is not None:
        return
    found = done.result()
    metrics.predictions.inc()
    metrics.tokens.labels("prompt").inc(found.prompt_tokens)
    metrics.tokens.labels("completion").inc(found.tokens)
