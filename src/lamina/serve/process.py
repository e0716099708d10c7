"""The server as a process: its socket, its token, and its end."""

import ipaddress
import math
import re
import socket
import string
from dataclasses import asdict
from pathlib import Path

import uvicorn

from lamina.errors import ConfigError
from lamina.serve.guard import LOOPBACK, Guard
from lamina.serve.limits import Limits, flag
from lamina.serve.protocol import limited
from lamina.speed import return_large_blocks

SHORTEST_TOKEN = 16
HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
"""What --allow-host may give."""
GRACEFUL = 10
"""Most seconds that completions under way have to end when the server stops; one that takes longer is broken off."""
KEEP_ALIVE = 3600
"""Seconds, for uvicorn. The limit on the time of headers also ends a connection that waits for its next request."""


def read_token(file: Path) -> str:
    """Returns the token in a file. Raises ConfigError for one that is too short, or holds anything but visible ASCII."""
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--token-file {file} cannot be read: {told}.") from error
    if len(token) < SHORTEST_TOKEN or set(token) - set(string.ascii_letters + string.digits + "-._~+/="):
        raise ConfigError(
            f"--token-file {file}: the token must have at least {SHORTEST_TOKEN} characters, of A-Z a-z 0-9 - . _ ~ + / =. "
            "Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'."
        )
    return token


def check_limits(limits: Limits, *, language: bool = False) -> None:
    """Raises ConfigError for limits that are not finite, or exclude each other. language: of a language model."""
    for limit, value in asdict(limits).items():
        if not math.isfinite(value):
            raise ConfigError(f"{flag(limit)} {value}: it must be a finite number.")
    if language and limits.queue < limits.batch:
        raise ConfigError(f"{flag('queue')} {limits.queue}: it must be at least {flag('batch')} ({limits.batch}).")
    if not language and limits.queue < max(limits.files, limits.texts, limits.batch):
        raise ConfigError(
            f"{flag('queue')} {limits.queue}: it must be at least as large as {flag('files')}, {flag('texts')} and "
            f"{flag('batch')} ({max(limits.files, limits.texts, limits.batch)})."
        )
    larger = "json_mb" if language else max(("body_mb", "json_mb"), key=lambda limit: float(getattr(limits, limit)))
    if limits.inflight_mb < getattr(limits, larger):
        raise ConfigError(
            f"{flag('inflight_mb')} {limits.inflight_mb:g}: it must be at least {flag(larger)} ({getattr(limits, larger):g})."
        )


def allowed_hosts(bound: socket.socket, host: str, more: list[str]) -> frozenset[str] | None:
    """Returns the names that a Host header may give; None for any. host: what the socket was bound to, as it was given.

    A server for this machine only accepts its own names only. Otherwise a page on the web could reach it by a name of its own
    that leads to 127.0.0.1 (DNS rebinding). Raises ConfigError for what is no name.
    """
    for name in more:
        if not HOST.fullmatch(name):
            raise ConfigError(
                f"--allow-host {name!r}: give a name without a port, or an IPv6 address in brackets, as in shop.example or "
                f"[2001:db8::1]."
            )
    address = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if not address.is_loopback and not more:
        return None
    own = f"[{host}]" if ":" in host else host
    return LOOPBACK | {own.lower(), *(name.lower() for name in more)}


def bind(host: str, port: int) -> socket.socket:
    """Returns a bound socket. Raises ConfigError where the port is in use, or the address is not of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: it is no address of this machine ({error}).") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1)  # two servers may be bound to a port; only one may listen
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"--host {host} --port {port} cannot be used: {error.strerror}. Another server may be running. Choose another "
            "port, or 0 for any free one."
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Returns the address of a server, for a browser."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def run(app: Guard, bound: socket.socket, limits: Limits) -> None:
    """Serve until Ctrl-C or SIGTERM. Then predictions under way have a second more than their deadline to end, and completions
    at most 11 seconds."""
    grace = limits.deadline_seconds
    if app.about()["kind"] == "language":
        grace = min(grace, GRACEFUL)
    config = uvicorn.Config(
        app,
        http=limited(limits, lambda reason: app.metrics.refusals.labels(reason).inc()),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(grace) + 1,
        h11_max_incomplete_event_size=limits.header_kb * 1024,
    )
    return_large_blocks()
    uvicorn.Server(config).run(sockets=[bound])
