"""What stands before every route: the host, the token, the security headers, the metrics, and refusals as JSON."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lamina.serve.limits import Limits, Refusal, flag
from lamina.serve.metrics import Metrics
from lamina.serve.shapes import OPENAI, error_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("lamina.serve")
OPEN = frozenset({"/", "/health", "/ready"})
"""Routes that need no token: the page holds no data before it has one, and the others are for supervisors."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
DISCARDED_SECONDS, DISCARDED_BYTES = 2.0, 2**28
"""Most that is read of a body after its request was refused."""
CLOSED_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
SECURITY = {
    "Content-Security-Policy": CLOSED_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Incoming:
    """The body of a request. expects: whether the client waits for a word before it sends the body."""

    def __init__(self, receive: Receive, *, expects: bool) -> None:
        self._receive, self.ended = receive, False
        self.expects = expects

    async def receive(self) -> Message:
        self.expects = False
        message = await self._receive()
        self.ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read the rest, and keep nothing. A client that is still sending would not see a refusal, since closing
        a connection with unread bytes resets it."""
        count = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARDED_SECONDS):
                while not self.ended and not self.expects and count < DISCARDED_BYTES:
                    count += len((await self.receive()).get("body", b""))


class Guard:
    """An ASGI application around another.

    token: what `Authorization: Bearer` must carry; None for no token. hosts: the names that a Host header may give; None for
    any. version: returns the number of the version that is served. about: returns what that version is. routes: the paths that
    exist, for the metrics.
    """

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        metrics: Metrics,
        token: str | None,
        hosts: frozenset[str] | None,
        version: Callable[[], int],
        about: Callable[[], dict[str, Any]],
        routes: frozenset[str],
    ) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self._token = None if token is None else token.encode()
        self.hosts, self.version, self.about, self.routes = hosts, version, about, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        path = scope["path"]
        route = (
            path
            if path in self.routes
            else next((r for r in self.routes if path.startswith(f"{r}/") and r != "/"), "other")
        )

        body = Incoming(receive, expects=any(name == b"expect" for name, _ in scope["headers"]))

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:
                    await body.discard()
                message["headers"] = self._with_security(message.get("headers", []))
            await send(message)

        try:
            self._check(scope)
            async with asyncio.timeout(self.limits.request_seconds + self.limits.deadline_seconds):
                await self.app(scope, body.receive, sending)
        except Refusal as refusal:
            await self.refuse(refusal, sending, scope["path"])
        except TimeoutError:
            if status == 0:
                seconds = self.limits.request_seconds + self.limits.deadline_seconds
                told = f"the request took more than {seconds:g} s ({flag('request_seconds')} and {flag('deadline_seconds')})"
                late = Refusal(408, told, "request_seconds")
                await self.refuse(late, sending, scope["path"])
        except Exception as error:
            if not status:
                log.error("a request failed: %s %s", scope["method"], route, exc_info=error)
                told = "internal error; the log of the server has the details"
                await respond(sending, 500, error_of(scope["path"], 500, told))
        finally:
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        """Raises Refusal for a wrong host, for predictions that a page of another site asks for, and for a wrong token."""
        headers = scope["headers"]
        if self.hosts is not None:
            host = next((value for name, value in headers if name == b"host"), b"").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in self.hosts:
                raise Refusal(
                    421, f"the Host header names {name[:100]!r}; --allow-host NAME accepts one more name", "host"
                )
        if scope["path"].startswith(("/predict", OPENAI)) and (b"sec-fetch-site", b"cross-site") in headers:
            raise Refusal(403, "a page of another site may not use this server from a browser", "site")
        if self._token is None or scope["path"] in OPEN:
            return
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise Refusal(401, "a token is needed: Authorization: Bearer TOKEN", "token")

    async def refuse(self, refusal: Refusal, send: Send, path: str) -> None:
        """Send a refusal of a request to this path."""
        self.metrics.refusals.labels(refusal.reason).inc()
        content = error_of(path, refusal.status, refusal.message, refusal.code, refusal.param)
        await respond(send, refusal.status, content, refusal.headers)

    def _with_security(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        present = {name.lower() for name, _ in headers}
        added = {**SECURITY, "X-Model-Version": str(self.version())}
        return [
            *headers,
            *((k.lower().encode(), v.encode()) for k, v in added.items() if k.lower().encode() not in present),
        ]


async def respond(send: Send, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    """Send JSON as the whole response."""
    body = json.dumps(content).encode()
    pairs = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in pairs.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
