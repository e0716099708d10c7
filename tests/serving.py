"""Real servers for tests: the `lamina serve` command in a process of its own, and what clients send to it."""

import http.client
import json
import os
import re
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tests.faults.processes import Lamina, start
from tests.models import CLASSES, SMALL, images, png, small
from tests.tiny import raw_bert

from lamina.model import Model

BOUNDARY = "a-boundary"
WORDS = ("sun", "rain", "snow", "goal", "team", "ball")


def learnt(folder: Path, base: Path, tasks: int = 2) -> Path:
    """A model of three classes a task, with probes and a gate that accepts everything."""
    data = images(folder / "images.parquet")
    settings = {"probes.per_class": 2, "gate.task_drop": None, "gate.negative_flips": None}
    model = small(folder / "animals", base, "inflora", settings)
    for number in range(tasks):
        model.learn(data, name=f"task-{number}", classes=CLASSES[3 * number : 3 * number + 3])
    return folder / "animals"


def learnt_texts(folder: Path) -> Path:
    """A text model of two classes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    raw_bert(vocabulary=len(words)).save_pretrained(folder / "bert")
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.normalizer = normalizers.Replace("\u200b", "")  # of such a text, no token is left
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder / "bert")
    rows = ["text,label,split"]
    for number in range(24):
        pair = WORDS[:3] if number % 2 else WORDS[3:]
        label, split = "weather" if number % 2 else "sport", "test" if number > 15 else "train"
        rows.append(f"{pair[number % 3]} {pair[(number + 1) % 3]},{label},{split}")
    (folder / "news.csv").write_text("\n".join(rows) + "\n")
    settings = {key: value for key, value in SMALL.items() if key != "backbone.image_size"} | {"data.max_length": 16}
    model = Model.create(folder / "news", backbone=str(folder / "bert"), method="finetune", settings=settings)
    model.learn(folder / "news.csv", name="first")
    return folder / "news"


def photo(seed: int = 0, size: int = 20) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def form(*files: tuple[str, bytes], field: str = "file") -> tuple[bytes, str]:
    """A multipart body, and its content type."""
    parts = []
    for name, content in files:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}"


def bomb(width: int, height: int, *, whole: bool = False) -> bytes:
    """A PNG of a few bytes that says it has so many pixels. whole: with all of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height if whole else 1)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Server:
    """A `lamina serve` process that has said where it listens."""

    def __init__(self, model: Path, *arguments: object) -> None:
        self.process: Lamina = start("serve", model, "--port", 0, *arguments)
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)\n", self.said)) or not self._listens(int(found[1])):
            assert self.process.poll() is None, (self.process.folder / "err").read_text()
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)
        self.port = int(found[1])

    @property
    def said(self) -> str:
        return (self.process.folder / "out").read_text()

    @property
    def log(self) -> str:
        return (self.process.folder / "err").read_text()

    @staticmethod
    def _listens(port: int) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    @property
    def megabytes(self) -> float:
        """Memory that the process holds (RSS)."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def connect(self, seconds: float = 30) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = 30,
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """One request on a connection of its own: status, body (JSON where it is), headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            content: Any = response.read()
            if response.headers.get_content_type() == "application/json":
                content = json.loads(content)
            return response.status, content, response.headers
        finally:
            connection.close()

    def predict(self, *files: tuple[str, bytes]) -> tuple[int, Any, http.client.HTTPMessage]:
        body, kind = form(*files)
        return self.ask("POST", "/predict", body, {"Content-Type": kind})

    def raw(self, content: bytes, *, wait: float = 10, end: bool = False) -> bytes:
        """Whatever comes back for these bytes, until the server closes or says no more. end: stop sending after them."""
        with self.connect(wait) as line:
            found = b""
            try:
                line.sendall(content)
                if end:
                    line.shutdown(socket.SHUT_WR)
                while part := line.recv(65536):
                    found = (found + part).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
                    if b"\r\n\r\n" in found and _whole(found):
                        break
            except OSError:
                pass
            return found

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(15)
            self.process.finish(30)
        else:
            shutil.rmtree(self.process.folder, ignore_errors=True)


def _whole(response: bytes) -> bool:
    head, _, body = response.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return length is not None and len(body) >= int(length[1])


def status_of(response: bytes) -> int:
    """The status of a raw response, 0 where the connection was closed without one."""
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.1 ") else 0


def copied(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    os.sync()
    return to
