"""Language models, as people use them: a run on a file of instructions, its report, and what is said of input that does not
fit. Killed in any phase, a run resumed ends in the bits of the run that was never killed."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.end_to_end.conftest import Command
from tests.faults.processes import Moment, assert_same_bits, kill_all, kill_and_resume
from tests.faults.processes import lamina as in_a_process
from tests.instructions import chats, make_tokenizer
from tests.languages import OPTIONS, records, save_language
from tests.models import FEW
from tests.tiny import raw_bert

from lamina.engine.loop import Interrupted
from lamina.record import Record, read
from lamina.record import write as write_record

FIXED = ("--set=precision=fp32", "--set=threads=1", "--set=evaluation.max_new_tokens=5")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "tasks.jsonl", records())


@pytest.fixture(autouse=True)
def _nothing_left_at_work() -> Iterator[None]:
    yield
    kill_all()


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_stop_before_anything_is_saved_says_so(
    lamina: Command, model: Path, instructions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first task the model is measured on all of them, which is not saved task by task."""
    with monkeypatch.context() as patch:
        patch.setattr("lamina.engine.measure.Measure.before", interrupted)
        said = lamina(
            "run", "--data", instructions, "--backbone", model, "--method", "finetune", "--out", "run", *FIXED
        )
    assert said.code == 130
    assert "stopped before anything was saved. Begin again with: lamina resume run" in said.err
    assert lamina("resume", "run").code == 0


def interrupted(*_: object) -> None:
    raise Interrupted


def test_a_run_on_a_file_of_instructions(lamina: Command, tmp_path: Path, model: Path, instructions: Path) -> None:
    said = lamina("run", "--data", instructions, "--backbone", model, "--method", "finetune", "--out", "run", *FIXED)
    assert said.code == 0, said.err
    for task in ("film", "city", "note"):
        assert task in said.out + said.err
    record = read(tmp_path / "run")
    config = record.config
    assert config["stream"]["scenario"] == "domain"
    assert list(config["backbone"]["targets"]) == ["q", "v"]
    training = {key: config["training"][key] for key in ("epochs", "batch_size", "head_lr", "schedule")}
    assert training == {"epochs": 1, "batch_size": 8, "head_lr": None, "schedule": "constant"}
    assert config["evaluation"]["batch_size"] == 16
    assert record.matrix.total_ij.diagonal().tolist() == [5, 5, 5]
    assert record.backbone.kind == "language"
    language = record.language
    assert language is not None
    assert [total for _, total in language.zero_shot] == [5, 5, 5]
    assert len(language.perplexity) == 4
    assert len({answer.task for answer in language.predictions}) == 3
    assert all(answer.learnt is not None for answer in language.predictions)
    assert language.tokens == sum(lengths_of(instructions))
    assert language.padding_share is not None
    assert 0 <= language.padding_share < 1
    assert language.truncated == 0
    assert Record.model_validate_json(record.model_dump_json()) == record
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for answer in language.predictions:
        assert answer.prompt in page
    options = {*OPTIONS["film"], *OPTIONS["city"]}
    assert {answer.end for answer in language.predictions if answer.task != "note"} <= options
    assert "positive" in page
    assert not re.search(r"\bnan\b", said.out + page), "what is not measured is a dash"
    silent = tuple(one.model_copy(update={"before": "", "learnt": "", "end": ""}) for one in language.predictions)
    shutil.copytree("run", "silent")
    write_record(
        record.model_copy(update={"language": language.model_copy(update={"predictions": silent})}), Path("silent")
    )
    assert lamina("report", "silent", "--out", "silent.html").code == 0
    assert Path("silent.html").read_text(encoding="utf-8").count("<td>(no text)</td>") == 3 * len(silent)

    said = lamina("evaluate", "run")
    assert said.code == 0, said.err
    for number, task in enumerate(("film", "city", "note")):
        line = next(line for line in said.out.splitlines() if line.split()[:1] == [task])
        assert f"{record.matrix.accuracy_ij[-1, number]:.1%}" in line
    (tmp_path / "run" / "results.json").unlink()
    assert lamina("resume", "run").code == 0
    told = lamina.refused("run", "--data", instructions, "--backbone", model, "--tasks", 5)
    assert "--tasks 5: it splits classes, and with stream.scenario = 'domain' a task is a domain" in told
    again = read(tmp_path / "run")
    assert (again.matrix.as_dict(), again.language) == (record.matrix.as_dict(), record.language)


