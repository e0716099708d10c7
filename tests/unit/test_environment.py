"""The environment of a run: decided once, written and read by its types."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from lamina.config import RunConfig
from lamina.errors import RunError
from lamina.runs.environment import Environment


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def decided(**settings: object) -> Environment:
    return Environment.decide(RunConfig(precision="fp32", **settings), "cpu", 64)


def test_it_is_read_back():
    environment = decided(threads=3)
    assert Environment.from_json(environment.to_json(), Path("x")) == environment
    assert (environment.device, environment.gpu, environment.precision, environment.threads) == ("cpu", None, "fp32", 3)
    assert type(environment.torch) is str


@pytest.mark.parametrize(
    ("settings", "threads"), [({}, 4), ({"jobs": 2}, 2), ({"jobs": 9}, 1), ({"threads": 3, "jobs": 2}, 3)]
)
def test_threads_are_shared_out_among_the_jobs(settings: dict[str, int], threads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.runs.environment.DEFAULT_THREADS", 4)
    for _ in range(2):  # an earlier run of the process changes nothing
        assert decided(**settings).threads == threads


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / ".git").exists() or shutil.which("git") is None, reason="no checkout of git"
)
def test_a_checkout_is_known_by_its_commit():
    commit = decided().commit
    assert commit is not None
    assert re.match(r"[0-9a-f]{7}", commit) or "-g" in commit


def test_other_content_is_refused():
    content = decided().to_json()
    for changes in ({"threads": "1"}, {"threads": True}, {"threads": 0}, {"device": "tpu"}, {"more": 1}, {"cpu": None}):
        with pytest.raises(RunError, match=rf"there.json is damaged: {next(iter(changes))} = "):
            Environment.from_json(content | changes, Path("there.json"))
    with pytest.raises(RunError, match=r"started = .*field required"):
        Environment.from_json({k: v for k, v in content.items() if k != "started"}, Path("there.json"))
