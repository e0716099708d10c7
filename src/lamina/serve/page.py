"""The page at `/`: one document without a further request, and the policy that allows its own script and style only."""

import base64
import hashlib
from importlib.resources import files
from typing import NamedTuple

from markupsafe import Markup

from lamina.report.page import template
from lamina.serve.limits import Limits


class Asks(NamedTuple):
    """How prompts may be asked. chats: whether the tokenizer has a chat template. by_default: whether it is used by default."""

    chats: bool = False
    by_default: bool = False


def render(name: str, kind: str, limits: Limits, *, token: bool, asks: Asks = Asks()) -> tuple[str, str]:  # noqa: B008
    """Returns the page of a model, and its Content-Security-Policy. token: whether the page must ask for one. asks: for
    language models."""
    here = files("lamina.serve")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    if kind == "language":
        script += here.joinpath("language.js").read_text(encoding="utf-8")
    style = files("lamina.report").joinpath("style.css").read_text(encoding="utf-8")
    style += here.joinpath("page.css").read_text(encoding="utf-8")
    html = template("lamina.serve", "page.html.j2").render(
        name=name, kind=kind, limits=limits, token=token, asks=asks, look=Markup(style), script=Markup(script)
    )
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