def lengths_of(instructions: Path) -> list[int]:
    """Tokens of each training example, its end included."""
    from lamina.data import load_tokenizer

    tokenizer = load_tokenizer(make_tokenizer(instructions.parent / "tokenizer"))
    rows = [json.loads(line) for line in instructions.read_text().splitlines()]
    texts = [(row["prompt"], f" {row['completion']}") for row in rows if row["split"] == "train"]
    return [1 + sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in pair) for pair in texts]


def test_chats_are_run_through_the_chat_template(lamina: Command, tmp_path: Path, model: Path) -> None:
    rows = [row | {"domain": f"d{k % 2}", "split": "train" if k < 8 else "test"} for k, row in enumerate(chats(12))]
    file = write(tmp_path / "chats.jsonl", rows)
    said = lamina("run", "--data", file, "--backbone", model, "--method", "color", "--out", "run", *FIXED)
    assert said.code == 0, said.err
    language = read(tmp_path / "run").language
    assert language is not None
    assert "<|turn|>user" in language.predictions[0].prompt


# -- stopping and going on --------------------------------------------------------------------------------------------


def arguments(out: Path, model: Path, instructions: Path, method: str, **settings: object) -> list[str]:
    given = {
        "method": method,
        "data.source": instructions,
        "backbone.name": model,
        "precision": "bf16",
        "threads": 1,
        "training.epochs": 3,
        "training.batch_size": 2,
        "evaluation.batch_size": 2,
        "evaluation.max_new_tokens": 5,
    }
    given |= FEW.get(method, {}) | settings
    return ["run", *(f"--set={key}={value}" for key, value in given.items()), f"--out={out}"]


