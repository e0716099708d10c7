"""The server keeps to its own description: schemathesis makes requests from /openapi.json, valid ones and invalid ones."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.processes import kill_all
from tests.models import backbone
from tests.serving import Server, learnt

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    found = Server(learnt(folder, backbone(folder / "vit"), tasks=1))
    yield found
    found.stop()
    kill_all()


def test_the_server_keeps_to_its_description(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{server.port}/openapi.json"]
    command += ["--max-examples=15", "--phases=examples,coverage,fuzzing", "--seed=1", "--no-color", "--workers=1"]
    # Random bytes are a valid body by the description, and no image; a request with too many files is refused with 413, which
    # schemathesis does not count as a refusal of invalid data.
    command += ["--exclude-checks=positive_data_acceptance,negative_data_rejection"]
    command += ["--generation-database=none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None
    assert int(generated[1]) > 50
    assert "Traceback" not in server.log
