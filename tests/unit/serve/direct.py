"""Calls an application without a client, message by message."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any


async def call(
    app: Any,
    messages: Sequence[Callable[[], Awaitable[dict[str, Any]]]],
    path: str = "/predict",
    kind: str = "image/png",
) -> tuple[int, Any]:
    """Returns status and body of the response to a request whose body comes in these messages."""
    waiting, sent = list(messages), []

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.sleep(3600)
        return await waiting.pop(0)()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", kind.encode()), (b"expect", b"100-continue")],
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))
