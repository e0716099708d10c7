"""Which backbone takes which data, and what a run makes of labelled texts for a language model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.instructions import make_tokenizer, rows

from lamina import cli
from lamina.config import fingerprint
from lamina.data import InstructionTable
from lamina.engine.loop import Event
from lamina.errors import ConfigError
from lamina.methods import METHODS
from lamina.runs.setup import load_config, load_data
from lamina.types import LabelledData


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def backbone(kind: str, folder: Path, positions: int = 64) -> Any:
    return SimpleNamespace(kind=kind, name="tiny", image=None, tokenizer=folder, positions=positions, vocabulary=320)


def load(source: Path, kind: str, folder: Path, told: list[str], **settings: Any) -> LabelledData:
    overrides = [(key.replace("__", "."), value) for key, value in settings.items()]

    def watch(_: Any, event: Event) -> None:
        told.append(event.note or "")

    return load_data(load_config(None, [("data.source", str(source)), *overrides]), backbone(kind, folder), watch)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    path = tmp_path / "films.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "texts.csv"
    path.write_text(
        "text,label,answer\n" + "".join(f"film {k},{k % 2},{'no' if k % 2 else 'yes'}\n" for k in range(12))
    )
    return path


def test_a_language_model_takes_instructions(films: Path, folder: Path) -> None:
    told: list[str] = []
    data = load(films, "language", folder, told)
    assert isinstance(data.table, InstructionTable)
    assert (data.kind, data.table.max_length, told) == ("instructions", 64, [])
    load(films, "language", folder, told, data__max_length=20)
    assert told == ["truncated: the middle of 12 prompts (train 8, test 4)"]
    chat = load(films, "language", folder, told, data__form="chat")
    assert isinstance(chat.table, InstructionTable)
    assert chat.table.read(0).prompt.endswith("<|turn|>assistant\n")


def test_a_language_model_takes_labelled_texts_by_the_template(labelled: Path, folder: Path) -> None:
    told: list[str] = []
    data = load(labelled, "language", folder, told, data__template="Is {text} good? {options}:")
    assert isinstance(data.table, InstructionTable)
    assert data.class_names == ("0", "1")
    assert data.table.read(1).prompt == "Is film 1 good? yes, no:"
    assert data.table.questions(np.array([0, 1]))[1].tolist() == [0, 1]
    assert told[0].startswith("layout: CSV file: texts in column 'text', labels in 'label'; ")
    assert told[0].endswith(
        "prompts by the template 'Is {text} good? {options}:', completions from the column of answers"
    )
    with pytest.raises(ConfigError, match=r"data.template has the field {label}"):
        load(labelled, "language", folder, told, data__template="{label}")


def test_encoders_refuse_instructions(films: Path, labelled: Path, folder: Path) -> None:
    told = r"holds instructions, and backbone 'tiny' takes texts. Choose a causal language model as the backbone, or labelled"
    with pytest.raises(ConfigError, match=told):
        load(films, "text", folder, [])
    with pytest.raises(ConfigError, match="holds images, and backbone 'tiny' takes instructions and labelled texts"):
        load(Path("digits"), "language", folder, [])
    data = load(labelled, "text", folder, [], data__max_length=16)
    assert data.kind == "text"


def test_the_length_of_texts_stays_the_default_of_encoders() -> None:
    def print_of(**data: Any) -> str:
        config = load_config(None, [(f"data.{key}", value) for key, value in data.items()])
        return fingerprint(config, METHODS[config.method["name"]].config_type)

    config = load_config(None, [])
    assert (config.data.max_length, config.data.text_length) == (None, 128)
    assert print_of(max_length=128) == print_of()
    assert print_of(max_length=64) != print_of()


def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code of `lamina data check`, and what it says."""
    monkeypatch.setattr(sys, "argv", ["lamina", "data", "check", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


def test_data_check(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = check(monkeypatch, capsys, str(films), "--min-per-class=1")
    assert code == 0
    assert told.startswith("films: 12 instructions, 2 classes, 1 domain\n")
    assert "\noptions: 2 in each row\nlongest: prompt 38 characters (films.jsonl:12), completion 8 " in told
    twice = rows(12, domain="x")
    twice[-1]["prompt"] = twice[0]["prompt"]
    file = tmp_path / "twice.jsonl"
    other = [{**row, "prompt": f"Other: {row['prompt']}"} for row in rows(3, domain="y")]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*twice, *other]))
    code, told = check(monkeypatch, capsys, str(file), "--kind=instructions")
    assert code == 1
    assert "\n- 1 prompt in more than one split: tests will look too good\n" in told
    assert "\n  twice.jsonl:1 [train, x: positive, x]\n    = twice.jsonl:12 [test, x: negative, x]\n" in told
    assert "\ndomain    train     test\nx             8        4\ny             2        1\n" in told
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt"')
    code, told = check(monkeypatch, capsys, str(file))
    assert code == 2
    assert "twice.jsonl:2 is not valid JSON" in told
