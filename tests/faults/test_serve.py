"""Real servers: a model that learns while it is served, kills, signals, and hostile clients."""

import http.client
import io
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from tests.faults.processes import lamina, start
from tests.models import CLASSES, backbone, content, images
from tests.serving import BOUNDARY, Server, bomb, copied, form, learnt, learnt_texts, photo, status_of

from lamina.model import Model

QUICK_LIMITS = (
    "--max-header-seconds=1",
    "--max-idle-seconds=1",
    "--max-body-mb=2",
    "--max-megapixels=4",
    "--max-files=4",
)
MOST_GROWTH = 150
"""Megabytes that a server may grow by under attack: two decoders with an image each, buffers of bodies, the allocator."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return learnt(folder, backbone(folder / "vit"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learnt_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def server(model: Path) -> Iterator[Server]:
    found = Server(model, *QUICK_LIMITS)
    yield found
    found.stop()


def test_no_request_fails_while_the_model_learns(model: Path, tmp_path: Path) -> None:
    path = copied(model, tmp_path / "model")
    data = images(tmp_path / "more.parquet", CLASSES[:3], train=40, seed=9)
    server = Server(path)
    stop, versions, failures = threading.Event(), [[] for _ in range(8)], []

    def client(seen: list[int]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        body, kind = form(("photo.png", photo(len(seen))))
        while not stop.is_set():
            try:
                connection.request("POST", "/predict", body, {"Content-Type": kind})
                response = connection.getresponse()
                told = response.read()
                if response.status != 200:
                    failures.append(told)
                seen.append(int(response.headers["X-Model-Version"]))
            except OSError as error:
                failures.append(repr(error).encode())
                break
        connection.close()

    threads = [threading.Thread(target=client, args=(seen,)) for seen in versions]
    for thread in threads:
        thread.start()
    try:
        code, _, err = lamina("learn", path, data, "--name", "third", "--set=training.epochs=10")
        assert code == 0, err
        deadline = time.monotonic() + 60
        while not all(seen and seen[-1] == 3 for seen in versions):
            assert time.monotonic() < deadline, server.log
            time.sleep(0.05)
        time.sleep(0.3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    for seen in versions:
        assert seen == sorted(seen)
        assert set(seen) == {2, 3}, "the version changes once"
    assert sum(map(len, versions)) > 50
    server.stop()


def test_a_server_that_is_killed_while_the_model_learns_does_not_hurt_it(model: Path, tmp_path: Path) -> None:
    path = copied(model, tmp_path / "model")
    before = content(path)
    data = images(tmp_path / "more.parquet", CLASSES[:3], train=30, seed=9)
    server = Server(path)
    learning = start("learn", path, data, "--name", "third", "--set=training.epochs=20")
    while not (path / "work" / "plan.json").exists():
        assert learning.poll() is None
        time.sleep(0.01)
    assert server.predict(("a", photo()))[0] == 200
    server.process.kill()
    server.process.finish(30)
    code, _, err = learning.finish(120)
    assert code == 0, err
    assert Model(path).version == 3
    after = content(path)
    assert {name: after[name] for name in before if name != "model.json"} == {
        name: value for name, value in before.items() if name != "model.json"
    }
    assert Model(path).predict([photo()])[0].label in CLASSES


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_ends_the_server_cleanly(model: Path, number: int) -> None:
    server = Server(model)
    assert server.predict(("a", photo()))[0] == 200
    server.process.send_signal(number)
    code, _, err = server.process.finish(30)
    assert (code, "Traceback" in err) == (0, False), err
    with pytest.raises(OSError):
        server.connect(1)


def test_requests_under_way_are_finished_at_the_end(model: Path) -> None:
    server = Server(model)
    body, kind = form(("a", photo()))
    with server.connect() as line:
        head = (
            f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        line.sendall(head.encode() + body[:50])
        time.sleep(0.3)
        server.process.send_signal(15)
        time.sleep(0.3)
        line.sendall(body[50:])
        assert status_of(line.recv(65536)) == 200
    assert server.process.finish(30)[0] == 0


def test_a_port_in_use_and_an_address_of_another_machine_are_refused(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = lamina("serve", model, "--port", taken.getsockname()[1])
        assert code == 2
        assert "cannot be used: Address already in use" in err
    code, _, err = lamina("serve", model, "--host", "192.0.2.1", "--port", 0)
    assert code == 2
    assert "--host 192.0.2.1" in err


def test_the_command_says_what_is_missing_or_wrong(model: Path, tmp_path: Path) -> None:
    empty = copied(model, tmp_path / "empty")
    Model(empty).rollback()
    for arguments, told in (
        ((empty,), "has learnt no task yet. `lamina learn"),
        ((tmp_path,), "is not a model"),
        ((model, "--token-file", tmp_path / "none"), "cannot be read"),
        ((model, "--max-queue", 5), "--max-queue 5: it must be at least"),
        ((model, "--max-body-mb", "inf"), "--max-body-mb inf: it must be a finite number"),
        ((model, "--allow-host", "shop.example:80"), "without a port"),
        ((model, "--device", "tpu"), "choose auto, cpu or cuda"),
    ):
        code, _, err = lamina("serve", *arguments, "--port", 0)
        assert code == 2
        assert told in err
        assert "Traceback" not in err
    script = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv.insert(1, 'serve'); from lamina.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, model], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "`lamina serve` needs uvicorn. Install: pip install 'lamina[serve]'." in done.stderr


def test_the_start_says_how_to_ask(model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-some-length\n")
    server = Server(model, "--token-file", tmp_path / "token")
    assert "version 2, 6 classes from 2 tasks" in server.said
    assert f"http://127.0.0.1:{server.port}/predict" in server.said
    assert "a-token-of" not in server.said + server.log
    assert server.ask("GET", "/tasks")[0] == 401
    assert server.ask("GET", "/tasks", headers={"Authorization": "Bearer a-token-of-some-length"})[0] == 200
    server.stop()


# -- hostile clients ------------------------------------------------------------------------------------------------------


def request(path: str, body: bytes = b"", *headers: str, method: str = "POST", chunked: bool = False) -> bytes:
    head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers]
    if chunked:
        pieces = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:]) if part)
        return "\r\n".join([*head, "Transfer-Encoding: chunked"]).encode() + b"\r\n\r\n" + pieces + b"0\r\n\r\n"
    return "\r\n".join([*head, f"Content-Length: {len(body)}"]).encode() + b"\r\n\r\n" + body


def whole_image(kind: str, size: int = 48) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), "teal").save(stream, kind)
    return stream.getvalue()


FORM = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
PNG = "Content-Type: image/png"
STATUSES = {400, 401, 404, 405, 408, 413, 415, 421, 422, 431, 503}


def attacks(draw: random.Random) -> list[Callable[[], bytes]]:
    """Hostile requests, each made anew."""

    def flipped() -> bytes:
        found = bytearray(whole_image(draw.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])))
        for _ in range(draw.randint(1, 30)):
            found[draw.randrange(len(found))] = draw.randrange(256)
        return request("/predict", bytes(found)[: draw.randint(0, len(found))], PNG)

    def multipart(*files: tuple[str, bytes], field: str = "file", cut: int | None = None) -> bytes:
        return request("/predict", form(*files, field=field)[0][:cut], FORM)

    return [
        flipped,
        lambda: request("/predict", draw.randbytes(draw.randint(0, 3000)), PNG, chunked=True),
        lambda: request("/predict", bomb(50_000, 50_000), PNG),
        lambda: multipart(("bomb.png", bomb(2**31 - 1, 2**31 - 1))),
        lambda: multipart(("../../../etc/passwd", b"root")),
        lambda: multipart(("a\r\nX-Evil: 1", b"x")),
        lambda: multipart(("a", photo()), field="../file"),
        lambda: multipart(("a", photo()), cut=draw.randint(1, 1000)),
        lambda: multipart(*[("a", photo())] * 5),
        lambda: request("/predict", b'{"texts": ["a"]}', "Content-Type: application/json"),
        lambda: request("/predict", b"[" * 1000, "Content-Type: application/json"),
        lambda: request("/predict?top=-1", photo(), PNG),
        lambda: request("/predict?top=1&top=2&x=%00", photo(), PNG),
        lambda: request("/predict", photo(), PNG, "Content-Encoding: gzip"),
        lambda: request(
            "/predict", photo(), "Content-Type: \xff/\xfe".encode("latin-1").decode("latin-1").encode().decode()
        ),
        lambda: request("/predict", photo(), f"Content-Type: multipart/form-data; boundary={'b' * 300}"),
        lambda: request("/predict", bytes(1000), "Content-Type: multipart/form-data"),
        lambda: request("/../../etc/passwd", method="GET"),
        lambda: request("/%2e%2e/%2e%2e/etc/passwd", method="GET"),
        lambda: request("/tasks", method=draw.choice(["PUT", "DELETE", "PATCH", "TRACE", "BREW"])),
        lambda: request("/tasks?" + "a" * 2000, method="GET"),
        lambda: b"GET / HTTP/9.9\r\n\r\n",
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(200) + b"\r\n\r\n",
        lambda: b"GET /tasks HTTP/1.1\r\nHost: other.example\r\n\r\n",
        lambda: b"GET /tasks HTTP/1.1\r\n\r\n",
        lambda: b"GET /tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nA B: c\r\n\r\n",
        lambda: b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        lambda: b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        lambda: (
            b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\nContent-Type: image/png\r\n\r\nZZ\r\n"
        ),
        lambda: b"GET /tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
        lambda: b"GET /tasks HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a: b\r\n" * 8000 + b"\r\n",
        lambda: b"GET /" + b"a" * 70_000,
        lambda: request("/predict", b"", "Content-Type: image/png", "Expect: 100-continue"),
    ]


def text_attacks(draw: random.Random) -> list[Callable[[], bytes]]:
    """Hostile requests to a model of texts, each made anew."""
    kind = "Content-Type: application/json"

    def post(*texts: object, **more: object) -> bytes:
        return request("/predict", json.dumps({"texts": list(texts), **more}).encode(), kind)

    def letters(count: int) -> str:
        return "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(160, 0xD800)])) for _ in range(count))

    return [
        lambda: post(*(letters(draw.randint(1, 50)) for _ in range(draw.randint(1, 8)))),
        lambda: post("sun", "\u200b"),
        lambda: post("\ud800"),
        lambda: post("\0", "\u202e", "\ufeff", "\U0010ffff"),
        lambda: post(" \n\t"),
        lambda: post("<img src=x onerror=alert(1)>", "'; DROP TABLE x; --", "{{7*7}}", "%n%s"),
        lambda: post("[CLS] [SEP] [PAD] [MASK]"),
        lambda: post("sun " * 4900),
        lambda: post("a" * 20_001),
        lambda: post(*["sun"] * 257),
        lambda: post("e" + "\u0301" * 5000),
        lambda: post(1, None, {"a": []}),
        lambda: post("sun", top=3),
        lambda: request("/predict", b'{"texts": ["sun"], "texts": 3}', kind),
        lambda: request("/predict", b'{"texts": ' + b"[" * 50_000, kind),
        lambda: request("/predict", b'{"texts": [' + b'"sun",' * draw.randint(0, 200), kind),
        lambda: request("/predict", b'{"texts": [1' + b"0" * 5000 + b"]}", kind),
        lambda: request("/predict", b"\xff\xfe" + '{"texts": ["sun"]}'.encode("utf-16-le"), kind),
        lambda: request("/predict", draw.randbytes(draw.randint(0, 3000)), kind, chunked=True),
        lambda: request("/predict", b" " * (2**21 + 1), kind),
        lambda: request("/predict?top=21", b'{"texts": ["sun"]}', kind),
        lambda: request("/predict", photo(), PNG),
        lambda: request("/predict", form(("a", photo()))[0], FORM),
    ]


def is_refusal(response: bytes) -> bool:
    """Whether the body of a response is JSON with a message and nothing else."""
    try:
        told = json.loads(response.partition(b"\r\n\r\n")[2])
    except ValueError:
        return False
    return isinstance(told, dict) and told.keys() == {"error"} and bool(told["error"])


def survive(
    server: Server,
    count: int,
    threads: int = 4,
    made: Callable[[random.Random], list[Callable[[], bytes]]] = attacks,
) -> Counter[int]:
    """The statuses of so many hostile requests in random order, some of them from several clients at once."""
    draws = [random.Random(seed) for seed in range(threads)]
    found: list[Counter[int]] = [Counter() for _ in draws]
    wrong: list[tuple[bytes, bytes]] = []

    def client(draw: random.Random, seen: Counter[int]) -> None:
        chosen = made(draw)
        for _ in range(count // threads):
            sent = draw.choice(chosen)()
            status = status_of(back := server.raw(sent))
            seen[status] += 1
            if not ((status in STATUSES and is_refusal(back)) or status == 200):
                wrong.append((sent[:300], back[:300]))

    clients = [threading.Thread(target=client, args=pair) for pair in zip(draws, found, strict=True)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert not wrong, (len(wrong), wrong[:3])
    assert server.process.poll() is None
    if made is attacks:
        assert server.predict(("a", photo()))[0] == 200, "and it goes on serving"
    assert not server.log, "nobody can fill the log"
    return sum(found, Counter())


def attacked(server: Server, count: int) -> None:
    survive(server, 100)  # the allocator takes what it needs
    before = server.megabytes
    started = time.monotonic()
    statuses = survive(server, count)
    grown = server.megabytes - before
    print(f"{count} hostile requests in {time.monotonic() - started:.0f} s: {dict(statuses)}; "
          f"{before:.0f} MB before, {grown:+.0f} MB after")  # fmt: skip
    assert grown < MOST_GROWTH


def test_hostile_requests_in_random_order(server: Server) -> None:
    attacked(server, 300)


def test_hostile_texts_in_random_order(texts: Path) -> None:
    server = Server(texts)
    statuses = survive(server, 200, made=text_attacks)
    assert {200, 400, 413, 415, 422} <= statuses.keys()
    body = b'{"texts": ["sun rain"]}'
    status, told, _ = server.ask("POST", "/predict", body, {"Content-Type": "application/json"})
    assert (status, told["predictions"][0]["class"]) == (200, "weather")
    server.stop()


@pytest.mark.slow
def test_ten_thousand_hostile_requests_in_random_order(server: Server) -> None:
    attacked(server, 10_000)


def test_bodies_that_are_too_large_are_refused_as_they_come(server: Server) -> None:
    before = server.megabytes
    body = bytes(40 * 2**20)
    for _ in range(3):
        status, told, _ = server.ask("POST", "/predict", body, {"Content-Type": "image/png"})
        assert (status, "--max-body-mb" in told["error"]) == (413, True)

    def endless() -> Iterator[bytes]:
        for _ in range(300):
            yield bytes(2**17)

    for close in ("close", "keep-alive"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        headers = {"Content-Type": "image/png", "Transfer-Encoding": "chunked", "Connection": close}
        connection.request("POST", "/predict", endless(), headers, encode_chunked=True)
        response = connection.getresponse()
        assert response.status == 413
        assert b"--max-body-mb" in response.read()
        connection.close()
    assert server.megabytes - before < 50


def send_on(line: socket.socket, part: bytes, seconds: float, pause: float = 0) -> None:
    """Sends the same again and again, until the other side does not take it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        line.sendall(part)
        time.sleep(pause)


