"""The shapes of refusals: {"error": message}, and OpenAI's object below /v1/."""

from typing import Any

OPENAI = "/v1/"
"""Below this, the interface is OpenAI's."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "misdirected_request",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "overloaded",
}


def error_of(path: str, status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Returns the body of a refused request to this path. code, param: what was wrong, for OpenAI's shape."""
    if not path.startswith(OPENAI):
        return {"error": message}
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = CODES.get(status, "invalid_value") if code is None else code
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
