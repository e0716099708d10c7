"""HTTP connections with limits on their number and their time, whatever the client does or leaves undone."""

import asyncio
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lamina.serve.guard import SECURITY, respond
from lamina.serve.limits import Limits, flag

GRACE = 5.0
"""Seconds after the time of a request in which its refusal may be sent."""


class Connection(H11Protocol):
    """A connection with limits. uvicorn limits neither the time until the headers have come, nor that of a client that does not
    read its response."""

    limits: Limits
    refused: Callable[[str], None]
    """Is called with what was wrong with a connection."""
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * self.limits.connections:
            self.refused("connections")
            transport.abort()
            return
        if len(self.connections) > self.limits.connections:
            self.app = self._busy
        self._within(self.limits.header_seconds, self._no_headers)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            most = self.limits.request_seconds + self.limits.deadline_seconds + GRACE
            self._within(most, self.transport.abort)

    def on_response_complete(self) -> None:
        self._within(self.limits.header_seconds, self._no_headers)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        del msg
        if len(self.conn.trailing_data[0]) >= self.limits.header_kb * 1024:
            self._refuse(
                431, f"the headers are larger than {self.limits.header_kb} kB ({flag('header_kb')})", "header_kb"
            )
        else:
            self._refuse(400, "the request is not valid HTTP", "http")

    async def _busy(self, scope: Any, receive: Any, send: Any) -> None:
        """The application of a connection that is one too many."""
        del scope, receive
        self.refused("connections")
        message = f"more than {self.limits.connections} connections are open ({flag('connections')})"
        headers = {**SECURITY, "Retry-After": "1", "Connection": "close"}
        await respond(send, 503, {"error": message}, headers)

    def _no_headers(self) -> None:
        if self.transport.is_closing():  # closed, and the client does not read the rest
            self.transport.abort()
        elif self.conn.trailing_data[0]:
            seconds = f"{self.limits.header_seconds:g} s ({flag('header_seconds')})"
            self._refuse(408, f"the headers did not come within {seconds}", "header_seconds")
        else:
            self.transport.close()
        self._within(GRACE, self.transport.abort)

    def _within(self, seconds: float, give_up: Callable[[], None]) -> None:
        self._stop()
        self.timer = self.loop.call_later(seconds, give_up)

    def _stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _refuse(self, status: int, message: str, reason: str) -> None:
        """Send a refusal without asking the application, and close."""
        self.refused(reason)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps({"error": message}).encode()
        headers: dict[str, Any] = {**SECURITY, "Content-Type": "application/json", "Content-Length": str(len(body))}
        headers["Connection"] = "close"
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()
        self._within(GRACE, self.transport.abort)


def limited(limits: Limits, refused: Callable[[str], None] = lambda _: None) -> type[asyncio.Protocol]:
    """Returns the class of a connection for uvicorn."""
    return type("Connection", (Connection,), {"limits": limits, "refused": staticmethod(refused)})