def test_a_body_that_never_ends_is_cut(server: Server) -> None:
    before, started = server.megabytes, time.monotonic()
    head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
    with server.connect(30) as line:
        line.sendall(head)
        with pytest.raises(OSError):
            send_on(line, chunk, 25)
    assert time.monotonic() - started < 20
    assert server.megabytes - before < 50


def test_a_bomb_is_refused_without_memory(server: Server) -> None:
    assert server.predict(("a", photo()))[0] == 200
    before = server.megabytes
    for content_of in (bomb(50_000, 50_000), bomb(20_000, 20_000, whole=True)):
        status, told, _ = server.predict(("bomb.png", content_of))
        assert status == 413
        assert "bomb.png) has more than 4 million pixels (--max-megapixels)" in told["error"]
    assert server.megabytes - before < 20


def test_the_memory_of_large_images_is_returned(model: Path) -> None:
    server = Server(model)
    stream = io.BytesIO()
    Image.new("RGBA", (4000, 4000), (1, 2, 3, 99)).save(stream, "PNG")
    assert server.predict(("a", photo()))[0] == 200
    before = server.megabytes
    threads = [threading.Thread(target=server.predict, args=(("a", stream.getvalue()),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.predict(("a", photo()))[0] == 200
    assert server.megabytes - before < MOST_GROWTH, "one alone takes 300 MB while it is decoded"
    server.stop()


def test_a_slow_client_is_cut_and_others_do_not_notice(server: Server) -> None:
    lines = [server.connect(20) for _ in range(30)]
    heads = (
        b"",
        b"GET /tasks HT",
        b"GET /tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
        b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc",
    )
    started = time.monotonic()
    for number, line in enumerate(lines):
        line.sendall(heads[number % len(heads)])
    for _ in range(5):
        assert server.predict(("a", photo()))[0] == 200
    statuses = Counter()
    for line in lines:
        found = b""
        while part := line.recv(65536):
            found += part
            if b'{"error"' in found:
                break
        statuses[status_of(found)] += 1
        line.close()
    assert time.monotonic() - started < 15
    assert set(statuses) == {0, 408}
    assert statuses[408] >= 20, "the others sent nothing"


def test_a_client_that_drips_its_headers_is_cut(server: Server) -> None:
    started = time.monotonic()
    with server.connect(20) as line:
        line.sendall(b"GET /tasks HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        with pytest.raises(OSError):
            send_on(line, b"X: y\r\n", 15, pause=0.1)
    assert time.monotonic() - started < 5


def test_connections_are_limited(model: Path) -> None:
    server = Server(model, "--max-connections=5")
    lines = [server.connect(10) for _ in range(5)]
    time.sleep(0.2)
    status, told, headers = server.ask("GET", "/health")
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "--max-connections" in told["error"]
    for line in lines:
        line.close()
    time.sleep(0.2)
    assert server.ask("GET", "/health")[0] == 200
    server.stop()


def test_an_overloaded_server_says_when_to_try_again_and_recovers(model: Path) -> None:
    server = Server(model, "--max-queue=4", "--max-batch=4", "--max-files=4", "--max-texts=4")
    found: Counter[int] = Counter()

    def client() -> None:
        for _ in range(15):
            status, _, headers = server.predict(*[("a", photo())] * 4)
            found[status] += 1
            assert status == 200 or headers["Retry-After"]

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {200, 503}
    assert server.predict(*[("a", photo())] * 4)[0] == 200
    server.stop()
