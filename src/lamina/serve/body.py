"""Reads the body of a request into memory, within the limits, and takes it apart.

Bytes are counted as they come, so a body without Content-Length is limited too. Nothing is written to disk.
"""

import asyncio
import json
import unicodedata
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from lamina.serve.limits import MB, Limits, Refusal, beyond

LONGEST_NAME = 120
PART_HEADERS = 8
"""Headers of a part of a multipart body."""


@dataclass(frozen=True)
class Upload:
    """An encoded image, and what its file was called. The name is text to show, and never a path to open."""

    name: str | None
    content: bytes


@dataclass
class Held:
    """Bytes of the bodies that are in memory, over all requests."""

    limits: Limits
    bytes: int = 0


@dataclass
class Share:
    """Bytes that one request holds, until its last user has released them."""

    held: Held
    bytes: int = 0
    users: int = 1

    def take(self, count: int) -> None:
        if self.held.bytes + count > self.held.limits.inflight_mb * MB:
            raise beyond("inflight_mb", "the server holds as many uploads as it may; try again in a moment", 503)
        self.bytes += count
        self.held.bytes += count

    def keep(self) -> None:
        self.users += 1

    def release(self) -> None:
        self.users -= 1
        if not self.users:
            self.held.bytes -= self.bytes
            self.bytes = 0


async def read_body(request: Request, limits: Limits, share: Share, limit: str) -> bytes:
    """Returns the whole body. limit: the name of the limit on its size. Raises Refusal beyond it, and for one that stalls."""
    most = limits.json_bytes if limit == "json_mb" else limits.body_bytes
    megabytes = getattr(limits, limit)
    too_large = f"the body is larger than {megabytes:g} MB"
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "a body with Content-Encoding is not accepted; send it as it is", "media_type")
    declared = request.headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdecimal():
        raise Refusal(400, f"Content-Length is {declared[:40]!r}; it must be a number of bytes", "malformed")
    if int(declared[:20]) > most:
        raise beyond(limit, too_large)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.request_seconds):
            async for part in _timely(request, limits.idle_seconds):
                size += len(part)
                if size > most:
                    raise beyond(limit, too_large)
                share.take(len(part))
                parts.append(part)
    except TimeoutError:
        raise beyond("request_seconds", f"the upload took more than {limits.request_seconds:g} s", 408) from None
    except ClientDisconnect:
        raise Refusal(400, "the client closed the connection before the body ended", "disconnected") from None
    return b"".join(parts)


async def _timely(request: Request, seconds: float) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(seconds):
                part = await anext(stream, None)
        except TimeoutError:
            raise beyond("idle_seconds", f"no part of the body came for {seconds:g} s", 408) from None
        if part is None:
            return
        yield part


def shown_name(name: str | None) -> str | None:
    """Returns the name of an uploaded file as text to show: without folders and control characters, and not too long."""
    if name is None:
        return None
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(letter for letter in last if unicodedata.category(letter)[0] != "C").strip()
    return kept[:LONGEST_NAME] or None


@dataclass
class _Parts:
    """Collects the parts of a multipart body."""

    limits: Limits
    uploads: list[Upload] = field(default_factory=list)
    ended: bool = False
    header: list[bytes] = field(default_factory=lambda: [b"", b""])
    disposition: bytes = b""
    pieces: list[memoryview] = field(default_factory=list)
    """Of the body, which is not copied before a part has ended."""

    def begin(self) -> None:
        if len(self.uploads) >= self.limits.files:
            raise beyond("files", f"the request has more than {self.limits.files} files")
        self.header, self.disposition, self.pieces = [b"", b""], b"", []

    def field_name(self, data: bytes, start: int, end: int) -> None:
        self.header[0] += data[start:end]

    def field_value(self, data: bytes, start: int, end: int) -> None:
        self.header[1] += data[start:end]

    def header_end(self) -> None:
        if self.header[0].lower() == b"content-disposition":
            self.disposition = self.header[1]
        self.header = [b"", b""]

    def data(self, data: bytes, start: int, end: int) -> None:
        self.pieces.append(memoryview(data)[start:end])

    def end(self) -> None:
        number = len(self.uploads) + 1
        _, options = parse_options_header(self.disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != "file":
            told = f"is called {shown_name(name)!r}" if name else "has no name"
            raise Refusal(
                422, f"part {number} of the form {told}; every part must be a file called 'file'", "malformed"
            )
        filename = options.get(b"filename")
        shown = shown_name(None if filename is None else filename.decode("utf-8", "replace"))
        self.uploads.append(Upload(shown, b"".join(self.pieces)))
        self.pieces = []

    def finish(self) -> None:
        self.ended = True


def uploads_of(body: bytes, content_type: str, limits: Limits) -> list[Upload]:
    """Returns the files of a multipart body. Raises Refusal for one that is malformed, or holds anything else."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise Refusal(400, "multipart/form-data without a boundary", "malformed")
    parts = _Parts(limits)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.begin,
                "on_part_data": parts.data,
                "on_part_end": parts.end,
                "on_header_field": parts.field_name,
                "on_header_value": parts.field_value,
                "on_header_end": parts.header_end,
                "on_end": parts.finish,
            },
            max_header_count=PART_HEADERS,
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Refusal(400, f"the multipart body is malformed: {error}"[:300], "malformed") from None
    if not parts.ended:
        raise Refusal(400, "the multipart body is cut off: its last boundary is missing", "malformed")
    if not parts.uploads:
        raise Refusal(422, "the form has no file; send at least one part called 'file'", "malformed")
    return parts.uploads


def texts_of(body: bytes, limits: Limits) -> list[str]:
    """Returns the texts of a JSON body {"texts": [...]}. Raises Refusal for anything else."""
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error}"[:200]
        raise Refusal(400, f"the body is not JSON: {told}", "malformed") from None
    if not isinstance(content, dict) or content.keys() != {"texts"} or not isinstance(content["texts"], list):
        raise Refusal(422, 'the body must be {"texts": ["...", ...]} and nothing else', "malformed")
    texts = content["texts"]
    if not texts:
        raise Refusal(422, "texts is empty; send at least one", "malformed")
    if len(texts) > limits.texts:
        raise beyond("texts", f"the request has {len(texts)} texts; allowed are {limits.texts}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise Refusal(422, f"texts[{number}] is not a string", "malformed")
        if len(text) > limits.text_characters:
            raise beyond(
                "text_characters",
                f"texts[{number}] has {len(text)} characters; allowed are {limits.text_characters}",
            )
    return texts
