"""Limits, damaged input and the token: what is refused, with which status, and with which words."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from tests.serving import bomb, form, photo
from tests.unit.serve.conftest import Client, error

from lamina.errors import ConfigError
from lamina.model import Predictor
from lamina.serve import Limits, Refusal, allowed_hosts, check_limits, create_app, read_token
from lamina.serve.body import Held, Share, shown_name, texts_of, uploads_of
from lamina.serve.limits import LANGUAGE, flag

PNG = {"content-type": "image/png"}
FORM = {"content-type": "multipart/form-data; boundary=b"}


def test_a_body_that_is_too_large_is_refused_with_or_without_its_length(serve: Client) -> None:
    client = serve(body_mb=0.01)
    for content in (bytes(20_000), (bytes(1000) for _ in range(20))):
        response = client.post("/predict", content=content, headers=PNG)
        assert response.status_code == 413
        assert "--max-body-mb" in error(response)
    assert "lamina_body_bytes 0.0" in client.get("/metrics").text


def test_all_bodies_together_are_limited(serve: Client) -> None:
    response = serve(inflight_mb=0.001).post("/predict", content=bytes(2000), headers=PNG)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert "--max-inflight-mb" in error(response)


def test_a_share_is_given_back_by_its_last_user() -> None:
    held = Held(Limits(inflight_mb=1))
    share = Share(held)
    share.take(1000)
    share.keep()
    share.release()
    assert held.bytes == 1000
    share.release()
    assert held.bytes == 0
    with pytest.raises(Refusal):
        Share(held).take(2**20 + 1)


def test_a_form_is_held_once_while_it_waits(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import tracemalloc

    from tests.unit.serve.direct import call

    held: list[int] = []
    real = Predictor.read

    def measured(self: Predictor, inputs: Any) -> Any:
        held.append(tracemalloc.get_traced_memory()[0])
        return real(self, inputs)

    stream = io.BytesIO()
    Image.new("RGB", (1600, 1600)).save(stream, "BMP")
    size = len(stream.getvalue())
    app = create_app(animals)

    async def sent() -> dict[str, object]:
        return {"type": "http.request", "body": form(("a", stream.getvalue()))[0], "more_body": False}

    async def main() -> None:
        async with app.app.router.lifespan_context(app.app):  # type: ignore[attr-defined]
            gc.collect()
            tracemalloc.start()
            try:
                assert (await call(app, [sent], kind=form()[1]))[0] == 200
            finally:
                tracemalloc.stop()

    monkeypatch.setattr(Predictor, "read", measured)
    asyncio.run(main())
    assert size < held[0] < 1.5 * size


def test_pixels_are_counted_before_decoding(serve: Client) -> None:
    client = serve(megapixels=1)
    for content in (bomb(50_000, 50_000), bomb(2**31 - 1, 2**31 - 1), bomb(1001, 1000), bomb(1001, 1000, whole=True)):
        response = client.post("/predict", files={"file": ("x.png", content)})
        assert response.status_code == 413
        assert "file 1 (x.png) has more than 1 million pixels (--max-megapixels)" in error(response)
    assert client.post("/predict", files={"file": bomb(1000, 1000, whole=True)}).status_code == 200


def test_an_image_inside_an_icon_is_counted_too(serve: Client) -> None:
    inside = bomb(3000, 3000, whole=True)
    icon = b"\0\0\1\0\1\0" + b"\x10\x10\0\0\1\0\x01\0" + len(inside).to_bytes(4, "little") + b"\x16\0\0\0" + inside
    response = serve(megapixels=1).post("/predict", files={"file": icon})
    assert response.status_code in (413, 422)


def test_files_of_a_request_are_limited(serve: Client) -> None:
    client = serve(files=2)
    response = client.post("/predict", files=[("file", (f"{k}", photo())) for k in range(3)])
    assert response.status_code == 413
    assert "more than 2 files (--max-files)" in error(response)


def test_texts_are_limited_in_number_and_length(serve: Client, news: Path) -> None:
    client = serve(news, texts=2, text_characters=5, json_mb=0.001)
    assert "--max-texts" in error(client.post("/predict", json={"texts": ["a"] * 3}))
    response = client.post("/predict", json={"texts": ["a", "abcdef"]})
    assert response.status_code == 413
    assert error(response) == "texts[1] has 6 characters; allowed are 5 (--max-text-characters)"
    response = client.post("/predict", json={"texts": ["a" * 2000]})
    assert response.status_code == 413
    assert "--max-json-mb" in error(response)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"texts": NaN, ' + b"}"),
        *(b"[]", b"{}", b"null", b'{"texts": "sun"}', b'{"texts": []}', b'{"texts": [1]}', b'{"texts": [null]}'),
        *(b'{"texts": ["sun"], "more": 1}', b'{"texts": [["sun"]]}', b'{"texts": {"0": "sun"}}'),
    ],
)
def test_json_that_is_something_else(serve: Client, news: Path, body: bytes) -> None:
    response = serve(news).post("/predict", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    error(response)


def test_a_media_type_of_the_other_kind(serve: Client, news: Path) -> None:
    assert serve().post("/predict", json={"texts": ["a"]}).status_code == 415
    assert serve(news).post("/predict", files={"file": photo()}).status_code == 415
    assert serve().post("/predict").status_code == 415
    response = serve().post("/predict", content=photo(), headers={**PNG, "content-encoding": "gzip"})
    assert response.status_code == 415
    assert "Content-Encoding" in error(response)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"junk", b"--b", b"--b\r\n", b"--b--\r\n", b"--c\r\n\r\nx\r\n--c--\r\n", b"\r\n" * 1000),
        b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx',
        b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--b',
        b"--b\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\ncontent-disposition: form-data; name="other"\r\n\r\nx\r\n--b--\r\n',
        b"--b\r\n" + b"a: b\r\n" * 100 + b"\r\nx\r\n--b--\r\n",
        b"--b\r\na: " + b"b" * 10_000 + b"\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\nno colon\r\n\r\nx\r\n--b--\r\n",
    ],
)
def test_a_malformed_form(serve: Client, body: bytes) -> None:
    response = serve().post("/predict", content=body, headers=FORM)
    assert response.status_code in (400, 422), response.content
    error(response)


def test_a_form_without_a_boundary(serve: Client) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 999):
        assert serve().post("/predict", content=b"x", headers={"content-type": kind}).status_code == 400


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000"])
def test_an_image_that_is_cut_off_is_named(serve: Client, kind: str) -> None:
    client = serve()
    whole = encoded(kind)
    assert client.post("/predict", files={"file": ("whole.jpg", whole)}).status_code == 200, "the suffix says nothing"
    refused = 0
    for length in (0, 1, 5, 20, len(whole) // 2):
        response = client.post("/predict", files=[("file", ("a", photo())), ("file", ("cut.png", whole[:length]))])
        assert response.status_code in (200, 415, 422)
        if response.status_code != 200:
            refused += 1
            assert error(response).startswith("file 2 (cut.png): ")
    assert refused >= 4


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"PK\3\4", b"\x7fELF", b"GIF89a"]
)
def test_what_is_no_image(serve: Client, content: bytes) -> None:
    response = serve().post("/predict", files={"file": ("photo.png", content)})
    assert response.status_code == 415
    assert "(photo.png)" in error(response)


def test_a_token_is_asked_for_where_data_is(serve: Client) -> None:
    client = serve(token="a-token-of-some-length")
    for path in ("/tasks", "/model", "/metrics", "/openapi.json", "/nothing"):
        response = client.get(path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Bearer")
        error(response)
    assert client.post("/predict", files={"file": photo()}).status_code == 401
    for path in ("/", "/health", "/ready"):
        assert client.get(path).status_code == 200
    right = {"authorization": "Bearer a-token-of-some-length"}
    assert client.get("/tasks", headers=right).status_code == 200
    assert client.post("/predict", files={"file": photo()}, headers=right).status_code == 200
    for wrong in (
        "Bearer",
        "Bearer ",
        "Bearer a-token-of-some-lengt",
        "Basic a-token-of-some-length",
        "a-token-of-some-length",
    ):
        assert client.get("/tasks", headers={"authorization": wrong}).status_code == 401
    assert client.get("/tasks", headers={"authorization": "Bearer \u00e9".encode("latin-1")}).status_code == 401  # type: ignore[dict-item]


def test_a_token_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_token(file)
    for content in (b"", b"short", b"a b" * 10, "é".encode() * 20, b"\xff" * 20):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="--token-file"):
            read_token(file)
    file.write_text("abcdefgh-12345678\n")
    assert read_token(file) == "abcdefgh-12345678"


class Bound:
    """A socket that is bound to an address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def getsockname(self) -> tuple[str, int]:
        return self.address, 8000


