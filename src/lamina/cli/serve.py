"""`lamina serve`: predictions of a model over HTTP."""

import contextlib
import logging
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina.errors import ConfigError, LaminaError

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
LIMITS = "Limits"


def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Directory of a model that has learnt a task.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at. 0.0.0.0: all networks; then set a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that requests must carry. Default: no token.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which the server is reached, for example through a proxy. Repeatable."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. Default: as the model is configured.")] = None,
    max_body_mb: Annotated[float, typer.Option(min=0.001, rich_help_panel=LIMITS, help="Body with images.")] = 16,
    max_json_mb: Annotated[float, typer.Option(min=0.001, rich_help_panel=LIMITS, help="Body with texts.")] = 2,
    max_inflight_mb: Annotated[
        float, typer.Option(min=0.001, rich_help_panel=LIMITS, help="All bodies held at one time.")
    ] = 256,
    max_files: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Images per request.")] = 32,
    max_megapixels: Annotated[
        float, typer.Option(min=0.001, rich_help_panel=LIMITS, help="Pixels of an image, in millions.")
    ] = 50,
    max_texts: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Texts per request.")] = 256,
    max_text_characters: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=LIMITS, help="Characters of a text. Default: 20000; of a prompt 32000."),
    ] = None,
    max_header_kb: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Headers of a request.")] = 32,
    max_header_seconds: Annotated[
        float, typer.Option(min=0.1, rich_help_panel=LIMITS, help="Until the headers have come.")
    ] = 10,
    max_idle_seconds: Annotated[
        float, typer.Option(min=0.1, rich_help_panel=LIMITS, help="Between two parts of a body.")
    ] = 10,
    max_request_seconds: Annotated[
        float, typer.Option(min=0.1, rich_help_panel=LIMITS, help="Upload of a request.")
    ] = 60,
    max_deadline_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1, rich_help_panel=LIMITS, help="From the upload to the prediction. Default: 10; language models 300."
        ),
    ] = None,
    max_connections: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Open connections.")] = 256,
    max_queue: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=LIMITS, help="Inputs that wait. Default: 512; language models 64."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=LIMITS, help="Inputs computed together. Default: 32; language models 8."),
    ] = None,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, rich_help_panel=LIMITS, help="A batch waits for inputs being decoded.")
    ] = 3,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=LIMITS, help="Language models: tokens of a prompt.")
    ] = 4096,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=LIMITS, help="Language models: tokens generated for a request.")
    ] = 2048,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--no-chat",
            help="Language models: complete chats too (/v1/chat/completions), if the tokenizer has a chat template.",
        ),
    ] = True,
) -> None:
    """Serve predictions over HTTP, with a page for the browser at /. New versions of the model are picked up while it runs.

    A language model is served with an OpenAI-compatible interface below /v1/.

    Examples:

        lamina serve shop

        lamina serve shop --host 0.0.0.0 --token-file token.txt
    """
    given = dict(locals())
    _check_installed()
    from lamina import serve as serving
    from lamina.model import Model

    language = Model(model).facts.kind == "language"
    _refuse_idle(context, serving.ONLY_CLASSIFIERS if language else serving.ONLY_LANGUAGE, language=language)
    named = {name: given[f"max_{name}"] for name in serving.Limits.__dataclass_fields__}
    named = {name: value for name, value in named.items() if value is not None}
    limits = serving.Limits.of_language(**named) if language else serving.Limits(**named)
    serving.check_limits(limits, language=language)
    token = None if token_file is None else serving.read_token(token_file)
    bound = serving.bind(host, port)
    _log()
    try:
        hosts = serving.allowed_hosts(bound, host, allow_host or [])
        app = serving.create_app(model, limits=limits, token=token, hosts=hosts, device=_device(device), chat=chat)
    except LaminaError:
        bound.close()
        raise
    print(_greeting(model, serving.url_of(bound), app, token_file), flush=True)
    if language and chat and not app.about()["chat_template"]:
        told = "the tokenizer has no chat template, so only /v1/completions is served, not /v1/chat/completions."
        print(f"note: {told}", file=sys.stderr)
    elif language and chat and Model(model).facts.config.data.form == "plain":
        told = "prompts are learnt without the chat template (data.form = plain), and /v1/completions asks in the same form."
        print(f"note: {told} /v1/chat/completions is for what was learnt as chats.", file=sys.stderr)
    if hosts is None and token is None:
        print(
            "note: everyone who reaches this address may use it; --token-file FILE asks for a token.", file=sys.stderr
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        serving.run(app, bound, limits)
    print("stopped", file=sys.stderr)


def _refuse_idle(context: typer.Context, limits: tuple[str, ...], *, language: bool) -> None:
    """Raises ConfigError for a given limit that has no effect on a model of this kind."""
    from lamina.serve import flag

    for limit in limits:
        if str(getattr(context.get_parameter_source(f"max_{limit}"), "name", "")) == "COMMANDLINE":
            theirs = "classifiers, and this is a language model" if language else "language models"
            raise ConfigError(f"{flag(limit)} is for {theirs}. Leave it out.")


def _log() -> None:
    """Write the server's own log to stderr. Libraries log every malformed form and image, by which anyone could fill it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("lamina.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger().addHandler(logging.NullHandler())  # else warnings would go to stderr


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name.replace("_", "-") for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"`lamina serve` needs {', '.join(missing)}. Install: pip install 'lamina[serve]'.")


def _device(name: str | None) -> str | None:
    if name is None:
        return None
    from lamina.engine import device

    for known in ("auto", "cpu", "cuda"):
        if name == known:
            return device.resolve(known)
    raise ConfigError(f"--device {name!r}: choose auto, cpu or cuda.")


def _greeting(model: Path, url: str, app: Any, token_file: Path | None) -> str:
    about = app.about()
    tasks = f"{about['tasks']} task{'' if about['tasks'] == 1 else 's'}"
    if about["kind"] == "language":
        return (
            f"{model}: version {about['version']}, a language model of {tasks}, called {about['name']!r}\n"
            f"page:    {url}\n"
            f"OpenAI:  base_url={url}/v1\n"
            "Ctrl-C stops."
        )
    header = f' -H "Authorization: Bearer $(cat {shlex.quote(str(token_file))})"' if token_file else ""
    what = "-F file=@photo.jpg" if about["kind"] == "image" else '--json \'{"texts": ["..."]}\''
    return (
        f"{model}: version {about['version']}, {about['classes']} classes from {tasks}\n"
        f"page:    {url}\n"
        f"predict: curl{header} {what} {url}/predict\n"
        "Ctrl-C stops."
    )
