"""Two processes come to what one comes to, within the order of summation, with every method."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conformance import together
from tests.conformance.test_speed import distance

from lamina.engine import checkpoint


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes came to, all cases in one start."""
    out = tmp_path_factory.mktemp("together")
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(Path(together.__file__)), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", together.CASES)
def test_two_processes_are_as_one(case: str, by_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "fsync", lambda _: None)
    loop = together.loop_of(case, tmp_path)
    loop.run()
    wanted, found = together.end_of(loop), load_file(by_two / f"{case}.safetensors")
    assert wanted.keys() == found.keys()
    assert torch.equal(found.pop("matrix"), wanted.pop("matrix"))
    far = {part: distance(found[part], value) for part, value in wanted.items()}
    most = 0.02 if "bfloat16" in case else 1e-4  # a batch cut otherwise rounds otherwise
    assert {part: value for part, value in far.items() if value > most} == {}