def hosts(address: str, name: str, *more: str) -> frozenset[str] | None:
    return allowed_hosts(Bound(address), name, list(more))  # type: ignore[arg-type]


def test_hosts() -> None:
    assert hosts("0.0.0.0", "0.0.0.0") is None
    assert hosts("::", "::") is None
    assert hosts("192.0.2.7", "some.name") is None
    for address in ("127.0.0.1", "::1", "127.0.0.2", "::ffff:127.0.0.1", "::1%lo"):
        assert hosts(address, "localhost") is not None
    found = hosts("::1", "ip6-localhost")
    assert found is not None
    assert {"ip6-localhost", "localhost"} <= found, "it is the bound address that says where it can be reached"
    found = hosts("0.0.0.0", "0.0.0.0", "Shop.example", "[2001:DB8::1]")
    assert found is not None
    assert {"shop.example", "localhost", "[2001:db8::1]"} <= found
    for wrong in ("shop.example:8000", "2001:db8::1", "[::1]:80", "http://shop.example", "", "a b"):
        with pytest.raises(ConfigError, match=r"--allow-host .* without a port"):
            hosts("127.0.0.1", "127.0.0.1", wrong)


def test_another_host_is_named(animals: Path) -> None:
    app = create_app(animals, hosts=frozenset({"localhost"}))
    with TestClient(app, base_url="http://other.example:99") as client:
        response = client.get("/tasks")
    assert response.status_code == 421
    assert "names 'other.example'; --allow-host" in error(response)