@pytest.mark.parametrize("method", ["lamina", pytest.param("color", marks=pytest.mark.slow)])
def test_killed_in_every_phase_it_ends_in_the_same_bits(
    method: str, tmp_path: Path, model: Path, instructions: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    code, _, err = in_a_process(*arguments(whole, model, instructions, method))
    assert code == 0, err
    moments = [Moment(0, "begin", delay=0.05), Moment(0, "train", 4), Moment(1, "end"), Moment(2, "evaluate")]
    if method == "color":
        moments[2:2] = [Moment(0, "evaluate"), Moment(1, "train", 2, files=3)]
    kills = kill_and_resume(out, arguments(out, model, instructions, method, checkpoint_seconds=0), moments)
    assert len({kill.phase for kill in kills}) >= 2
    assert_same_bits(out, whole)
    assert read(out).language == read(whole).language


# -- input that does not fit ------------------------------------------------------------------------------------------


def film(**changed: Any) -> list[dict[str, Any]]:
    """Rows of which the fourth is changed; None takes a key away."""
    rows = records()
    rows[3] = {key: value for key, value in (rows[3] | changed).items() if value is not None}
    return rows


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"completion": None}, ["tasks.jsonl:4", "completion"]),
        ({"completion": ""}, ["tasks.jsonl:4", "completion"]),
        ({"completion": 5}, ["tasks.jsonl:4", "completion", "5"]),
        ({"prompt": ""}, ["tasks.jsonl:4", "prompt"]),
        ({"prompt": "  \n"}, ["tasks.jsonl:4", "prompt"]),
        ({"completion": "no " * 300, "options": None}, ["tasks.jsonl:4", "data.max_length", "no room for the prompt"]),
        ({"options": ["positive", "positive"], "completion": "positive"}, ["tasks.jsonl:4", "'positive'"]),
        ({"options": ["good", "bad"]}, ["tasks.jsonl:4", "option"]),
        ({"options": "positive"}, ["tasks.jsonl:4", "options"]),
        ({"split": "exam"}, ["tasks.jsonl:4", "'exam'"]),
    ],
)
def test_a_row_that_is_no_instruction(
    lamina: Command, tmp_path: Path, model: Path, changed: dict[str, Any], told: list[str]
) -> None:
    file = write(tmp_path / "tasks.jsonl", film(**changed))
    message = lamina.refused("run", "--data", file, "--backbone", model, "--out", "run", *FIXED)
    for part in told:
        assert part in message
    assert not (tmp_path / "run").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (("--method", "duallora"), ["method 'duallora' cannot adapt the language model", "Choose one of lamina,"]),
        (("--method", "prototype"), ["method 'prototype' cannot adapt the language model", "a classifier"]),
        (
            ("--method", "olora", "--classifier", "lda"),
            ["consolidation.classifier = 'lda' does not go with a language model", "'own'"],
        ),
        (("--drift", "linear"), ["drift = 'linear'", "classifier"]),
        (("--set", "consolidation.layers=2"), ["layers = 2"]),
        (("--set", "backbone.targets=[fc1]"), ["fc1", "'q'", "'k'", "'v'", "'out'", "'gate'", "'up'", "'down'"]),
        (("--set", "training.epochs=0"), ["training.epochs = 0", "greater than or equal to 1"]),
        (("--image-size", "32"), ["image_size", "do not apply"]),
        (("--set", "data.max_length=2000"), ["max_length", "2000", "96"]),
        (("--set", "data.max_length=2"), ["max_length", "2"]),
        (("--set", "evaluation.max_new_tokens=0"), ["evaluation.max_new_tokens = 0"]),
        (("--set", "evaluation.text=nosuch.txt"), ["evaluation.text = 'nosuch.txt'", "cannot be read"]),
        (("--set", "data.form=letter"), ["data.form = 'letter'", "'chat'"]),
        (("--set", "rehearsal.ratio=0"), ["rehearsal.ratio = 0"]),
        (("--set", "stream.domains=[film, nosuch]"), ["'nosuch' not found in", "whose domains are film"]),
        (("--set", "stream.domains=film"), ["stream.domains = 'film': allowed is a list [...]"]),
        (("--set", "training=3"), ["training = 3: allowed is an object {...}"]),
        (("--scenario", "class", "--tasks", "2"), ["stream.scenario = 'class'", "whole domains"]),
    ],
)
def test_settings_that_do_not_go_with_a_language_model(
    lamina: Command, tmp_path: Path, model: Path, instructions: Path, extra: tuple[str, ...], told: list[str]
) -> None:
    message = lamina.refused("run", "--data", instructions, "--backbone", model, "--out", "run", *FIXED, *extra)
    for part in told:
        assert part in message
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_chats_without_a_chat_template(lamina: Command, tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "bare")
    make_tokenizer(tmp_path / "bare", template=None)
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    file = write(tmp_path / "chats.jsonl", [row | {"domain": f"d{k % 2}"} for k, row in enumerate(chats(12))])
    message = lamina.refused("run", "--data", file, "--backbone", "bare", "--out", "run", *FIXED)
    assert "chats.jsonl:1 is a chat" in message
    assert "has no chat template" in message


def test_weights_that_cannot_be_used(lamina: Command, tmp_path: Path, model: Path, instructions: Path) -> None:
    run = ("run", "--data", instructions, "--out", "run", *FIXED, "--backbone")
    save_language("llama, untied", tmp_path / "headless")
    weights = load_file(tmp_path / "headless" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "headless" / "model.safetensors")
    assert "is a model without LM head" in lamina.refused(*run, "headless")

    shutil.copytree(model, tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    message = lamina.refused(*run, "broken")
    assert "broken" in message
    assert "NaN" in message or "finite" in message

    shutil.copytree(model, tmp_path / "mute")
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in lamina.refused(*run, "mute")
    assert not (tmp_path / "run").exists()


def test_data_of_another_kind(lamina: Command, tmp_path: Path, model: Path, instructions: Path) -> None:
    for label in (0, 1):
        (tmp_path / "photos" / f"class{label}").mkdir(parents=True)
        for k in range(4):
            Image.fromarray(np.full((8, 8, 3), 60 * k, np.uint8)).save(
                tmp_path / "photos" / f"class{label}" / f"{k}.png"
            )
    message = lamina.refused("run", "--data", "photos", "--backbone", model, "--out", "run", *FIXED)
    assert "images" in message
    assert "instructions" in message
    raw_bert().save_pretrained(tmp_path / "bert")
    make_tokenizer(tmp_path / "bert")
    message = lamina.refused("run", "--data", instructions, "--backbone", "bert", "--out", "run", *FIXED)
    assert "Choose a causal language model" in message
