"""Requests per second and latency of `lamina serve`, of a plain FastAPI handler, and of LitServe, for one model.

The three serve the same model in turn, and a second process sends the same images. The rounds are interleaved, so that a slower
moment of the machine strikes all. LitServe is left out where it is not installed (pip install litserve).

    python benchmarks/serving.py                       writes docs/results/serving.md, about a minute
    python benchmarks/serving.py --seconds 0.5 --page ""      whether it works
"""

import argparse
import contextlib
import http.client
import importlib.util
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
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
    Model.create(folder / "model", method="finetune", settings={"training.epochs": 1, "device": "cpu"}).learn(
        folder / "data"
    )
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


@contextlib.contextmanager
def served(name: str, model: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        *{
            "lamina": ["-m", "lamina.cli", "serve", str(model), "--port", str(port)],
            "plain": [str(HERE), "--serve", "--model", str(model), "--port", str(port)],
            "litserve": [str(HERE.with_name("serving_litserve.py")), str(model), str(port), str(BATCH), str(WAIT)],
        }[name],
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not responds(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{SERVERS[name]} did not start")
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):  # LitServe's workers may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def responds(port: int) -> bool:
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
    failed: list[int] = []
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
                failed.append(response.status)
                return
            found.append(time.monotonic() - started)
            number += 1

    threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"a request failed with status {failed[0]}")
    print(json.dumps(found))


def measure(port: int, clients: int, seconds: float) -> list[float]:
    command = [sys.executable, str(HERE), "--load", str(clients), "--port", str(port), "--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [float(value) for value in json.loads(done.stdout)]


# -- the table ------------------------------------------------------------------------------------------------------------


def table(results: dict[tuple[str, int], list[float]], seconds: float, rounds: int, names: list[str]) -> str:
    rows = ["| clients | server | requests/s | p50, ms | p99, ms |", "|---:|---|---:|---:|---:|"]
    for clients in sorted({clients for _, clients in results}):
        for name in names:
            times = np.array(results[name, clients])
            rate = len(times) / (seconds * rounds)
            middle, high = (1000 * float(np.quantile(times, share)) for share in (0.5, 0.99))
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
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_plain(given.model, given.port)
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
