"""What the tests of the command share: a cache of their own, the command in this process, and small data to give it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamina import cli

QUICK = (
    "--image-size=32",
    "--epochs=1",
    *("--set=precision=fp32", "--set=threads=1", "--set=training.batch_size=8", "--set=evaluation.batch_size=32"),
)
"""Settings of runs that only have to finish."""
LIGHT = (*QUICK, "--set=method.random_features=64")
"""The same for the default method, which otherwise solves linear systems in thousands of unknowns."""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images go nowhere near the user's; nothing is looked for on the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("COLUMNS", "200")
        yield


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """The `lamina` command, in this process: its start-up is paid once for all tests."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> Said:
        self.monkeypatch.setattr(sys, "argv", ["lamina", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self.capsys.readouterr()
        assert "Traceback" not in out + err
        return Said(int(ended.value.code or 0), out, err)

    def refused(self, *arguments: object) -> str:
        """The one message of a command that must fail with code 2."""
        said = self(*arguments)
        assert said.code == 2, said
        message = said.err[said.err.index("error: ") :]
        assert message.count("error: ") == 1
        return message


@pytest.fixture
def lamina(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def paint(folder: Path, classes: int = 4, images: int = 8, suffix: str = ".png") -> Path:
    """Class folders `class0`, `class1`, ... of noise around a colour of the class."""
    draw = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        colour = draw.integers(40, 216, 3)
        for i in range(images):
            pixels = np.clip(colour + draw.normal(0, 30, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}{suffix}")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of whole images; tests copy before they damage."""
    return paint(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A finished run on `photos`, in two tasks."""
    from lamina import runs

    out = tmp_path_factory.mktemp("runs") / "finished"
    settings = [("data.source", str(photos)), ("stream.tasks", 2), ("backbone.image_size", 32), ("threads", 1)]
    settings += [("training.epochs", 1), ("training.batch_size", 8), ("precision", "fp32"), ("checkpoint_seconds", 0)]
    runs.create(runs.load_config(None, settings), out)
    return out
