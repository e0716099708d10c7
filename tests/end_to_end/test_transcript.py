"""The README's transcript, line by line: real photographs and processes, plain transformers, and clients that ask meanwhile."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import photos

ROOT = Path(__file__).resolve().parents[2]
REFUSED = "2026-12/  "
"""In the line that the gate refuses."""
CLIENTS = 8
BIN = Path(os.environ.get("LAMINA_BIN", Path(sys.executable).parent))
"""Where `lamina` and its Python lie. `make wheel` names an environment into which a wheel was installed."""

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not photos.SOURCE.is_dir(), reason="../shared/data/grocery81 is absent"),
]


def transcript() -> tuple[list[str], list[str]]:
    """The lines of shell and the pieces of Python that stand in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = re.findall(r"<!-- transcript -->(.*?)<!-- /transcript -->", text, flags=re.DOTALL)[0]
    shell = re.findall(r"```sh\n(.*?)```", part, flags=re.DOTALL)
    return shell[0].splitlines(), re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)


class Server:
    """`lamina serve` in a process of its own, and clients that ask it all the time."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str], photo: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        line = command.partition("#")[0].replace("8000", str(self.port))
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            line, shell=True, cwd=folder, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.photo, self.stop, self.answers, self.failures = photo, threading.Event(), list[int](), list[str]()
        self.clients = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def wait(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, Path(self.log.name).read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the server was not ready in {seconds} s: {Path(self.log.name).read_text()}")

    def ask(self) -> dict[str, object]:
        boundary = "xxxx"
        body = (
            (
                f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{self.photo.name}"\r\n'
                "Content-Type: image/png\r\n\r\n"
            ).encode()
            + self.photo.read_bytes()
            + f"\r\n--{boundary}--\r\n".encode()
        )
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/predict",
            body,
            {"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            found: dict[str, object] = json.load(response)
            return found

    def _ask(self) -> None:
        while not self.stop.is_set():
            try:
                self.answers.append(int(str(self.ask()["version"])))
            except OSError as error:
                self.failures.append(repr(error))
            time.sleep(0.02)

    def end(self) -> None:
        self.stop.set()
        for client in self.clients:
            if client.ident is not None:
                client.join()
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with the months of photographs, and an environment in which `lamina` is this one."""
    photos.months(tmp_path)
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / ".cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return tmp_path, environment


@pytest.mark.slow
def test_the_transcript_of_the_readme(world: tuple[Path, dict[str, str]]) -> None:
    folder, environment = world
    lines, pieces = transcript()
    python = [str(BIN / "python"), "-W", "ignore", "-c"]
    said: dict[str, str] = {}
    for line in lines[:-1]:
        done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        expected = 1 if REFUSED in line and "--force" not in line else 0
        assert done.returncode == expected, f"{line}\n{done.stdout}\n{done.stderr}"
        said[line.partition("#")[0].strip()] = done.stdout + done.stderr
    assert "4 new classes" in said["lamina learn groceries 2026-09/"]
    assert "1 new class (Watermelon) and 4 known classes again" in said["lamina learn groceries 2026-11/"]
    assert "limit broken" in said["lamina learn groceries 2026-12/"]
    assert "(forced)" in said["lamina learn groceries 2026-12/ --force"]
    ours = said["lamina predict groceries new-photos/ --top 3"]
    assert [name for name in ("Banana", "Avocado", "Pineapple", "Watermelon") if name not in ours] == []
    done = subprocess.run([*python, pieces[0]], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "Banana", done.stderr
    done = subprocess.run([*python, ADAPTERS], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "Banana", done.stderr

    server = Server(lines[-1], folder, environment, folder / "new-photos" / "000.png")
    try:
        server.wait()
        first = server.ask()
        for client in server.clients:
            client.start()
        done = subprocess.run([*python, pieces[1]], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        newest = int(str(first["version"])) + 1
        deadline = time.monotonic() + 60
        while newest not in server.answers and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
    finally:
        server.end()
    assert server.failures == []
    assert len(server.answers) > 50
    assert set(server.answers) == {first["version"], newest}
    assert ordered(server.answers, CLIENTS)


def ordered(answers: list[int], slack: int) -> bool:
    """Whether the version changes once. Answers of several clients may be noted a little out of order."""
    change = answers.index(max(answers))
    return all(version == min(answers) for version in answers[:change]) and all(
        version == max(answers) for version in answers[change + slack :]
    )


ADAPTERS = """
import json, subprocess, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel
import PIL.Image, numpy
facts, layout = (json.load(open(path)) for path in ("graph/preprocess.json", "adapters/layout.json"))
photo = PIL.Image.open("new-photos/000.png").convert("RGB").resize([facts["size"]] * 2, PIL.Image.Resampling.BILINEAR)
pixels = (numpy.float32(photo) * facts["scale"] - facts["mean"]) / facts["std"]
save_file({"0.pixel_values": torch.from_numpy(pixels).float().permute(2, 0, 1)[None].contiguous()}, "given.safetensors")
subprocess.run([sys.executable, "adapters/load.py", "given.safetensors", "found.safetensors"], check=True)
base = AutoModel.from_pretrained("adapters/base", dtype=torch.float32)
PeftModel.from_pretrained(base, "adapters/tasks/" + layout["tasks"][0]["folder"])
print(layout["labels"][int(load_file("found.safetensors")["0"].argmax())])
"""