def test_a_page_of_another_site_gets_no_prediction(serve: Client) -> None:
    client = serve()
    response = client.post("/predict", files={"file": photo()}, headers={"sec-fetch-site": "cross-site"})
    assert response.status_code == 403
    assert "another site" in error(response)
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200, "a link may lead here"
    for own in ("same-origin", "same-site", "none"):
        response = client.post("/predict", files={"file": photo()}, headers={"sec-fetch-site": own})
        assert response.status_code == 200


def test_an_empty_token_is_refused(animals: Path) -> None:
    for token in ("", " "):
        with pytest.raises(ConfigError, match="the token is empty"):
            create_app(animals, token=token)


def test_limits_that_exclude_each_other() -> None:
    check_limits(Limits())
    for limit in ("body_mb", "megapixels", "deadline_seconds", "wait_ms"):
        for value in (float("inf"), float("nan")):
            with pytest.raises(
                ConfigError, match=rf"--max-{limit.replace('_', '-')} {value}: it must be a finite number"
            ):
                check_limits(Limits(**{limit: value}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--max-inflight-mb 256: it must be at least --max-json-mb \(300\)"):
        check_limits(Limits(json_mb=300))
    with pytest.raises(ConfigError, match="--max-queue 10: it must be at least"):
        check_limits(Limits(queue=10))
    with pytest.raises(ConfigError, match="--max-inflight-mb 1: it must be at least --max-body-mb"):
        check_limits(Limits(inflight_mb=1))


def test_every_limit_has_an_option() -> None:
    import inspect

    from lamina.cli.serve import serve

    options = inspect.signature(serve).parameters
    for name in Limits.__dataclass_fields__:
        default = None if name in LANGUAGE else getattr(Limits(), name)  # None: it depends on the model
        assert options[flag(name).removeprefix("--").replace("-", "_")].default == default


def test_names_and_bodies_are_taken_apart() -> None:
    assert shown_name(None) is None
    assert shown_name("a\u202e/b\u0000c") == "bc"
    body, kind = form(("a", b"1\r\n2"), ("b", b""))
    assert [(u.name, u.content) for u in uploads_of(body, kind, Limits())] == [("a", b"1\r\n2"), ("b", b"")]
    assert texts_of(json.dumps({"texts": ["é"]}).encode(), Limits()) == ["é"]


def test_a_stalled_upload_ends(serve: Client) -> None:
    from tests.unit.serve.direct import call

    app = serve(idle_seconds=0.05).app

    async def stalled() -> dict[str, object]:
        await asyncio.sleep(60)
        raise AssertionError

    status, body = asyncio.run(call(app, [stalled]))
    assert status == 408
    assert "--max-idle-seconds" in body["error"]


@pytest.mark.parametrize(("kind", "seconds"), [("image", 31), ("language", 11)])
def test_what_is_under_way_has_time_to_end(monkeypatch: pytest.MonkeyPatch, kind: str, seconds: int) -> None:
    from lamina.serve import process

    found: list[Any] = []

    class Stands:
        def __init__(self, config: Any) -> None:
            found.append(config.timeout_graceful_shutdown)

        def run(self, sockets: Any) -> None:
            del sockets

    class App:
        def about(self) -> dict[str, str]:
            return {"kind": kind}

    monkeypatch.setattr(process.uvicorn, "Server", Stands)
    monkeypatch.setattr(process, "return_large_blocks", lambda: None)
    process.run(App(), None, Limits(deadline_seconds=30))  # type: ignore[arg-type]
    assert found == [seconds]
