"""Requests per second and latency of `lamina serve`, of a plain FastAPI handler, and of LitServe, for one model.

The three serve the same model in turn, and a second process sends the same images. The rounds are interleaved, so that a slower
moment of the machine strikes all. LitServe is left out where it is not installed (pip install litserve).

    python benchmarks/serving.py                       writes docs/results/serving.md, about a minute
    python benchmarks/serving.py --seconds 0.5 --page ""      whether it works
"""

import argparse
import http.client
import importlib.util
import io
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve()
SERVERS = {"lamina": "lamina serve", "plain": "FastAPI, no batching", "litserve": "LitServe"}
BOUNDARY = "a-boundary"
BATCH, WAIT = 32, 0.003
"""Largest batch and longest wait, the same for all that have them."""


def picture(seed: int, size: int = 256) -> bytes:
    draws = np.random.default_rng(seed)
    colours = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


def make_model(folder: Path) -> Path:
    """A model of four classes on the embedded backbone. What it has learnt does not matter here."""
    from lamina.model import Model

    for label in range(4):
        (folder / "data" / f"class{label}").mkdir(parents=True)
        for number in range(12):
            (folder / "data" / f"class{label}" / f"{number}.jpg").write_bytes(picture(100 * label + number))
    Model.create(folder / "model", settings={"training.epochs": 1, "device": "cpu"}).learn(folder / "data")
    return folder / "model"


# -- servers --------------------------------------------------------------------------------------------------------------


def serve_plain(model: Path, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI, UploadFile

    from lamina.model import Model

    app, opened = FastAPI(), Model(model)
    opened.predictor()

    @app.get("/health")
    def health() -> dict[str, bool]:
        return {"ok": True}

    @app.post("/predict")
    def predict(file: UploadFile) -> dict[str, object]:
        (found,) = opened.predictor().predict([file.file.read()], 5)
        return {"class": found.label, "probability": found.probability}

    uvicorn.run(app, port=port, log_level="error")


def serve_litserve(model: Path, port: int) -> None:
    import litserve

    from lamina.model import Model

    class Api(litserve.LitAPI):
        def setup(self, device: str) -> None:
            del device
            self.predictor = Model(model).predictor()

        def decode_request(self, request: object) -> bytes:
            return bytes(request["file"].file.read())  # type: ignore[index]

        def batch(self, inputs: list[bytes]) -> list[bytes]:
            return inputs

        def predict(self, x: list[bytes]) -> list[object]:
            return list(self.predictor.predict(x, 5))

        def unbatch(self, output: list[object]) -> list[object]:
            return output

        def encode_response(self, output: object) -> dict[str, object]:
            return {"class": output.label, "probability": output.probability}  # type: ignore[attr-defined]

    server = litserve.LitServer(Api(max_batch_size=BATCH, batch_timeout=WAIT), accelerator="cpu")
    server.run(port=port, generate_client_file=False, log_level="error")


@contextmanager
def served(name: str, model: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, str(HERE), "--serve", name, "--model", str(model), "--port", str(port)]
    if name == "lamina":
        command = [sys.executable, "-m", "lamina.cli", "serve", str(model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{SERVERS[name]} did not start")
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


# -- load -----------------------------------------------------------------------------------------------------------------


def load(port: int, clients: int, seconds: float) -> None:
    """Send images from so many threads, and print the latencies in seconds as JSON."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    bodies = [head.encode() + picture(seed) + f"\r\n--{BOUNDARY}--\r\n".encode() for seed in range(16)]
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    found: list[float] = []
    until = time.monotonic() + seconds

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        number = first
        while time.monotonic() < until:
            started = time.monotonic()
            connection.request("POST", "/predict", bodies[number % len(bodies)], headers)
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise SystemExit(f"status {response.status}")
            found.append(time.monotonic() - started)
            number += 1

    threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(found))


def measure(port: int, clients: int, seconds: float) -> list[float]:
    command = [sys.executable, str(HERE), "--load", str(clients), "--port", str(port), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(value) for value in json.loads(done.stdout)]


# -- the table ------------------------------------------------------------------------------------------------------------


def table(results: dict[tuple[str, int], list[float]], seconds: float, rounds: int, names: list[str]) -> str:
    rows = ["| clients | server | requests/s | p50, ms | p99, ms |", "|---:|---|---:|---:|---:|"]
    for clients in sorted({clients for _, clients in results}):
        for name in names:
            times = np.array(results[name, clients])
            rate, middle, high = len(times) / (seconds * rounds), *(1000 * np.quantile(times, (0.5, 0.99)))
            rows.append(f"| {clients} | {SERVERS[name]} | {rate:.0f} | {middle:.1f} | {high:.1f} |")
    return "\n".join(rows)


def page(text: str, seconds: float, rounds: int, names: list[str]) -> str:
    left = "" if "litserve" in names else " LitServe was not installed."
    return (
        f"# Serving: throughput and latency\n\n{text}\n\n"
        f"One process on {platform.machine()} with {os.cpu_count()} CPU cores serves the embedded backbone. A second process "
        f"sends JPEG images of 256 px, one per request, on {rounds} rounds of {seconds:g} s for each row. The rounds are "
        f"interleaved. Batches hold at most {BATCH} images, for all servers that have batches.{left}\n\n"
        "The plain handler decodes and computes in FastAPI's thread pool, one image at a time.\n\n"
        "Measured by `benchmarks/serving.py`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--page", default=str(HERE.parents[1] / "docs/results/serving.md"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--serve", choices=("plain", "litserve"), help=argparse.SUPPRESS)
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        {"plain": serve_plain, "litserve": serve_litserve}[given.serve](given.model, given.port)
        return
    if given.load:
        load(given.port, given.load, given.seconds)
        return
    names = [name for name in SERVERS if name != "litserve" or importlib.util.find_spec("litserve")]
    results: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or make_model(Path(folder))
        for number in range(given.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                with served(name, model) as port:
                    measure(port, 2, min(1.0, given.seconds))
                    for clients in given.clients:
                        results.setdefault((name, clients), []).extend(measure(port, clients, given.seconds))
                print(f"round {number + 1}: {SERVERS[name]} done", file=sys.stderr)
    text = table(results, given.seconds, given.rounds, names)
    print(text)
    if given.page:
        Path(given.page).write_text(page(text, given.seconds, given.rounds, names), encoding="utf-8")


if __name__ == "__main__":
    main()
