"""The HTTP interface: the routes, and the parts that they share while the server runs."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from lamina import __version__
from lamina.data.decoding import BOMB, DAMAGE, at_most, full_size
from lamina.errors import ConfigError
from lamina.model import Prediction
from lamina.serve import about, chats, page, schemas
from lamina.serve.batching import Batcher
from lamina.serve.body import Held, Share, Upload, read_body, texts_of, uploads_of
from lamina.serve.generating import Generator
from lamina.serve.guard import Guard, log
from lamina.serve.limits import Limits, Refusal, beyond
from lamina.serve.metrics import CONTENT_TYPE, Metrics
from lamina.serve.shapes import error_of
from lamina.serve.versions import Version, Versions

ROUTES = frozenset({"/", "/predict", "/tasks", "/model", "/health", "/ready", "/metrics", "/openapi.json"})
MOST_TOP = 20
"""Best classes of an input, since all inputs of a batch pay for it."""
SMALL = 2**16
"""Bytes of a body that is taken apart at once: handing it to a thread would take longer."""


class Parts(NamedTuple):
    """What the route of predictions needs."""

    limits: Limits
    versions: Versions
    batcher: Batcher
    held: Held
    metrics: Metrics


class Information(NamedTuple):
    """What the read-only routes need."""

    limits: Limits
    versions: Versions
    batcher: Batcher | Generator
    held: Held
    metrics: Metrics
    chat: bool
    """Whether a language model completes chats."""


def create_app(
    path: Path,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: frozenset[str] | None = None,
    device: str | None = None,
    seconds: float = 1.0,
    chat: bool = True,
) -> Guard:
    """Returns the ASGI application that serves a model. Its newest version is loaded at once.

    token: that requests must carry. hosts: names that the Host header may give; None for any. device: cpu or cuda; by default
    as the model is configured. seconds: between two looks at the model's directory. chat: whether a language model completes
    chats too, if its tokenizer has a chat template.
    Raises ModelError for what is no model, or has learnt no task; ConfigError for an empty token.
    """
    if token is not None and not token.strip():
        raise ConfigError("the token is empty, so every request would carry it. Give one, or None for no token.")
    versions = Versions(path, device=device, seconds=seconds)
    language = versions.current.predictor.kind == "language"
    metrics = Metrics(language=language)
    if limits is None:
        limits = Limits.of_language() if language else Limits()
    chat = chat and language and versions.current.language.reader.chats
    batcher: Batcher | Generator
    if language:
        batcher = Generator(limits, metrics.batches.observe, metrics.first.observe)
    else:
        batcher = Batcher(limits, metrics.batches.observe)
    held = Held(limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work()) for work in (batcher.run, versions.watch)]
        with at_most(limits.pixels):
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                batcher.close()
                versions.close()

    app = FastAPI(
        title="lamina", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False
    )
    there_is = f"{chats.TEXT} completes texts" + (f", and {chats.CHAT} continues chats" if chat else "")
    _add_errors(app, metrics, there_is if language else "")
    if isinstance(batcher, Generator):
        chats.add_routes(app, chats.Parts(limits, versions, batcher, held, metrics, chat))
    else:
        _add_predict(app, Parts(limits, versions, batcher, held, metrics))
    _add_information(app, Information(limits, versions, batcher, held, metrics, chat), bool(token))
    return Guard(
        app,
        limits=limits,
        metrics=metrics,
        token=token,
        hosts=hosts,
        version=lambda: versions.current.number,
        about=lambda: about.card(versions),
        routes=ROUTES | (chats.ROUTES if language else frozenset()),
    )


def _add_errors(app: FastAPI, metrics: Metrics, there_is: str) -> None:
    """Every refusal is JSON with a message. there_is: what to say where there is no such route."""

    def failed(request: Request, status: int, message: str, reason: str, headers: Any = None) -> JSONResponse:
        metrics.refusals.labels(reason).inc()
        return JSONResponse(error_of(request.url.path, status, message), status, headers)

    @app.exception_handler(Refusal)
    async def refusal(request: Request, error: Refusal) -> JSONResponse:
        metrics.refusals.labels(error.reason).inc()
        content = error_of(request.url.path, error.status, error.message, error.code, error.param)
        return JSONResponse(content, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return failed(request, 422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "malformed")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        allowed = (error.headers or {}).get("Allow")
        told = f"{error.detail}; allowed is {allowed}" if allowed else str(error.detail)
        if error.status_code == 404 and there_is:
            told = f"{told}; {there_is}"
        return failed(request, error.status_code, told, "route", error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return failed(request, 500, "internal error; the log of the server has the details", "internal")


def _add_predict(app: FastAPI, parts: Parts) -> None:
    limits, versions, batcher = parts.limits, parts.versions, parts.batcher
    kind = versions.current.predictor.kind

    @app.post(
        "/predict",
        summary="Predict the class of images or texts",
        response_model=None,
        responses={
            200: {"model": schemas.Predictions},
            **schemas.refusals(400, 401, 403, 408, 413, 415, 421, 422, 503),
        },
        openapi_extra={"requestBody": schemas.request_body(limits, kind)},
    )
    async def predict(
        request: Request, top: Annotated[int, Query(ge=1, le=MOST_TOP, description="Number of best classes.")] = 5
    ) -> JSONResponse:
        _only_known(request, "top")
        batcher.refuse_if_full()
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        read = _reader(kind, media, request.headers.get("content-type", ""), limits)
        share = Share(parts.held)
        try:
            body = await read_body(request, limits, share, "json_mb" if media == "application/json" else "body_mb")
            due = time.monotonic() + limits.deadline_seconds
            work = partial(read, body)
            small = len(body) <= SMALL
            del body  # the inputs hold copies of its parts
            if small:
                inputs = work()
            else:
                share.keep()
                inputs = await batcher.take_apart(work, due, share.release)
            del work
            batcher.refuse_if_full(len(inputs))
            version = versions.take()
            share.keep()
            payloads = [item.content if isinstance(item, Upload) else item for item in inputs]
            found = await batcher.predict(version, payloads, top, due, partial(_end, versions, version, share))
        finally:
            share.release()
        names = [item.name for item in inputs if isinstance(item, Upload)] if kind == "image" else None
        _refuse_unreadable(found, names)
        parts.metrics.predictions.inc(len(found))
        content = about.predictions_of(version, names, found)
        return JSONResponse(content, headers={"X-Model-Version": str(version.number)})


def _end(versions: Versions, version: Version, share: Share) -> None:
    versions.give(version)
    share.release()


def _only_known(request: Request, *known: str) -> None:
    for name in request.query_params:
        if name not in known:
            raise Refusal(
                422, f"query: {name[:40]!r} is unknown; allowed are {', '.join(known) or 'none'}", "malformed"
            )


def _reader(kind: str, media: str, content_type: str, limits: Limits) -> Callable[[bytes], list[Upload] | list[str]]:
    """Returns what takes a body of a media type apart. Raises Refusal for a type that the model does not take."""
    if kind == "text":
        if media != "application/json":
            raise Refusal(415, 'this model takes texts: send {"texts": [...]} as application/json', "media_type")
        return partial(texts_of, limits=limits)
    if media == "multipart/form-data":
        return lambda body: checked(uploads_of(body, content_type, limits), limits)
    if media.startswith("image/") or media == "application/octet-stream":
        return lambda body: checked([Upload(None, body)], limits)
    raise Refusal(
        415, "this model takes images: send files as multipart/form-data, or one image as the body", "media_type"
    )


def checked(uploads: list[Upload], limits: Limits) -> list[Upload]:
    """Returns these uploads. Raises Refusal for one that is no image, or has too many pixels, without decoding it."""
    for number, upload in enumerate(uploads, 1):
        where = f"file {number}" + (f" ({upload.name})" if upload.name else "")
        too_many = f"{where} has more than {limits.megapixels:g} million pixels"
        try:
            height, width = full_size(upload.content)
        except BOMB:
            raise beyond("megapixels", too_many) from None
        except DAMAGE as error:
            told = (str(error) or type(error).__name__).splitlines()[0][:300]
            if not isinstance(error, OSError | ValueError):  # of the standard library, about bytes and offsets
                told = f"the image is damaged ({told})"
            raise Refusal(415, f"{where}: {told}", "image") from None
        if height * width > limits.pixels:
            raise beyond("megapixels", too_many)
    return uploads


def _refuse_unreadable(found: list[Prediction], names: list[str | None] | None) -> None:
    """Raises Refusal naming the first input that could not be read."""
    for number, prediction in enumerate(found):
        if prediction.error is not None:
            where = f"texts[{number}]" if names is None else f"file {number + 1}"
            name = f" ({names[number]})" if names and names[number] else ""
            raise Refusal(422, f"{where}{name}: {prediction.error[:300]}", "input")


def _add_information(app: FastAPI, parts: Information, token: bool) -> None:
    versions = parts.versions
    predictor = versions.current.predictor
    asks = page.Asks(parts.chat, predictor.config.data.form == "chat")
    html, policy = page.render(versions.path.resolve().name, predictor.kind, parts.limits, token=token, asks=asks)
    closed = schemas.refusals(401, 421, 422)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    @app.get("/tasks", summary="The tasks learnt, their figures, and the history", responses=closed)
    async def tasks(request: Request) -> dict[str, Any]:
        _only_known(request)
        return about.tasks(versions)

    @app.get("/model", summary="What the served version is", responses=closed)
    async def model(request: Request) -> dict[str, Any]:
        _only_known(request)
        return about.card(versions)

    @app.get("/health", summary="Whether the process is up")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether a version is loaded")
    async def ready() -> dict[str, Any]:
        refused = versions.refused
        return {"ready": True, "version": versions.current.number, "refused": refused and {"version": refused.version}}

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response, responses=closed)
    async def metrics() -> Response:
        found = parts.metrics
        found.queue.set(parts.batcher.admitted)
        found.held.set(parts.held.bytes)
        found.version.set(versions.current.number)
        found.refused_versions.set(versions.refusals)
        return Response(found.text(), media_type=CONTENT_TYPE)


__all__ = ["create_app"]
