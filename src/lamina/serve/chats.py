"""The routes of a language model: OpenAI's interface."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lamina.data import Prompt, TooLong
from lamina.errors import DataError
from lamina.model import Asked, LanguagePredictor
from lamina.serve import schemas
from lamina.serve.body import Held, Share, read_body
from lamina.serve.generating import Generator, Job
from lamina.serve.guard import log
from lamina.serve.limits import Limits, Refusal, beyond, flag
from lamina.serve.metrics import Metrics
from lamina.serve.openai import ChatRequest, Reply, TextRequest, listing, parsed, refused
from lamina.serve.shapes import error_of
from lamina.serve.versions import Versions

CHAT, TEXT, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
ROUTES = frozenset({CHAT, TEXT, MODELS})
DONE = b"data: [DONE]\n\n"
GRACE = 1.0
"""Seconds after the deadline in which the generating thread may end a completion by itself."""
REFUSALS = (400, 401, 403, 404, 408, 413, 415, 421, 429, 503)


class Parts(NamedTuple):
    """What the routes of a language model need."""

    limits: Limits
    versions: Versions
    generator: Generator
    held: Held
    metrics: Metrics
    chat: bool
    """Whether chats are completed."""

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
            if parts.versions.current.language.reader.chats:
                raise refused(404, f"chats are switched off (--no-chat); use {TEXT}", "no_chats")
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
        events = _parts_of(job, reply, generator.late, counted=counted, path=request.url.path)
        return Events(events, headers, partial(generator.drop, job))
    try:
        await _unless_gone(request, job, generator.late)
        return JSONResponse(reply.whole(job.done.result()), headers=headers)
    finally:
        generator.drop(job)


class Events(StreamingResponse):
    """A stream of server-sent events. over: is called at its end, also where the client goes before its first event."""

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str], over: Callable[[], None]) -> None:
        super().__init__(events, 200, headers, "text/event-stream")
        self.over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.over()


def _asked(predictor: LanguagePredictor, asking: ChatRequest | TextRequest, limits: Limits) -> Asked:
    """Returns the prompt of a request. Raises Refusal for one that cannot be read, or is too long."""
    param = "messages" if isinstance(asking, ChatRequest) else "prompt"
    if asking.characters > limits.text_characters:  # before it is tokenised, which takes long
        what = "the messages have" if isinstance(asking, ChatRequest) else "the prompt has"
        raise beyond("text_characters", f"{what} {asking.characters} characters; allowed are {limits.text_characters}")
    try:
        if isinstance(asking, ChatRequest):
            prompt = predictor.reader.read([one.plain() for one in asking.messages], where="the chat")
        else:
            prompt = predictor.reader.read(asking.text, chat=False)
    except TooLong as error:
        raise refused(400, str(error), "context_length_exceeded", param) from None
    except DataError as error:
        raise refused(400, str(error)[:300], "invalid_value", param) from None
    if len(prompt.ids) > limits.prompt_tokens:
        most_read = f"{limits.prompt_tokens} ({flag('prompt_tokens')})"
        told = f"the prompt has {len(prompt.ids)} tokens; allowed are {most_read}. Shorten it"
        raise refused(400, told, "context_length_exceeded", param)
    most, room = asking.most, predictor.reader.positions - len(prompt.ids)
    if most is not None and most > limits.new_tokens:
        told = f"{asking.most_param}: allowed are 1 to {limits.new_tokens} ({flag('new_tokens')}), not {most}"
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


async def _unless_gone(request: Request, job: Job, late: Callable[[], Refusal]) -> None:
    """Wait for a job. Where the client goes first, nothing more is generated for it. Raises Refusal then, and where the time
    is over before the first token. late: makes that refusal."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watching = asyncio.ensure_future(gone())
    try:
        left = max(job.due - time.monotonic(), 0) + GRACE
        done, _ = await asyncio.wait((watching, job.done), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise late()
        if not job.done.done():
            raise Refusal(400, "the client closed the connection before the completion ended", "disconnected")
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _parts_of(
    job: Job, reply: Reply, late: Callable[[], Refusal], *, counted: bool, path: str
) -> AsyncIterator[bytes]:
    """Yields the server-sent events of a completion. late: makes the refusal of one that takes too long."""

    async def next_text() -> str | None:
        try:
            return await asyncio.wait_for(job.texts.get(), max(job.due - time.monotonic(), 0) + GRACE)
        except TimeoutError:  # while a prompt is read, or waits, no token tells the time
            raise late() from None

    if reply.chat:
        yield _event(reply.part("", first=True, usage=counted))
    try:
        while (text := await next_text()) is not None:
            yield _event(reply.part(text, usage=counted))
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


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _count(metrics: Metrics, done: "asyncio.Future[Any]") -> None:
    if done.cancelled() or done.exception() is not None:
        return
    found = done.result()
    metrics.predictions.inc()
    metrics.tokens.labels("prompt").inc(found.prompt_tokens)
    metrics.tokens.labels("completion").inc(found.tokens)
