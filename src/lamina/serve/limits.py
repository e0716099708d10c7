"""Limits of the server, and how a request beyond one is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MB = 2**20
LANGUAGE: Mapping[str, float] = {"deadline_seconds": 300, "queue": 64, "batch": 8, "text_characters": 32_000}
"""Defaults that differ for language models."""

ONLY_CLASSIFIERS = ("body_mb", "files", "megapixels", "texts", "wait_ms")
ONLY_LANGUAGE = ("prompt_tokens", "new_tokens")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all requests together, may ask of the server."""

    body_mb: float = 16
    """Body of a request with images."""
    json_mb: float = 2
    """Body of a request with texts."""
    inflight_mb: float = 256
    """Bodies of all requests that are held at one time."""
    files: int = 32
    """Images of a request."""
    megapixels: float = 50
    """Pixels of an image, in millions."""
    texts: int = 256
    """Texts of a request."""
    text_characters: int = 20_000
    """Characters of a text, or of all messages of a chat."""
    header_kb: int = 32
    """Request line and headers together."""
    header_seconds: float = 10
    """From the connection, or the previous response, to the end of the headers."""
    idle_seconds: float = 10
    """Between two parts of a body."""
    request_seconds: float = 60
    """From the end of the headers to the response, upload included."""
    deadline_seconds: float = 10
    """From the end of the upload to the prediction, or to the end of a completion."""
    connections: int = 256
    """Open at one time."""
    queue: int = 512
    """Images or texts that wait at one time."""
    batch: int = 32
    """Images or texts that are computed together."""
    wait_ms: float = 3
    """How long a batch waits for images that are being decoded."""

    prompt_tokens: int = 4096
    """Tokens of a prompt."""
    new_tokens: int = 2048
    """Tokens that are generated for a request."""

    @classmethod
    def of_language(cls, **given: Any) -> "Limits":
        """Returns limits with the defaults for language models, which take longer and are asked less often."""
        return cls(**{**LANGUAGE, **given})

    @property
    def pixels(self) -> int:
        return int(self.megapixels * 1e6)

    @property
    def body_bytes(self) -> int:
        return int(self.body_mb * MB)

    @property
    def json_bytes(self) -> int:
        return int(self.json_mb * MB)


def flag(limit: str) -> str:
    """Returns the option of `lamina serve` that sets a limit."""
    return "--max-" + limit.replace("_", "-")


class Refusal(Exception):
    """A request that is not granted: the status of the response, its message, and what was wrong for the metrics. code, param:
    what was wrong, for OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        reason: str,
        *,
        retry: bool = False,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason
        self.code, self.param = code, param
        self.headers = {"Retry-After": "1"} if retry else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = 'Bearer realm="lamina"'


def beyond(limit: str, message: str, status: int = 413) -> Refusal:
    """Returns the refusal of a request that is beyond a limit. It names the limit's option."""
    return Refusal(status, f"{message} ({flag(limit)})", limit, retry=status in (429, 503))
