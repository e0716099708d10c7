"""docs/from-peft.md: its script, its lines of lamina and its settings, as they stand there."""

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.conftest import Command
from tests.unit.export.language_worlds import base, instructions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-peft.md"
TEXT = PAGE.read_text(encoding="utf-8")
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCRIPT, PYTHON, MERGING = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = re.findall(r"^    (lamina .*)$", TEXT, flags=re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in place of the one on the hub, and the data of the page."""
    monkeypatch.chdir(tmp_path)
    base("llama", tmp_path / "tiny", attention_dropout=0.0)
    instructions(tmp_path / "data")
    return tmp_path


def run(block: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "block"}
    with warnings.catch_warnings(action="ignore"):  # of peft
        few = block.replace('"method.rank": 8,', '"method.rank": 8, "method.random_features": 64,')
        exec(compile(few.replace(HUB, "tiny"), "page", "exec"), scope)
    return scope


def test_every_block_and_command_runs(place: Path, lamina: Command, capsys: pytest.CaptureFixture[str]):
    run(SCRIPT)
    assert capsys.readouterr().out.count("after ") == 3
    assert {"adapter-reviews", "adapter-towns"} <= {path.name for path in place.iterdir()}
    record = run(PYTHON)["record"]
    assert record.matrix.accuracy_ij.shape == (2, 2)
    assert (place / "two-in-python-tasks" / "base").is_dir()
    run(MERGING)
    quick = ["--set=threads=1", "--set=precision=fp32"]
    for line in COMMANDS:
        words = shlex.split(line.replace(HUB, "tiny"))[1:]
        few = ["--set=method.random_features=64"] if "lamina" in words[1:] else []
        said = lamina(*words, *(quick + few if words[0] == "run" else []))
        assert said.code == 0, (line, said)
    assert {"two-tasks", "goes-on-merged"} <= {path.name for path in place.iterdir()}
    assert len(SCRIPT.splitlines()) > 3 * len(PYTHON.splitlines())


def test_its_settings_exist():
    from lamina import runs
    from lamina.backbones import LANGUAGE_ROLES
    from lamina.methods.taskarithmetic import TaskArithmeticConfig

    config = runs.load_config(None, [("method", "lamina")]).model_dump()
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", TEXT[TEXT.index("## Which setting") :], flags=re.MULTILINE)
    keys = {key for _, ours in rows for key in re.findall(r"`((?:training|data|backbone|method)\.\w+)", ours)}
    assert len(keys) > 10
    merging = TaskArithmeticConfig.model_fields
    for key in keys:
        section, _, name = key.partition(".")
        assert name in config[section] or (section == "method" and name in merging), key
    assert ", ".join(LANGUAGE_ROLES) in TEXT
