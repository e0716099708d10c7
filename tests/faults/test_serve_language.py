"""A real server of a language model: OpenAI's own client, eight at once, a model that learns meanwhile, clients that go."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests import assistants
from tests.assistants import instructions
from tests.faults.processes import lamina
from tests.serving import Server, copied

CLIENTS = 8
ASKED: Any = [{"role": "user", "content": "The film 3 is a joy. Good?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assistants.learnt(tmp_path_factory.mktemp("served"))


@pytest.fixture
def server(model: Path) -> Iterator[Server]:
    found = Server(model)
    yield found
    found.stop()


def client_of(server: Server, **more: Any) -> openai.OpenAI:
    given = {"api_key": "none", "max_retries": 0, **more}
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", **given)


def test_the_openai_client_completes_and_streams(server: Server) -> None:
    assert "base_url=http" in server.said
    with client_of(server) as client:
        assert [one.id for one in client.models.list()] == ["assistant"]
        whole = client.chat.completions.create(model="assistant", messages=ASKED, max_tokens=12)
        assert whole.usage is not None
        assert whole.choices[0].finish_reason in ("stop", "length")
        parts = [
            *client.chat.completions.create(
                model="assistant", messages=ASKED, max_tokens=12, stream=True, stream_options={"include_usage": True}
            )
        ]
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == whole.choices[0].message.content
        assert parts[-1].usage == whole.usage
        replied = whole.choices[0].message.model_copy(update={"content": "Yes."})
        turns: Any = [*ASKED, replied, {"role": "user", "content": "And the book?"}]
        second = client.chat.completions.create(model="assistant", messages=turns, max_tokens=2)
        assert second.usage is not None
        assert second.usage.prompt_tokens > whole.usage.prompt_tokens
        plain = client.completions.create(model="assistant", prompt="The film", max_tokens=4)
        assert plain.object == "text_completion"


def test_the_openai_client_understands_refusals(server: Server) -> None:
    with client_of(server) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="other", messages=ASKED)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        long: Any = [{"role": "user", "content": "joy " * 400}]
        with pytest.raises(openai.BadRequestError) as too_long:
            client.chat.completions.create(model="assistant", messages=long)
        assert too_long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="greedy"):
            client.chat.completions.create(model="assistant", messages=ASKED, temperature=1)


def test_a_body_beyond_the_limit_and_a_wrong_token(model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-more-than-16-characters")
    server = Server(model, "--max-json-mb=0.01", "--token-file", tmp_path / "token")
    try:
        with client_of(server) as client, pytest.raises(openai.AuthenticationError) as wrong:
            client.models.list()
        assert wrong.value.code == "invalid_api_key"
        with client_of(server, api_key="a-token-of-more-than-16-characters") as client:
            long: Any = [{"role": "user", "content": "joy " * 4000}]
            with pytest.raises(openai.APIStatusError) as large:
                client.chat.completions.create(model="assistant", messages=long)
            assert (large.value.status_code, large.value.code) == (413, "request_too_large")
    finally:
        server.stop()


def test_no_request_fails_while_a_task_is_learnt(model: Path, tmp_path: Path) -> None:
    path = copied(model, tmp_path / "assistant")
    server = Server(path)
    seen: set[str] = set()
    failures: list[Exception] = []
    over = threading.Event()

    def ask(stream: bool) -> None:
        with client_of(server) as client:
            while not over.is_set():
                try:
                    if stream:
                        parts = [*client.chat.completions.create(
                            model="assistant", messages=ASKED, max_tokens=6, stream=True
                        )]  # fmt: skip
                        assert parts[-1].choices[0].finish_reason
                        seen.add(str(parts[-1].system_fingerprint))
                    else:
                        found = client.chat.completions.create(model="assistant", messages=ASKED, max_tokens=6)
                        seen.add(str(found.system_fingerprint))
                except Exception as error:  # noqa: BLE001 - whatever it is, a request failed
                    failures.append(error)
                    return

    threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        code, _, said = lamina("learn", path, instructions(tmp_path / "song.jsonl", "song"), "--name=songs", "--force")
        assert code == 0, said
        deadline = time.monotonic() + 60
        while "version-3" not in seen and time.monotonic() < deadline and not failures:
            time.sleep(0.05)
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
        log = server.log
        server.stop()
    assert failures == [], log
    assert {"version-2", "version-3"} <= seen, log


def endless(server: Server) -> str:
    """A prompt whose completion no token ends."""
    with client_of(server) as client:
        for word in ("film", "book", "song", "play", "tale", "joke", "ode", "poem", "show", "game"):
            found = client.completions.create(model="assistant", prompt=f"A {word}", max_tokens=400)
            if found.choices[0].finish_reason == "length":
                return f"A {word}"
    raise AssertionError("every text ends")


@pytest.mark.slow
def test_a_client_that_goes_ends_its_generation(tmp_path: Path) -> None:
    base = assistants.backbone(tmp_path / "llama", positions=8192)
    server = Server(assistants.learnt(tmp_path, base, tasks=1), "--max-new-tokens=8000", "--no-chat")
    try:
        asked = {"model": "assistant", "prompt": endless(server), "max_tokens": 8000, "stream": True}
        body = json.dumps(asked).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        for streamed in (True, False):
            sent = body if streamed else body.replace(b"true", b"null")
            with server.connect() as line:
                line.sendall(head.encode() + sent)
                if streamed:
                    assert line.recv(4096).startswith(b"HTTP/1.1 200")
                else:
                    time.sleep(0.5)
            started = time.monotonic()
            with client_of(server) as client:
                client.completions.create(model="assistant", prompt="The book", max_tokens=2)
            assert time.monotonic() - started < 5  # 8000 tokens take longer
        with server.connect() as line:  # the server ends at once, whatever is generated
            line.sendall(head.encode() + body)
            assert line.recv(4096).startswith(b"HTTP/1.1 200")
            server.process.send_signal(15)
            server.process.finish(30)
    finally:
        server.stop()
    assert "Traceback" not in server.log if server.process.folder.exists() else True
