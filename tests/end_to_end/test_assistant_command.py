"""A living language model from the command line: made, taught, asked, measured, refused, rolled back; and what is wrong."""

import io
import json
import sys
from pathlib import Path

import pytest
from tests.assistants import SMALL, backbone, instructions
from tests.end_to_end.conftest import Command

from lamina import runs
from lamina.engine.measure import Measure
from lamina.model import Model

SETTINGS = [f"--set={key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(lamina: Command, base: Path, tmp_path: Path) -> Path:
    """A language model that has learnt one task."""
    path = tmp_path / "assistant"
    said = lamina("create", path, "--backbone", base, "--method=olora", "--probes=2", *SETTINGS)
    assert said.code == 0, said
    assert "prompt and completion" in said.out
    said = lamina("learn", path, instructions(tmp_path / "films.jsonl"))
    assert said.code == 0, said
    assert "task 1, 'films'" in said.err
    assert "8 train" in said.err
    assert "version 1 knows 1 task" in said.out
    assert "cross-entropy" not in said.err
    return path


OPEN = ("--set=gate.task_drop=1", "--set=gate.negative_flips=1")


def test_learns_instructions_task_by_task(lamina: Command, model: Path, tmp_path: Path) -> None:
    said = lamina("learn", model, instructions(tmp_path / "books.jsonl", "book", options=None), *OPEN, "--json")
    assert said.code == 0, said
    gate = json.loads(said.out)
    assert gate["accepted"]
    assert [(change["name"], change["examples"]) for change in gate["tasks"]] == [("films", 4)]
    assert gate["calibration_after"] is None
    assert gate["milliseconds_after"] > 0
    status = lamina("status", model).out
    assert "2 tasks" in status
    assert "classes" not in status
    assert lamina("history", model, "--json").out.count("learnt") == 2
    said = lamina("evaluate", model, tmp_path / "books.jsonl")
    assert said.code == 0, said
    assert "on 4 examples" in said.out
    assert "calibration error" not in said.out
    figures = Model(model).evaluate(tmp_path / "films.jsonl").figures
    assert figures.calibration_error is None
    card = (model / "README.md").read_text()
    assert 'pipeline_tag: "text-generation"' in card
    assert "/v1/completions" in card
    assert "messages" not in card  # it was taught without the chat template
    assert "classifier" not in card
    assert "deleted" in lamina("forget", model).out
    assert "freed" in lamina("prune", model, "--keep=1").out


def test_a_refused_task_waits_and_can_be_forced(lamina: Command, model: Path, tmp_path: Path) -> None:
    lamina("configure", model, "--set=gate.new_accuracy=1", *OPEN)
    wrong = instructions(tmp_path / "wrong.jsonl", "song", options=None)
    said = lamina("learn", model, wrong, "--lr=1e-9")
    assert said.code == 1
    assert "limit broken: the new task reaches" in said.out
    assert lamina("gate", model).code == 1
    said = lamina("learn", model, wrong, "--lr=1e-9", "--force")
    assert said.code == 0, said
    assert "(forced)" in said.out
    assert "as after 'films'" in lamina("rollback", model, "films").out


def test_a_task_is_cut_to_the_size_that_is_set(
    lamina: Command, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measure, "before", lambda *_: pytest.fail("nothing reads what this would measure"))
    model = tmp_path / "cut"
    assert lamina("create", model, "--backbone", base, "--method=olora", *SETTINGS).code == 0
    sizes = ("--set=data.per_task=3", "--set=evaluation.per_task=2")
    said = lamina("learn", model, instructions(tmp_path / "films.jsonl"), *sizes)
    assert said.code == 0, said
    assert Model(model).cards[0].tasks[0].examples == {"train": 3, "val": 0, "test": 2}


def test_labelled_texts_are_learnt_through_the_template(lamina: Command, base: Path, tmp_path: Path) -> None:
    rows = ["text,label,split"]
    rows += [f"sun and rain {k},weather,{'test' if k > 5 else 'train'}" for k in range(8)]
    rows += [f"a goal by {k},sport,{'test' if k > 5 else 'train'}" for k in range(8)]
    (tmp_path / "news.csv").write_text("\n".join(rows) + "\n")
    model = tmp_path / "news-model"
    assert lamina("create", model, "--backbone", base, "--method=finetune", "--probes=1", *SETTINGS).code == 0
    said = lamina("learn", model, tmp_path / "news.csv", "--probe", tmp_path / "news.csv")
    assert said.code == 0, said
    assert "completions sport, weather" in said.err
    assert Model(model).cards[0].kept["probes"].examples == 2


def test_a_prompt_is_completed_and_options_are_ranked(
    lamina: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "The film 3 is a joy.\nGood?"
    (completion,) = Model(model).complete(prompt, max_new_tokens=5)
    said = lamina("predict", model, prompt, "--max-new-tokens=5")
    assert said.code == 0, said
    assert said.out == completion.text + "\n"
    assert completion.tokens <= 5
    found = json.loads(lamina("predict", model, "--text", prompt, "--options=yes,no", "--json").out)
    assert {one["option"] for one in found["options"]} == {"yes", "no"}
    assert found["text"] == found["options"][0]["option"]
    assert sum(one["probability"] for one in found["options"]) == pytest.approx(1, abs=1e-4)
    assert found["options"][0]["log_likelihood"] >= found["options"][1]["log_likelihood"]
    found = json.loads(lamina("predict", model, prompt, "--options=yes, sir", "--options=no", "--json").out)
    assert {one["option"] for one in found["options"]} == {"yes, sir", "no"}
    (tmp_path / "lines.jsonl").write_text(
        json.dumps({"prompt": prompt})
        + "\n\n"
        + json.dumps("one\u2028line\u0085only", ensure_ascii=False)
        + "\n"
        + json.dumps({"prompt": prompt, "options": ["yes", "no"]})
        + "\n"
        + json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
        + "\n"
    )
    one_line = prompt.replace("\n", " ")
    (tmp_path / "lines.txt").write_text(f"{one_line}\nA\u2028book\n")
    said = lamina("predict", model, "--file", tmp_path / "lines.txt", "--json", "--max-new-tokens=3")
    assert [json.loads(line)["prompt"] for line in said.out.strip().split("\n")] == [one_line, "A\u2028book"]
    lines = [
        json.loads(line)
        for line in lamina("predict", model, "--file", tmp_path / "lines.jsonl", "--json", "--max-new-tokens=5")
        .out.strip()
        .split("\n")
    ]
    assert lines[0]["text"] == completion.text
    assert lines.pop(1)["prompt"] == "one\u2028line\u0085only"
    assert "options" in lines[1]
    assert lines[2]["finish_reason"] in ("stop", "length")
    chat = json.loads(lamina("predict", model, "Hi", "--chat", "--json", "--max-new-tokens=5").out)
    assert chat["text"] == lines[2]["text"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{one_line}\n".encode())))
    assert lamina("predict", model, "-", "--json").code == 0
    long = "A sentence with a full stop. " * 12 + "And more"  # it is no path, though a path could have this suffix
    assert json.loads(lamina("predict", model, long, "--json", "--max-new-tokens=1").out)["prompt"] == long
    for text in (tmp_path / "lines.txt", "-"):  # words, not a file and not standard input
        assert json.loads(lamina("predict", model, "--text", text, "--json").out)["prompt"] == str(text)


def test_what_is_wrong_is_named(
    lamina: Command, model: Path, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing to predict" in lamina.refused("predict", model)
    assert "--max-files is for classifiers" in lamina.refused("serve", model, "--max-files=3")
    assert "yes" in lamina.refused("predict", model, "x", "--options=yes,yes")
    assert "--top" in lamina.refused("predict", model, "x", "--top=3")
    assert "does not exist" in lamina.refused("predict", model, "--file", tmp_path / "gone.txt")
    (tmp_path / "lines.txt").write_text("a joy\n\nA book\n")
    assert "--file" in lamina.refused("predict", model, tmp_path / "lines.txt")
    said = lamina("predict", model, "--file", tmp_path / "lines.txt", "--max-new-tokens=1")
    assert "1 of 3 lines are blank and left out" in said.err
    (tmp_path / "lines.txt").write_bytes(b"a joy\r\nA book\r\n")
    said = lamina("predict", model, "--file", tmp_path / "lines.txt", "--json", "--max-new-tokens=1")
    assert [json.loads(line)["prompt"] for line in said.out.strip().split("\n")] == ["a joy", "A book"]
    (tmp_path / "more.jsonl").write_text('{"prompt": "x", "answer": "y", "id": 3}\n')
    said = lamina("predict", model, "--file", tmp_path / "more.jsonl", "--max-new-tokens=1")
    assert "not used: answer, id" in said.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a joy\na joy \xff\n")))
    assert "line 2 of standard input is not UTF-8 text" in lamina.refused("predict", model, "-")
    said = lamina("predict", model, "a joy " * 400)
    assert said.code == 2  # none could be read
    assert "256" in said.out + said.err
    (tmp_path / "some.jsonl").write_text(
        f'{{"prompt": "a joy", "options": ["c", "d"]}}\n{{"prompt": "{"joy " * 400}"}}\n'
    )
    said = lamina("predict", model, "--file", tmp_path / "some.jsonl", "--options=yes,no")
    assert said.code == 1
    assert "1 of 2 rows have options of their own, in place of --options" in said.err
    assert "1 of 2 prompts could not be read" in said.err
    assert "(cut after 1 tokens" in lamina("predict", model, "a joy", "--max-new-tokens=1").err
    assert "--options has the single option 'yes'" in lamina.refused("predict", model, "x", "--options=yes")
    assert "max_new_tokens is 9999; allowed are 1 to 256" in lamina.refused(
        "predict", model, "x", "--max-new-tokens=9999"
    )
    (tmp_path / "both.jsonl").write_text('{"prompt": "x", "messages": [{"role": "user", "content": "Hi"}]}\n')
    assert "both.jsonl line 1 has messages and a prompt" in lamina.refused(
        "predict", model, "--file", tmp_path / "both.jsonl"
    )
    assert "the method of" in lamina.refused("learn", model, tmp_path / "lines.txt", "--set=method.name=sora")
    assert "is a backbone, not a model: `lamina create MODEL" in lamina.refused("predict", base, "x")
    assert "is a lamina model, not a backbone" in lamina.refused(
        "run", "--backbone", model, "--data", tmp_path / "both.jsonl"
    )
    told = lamina.refused("create", tmp_path / "never", "--backbone", base, "--method=duallora")
    assert "method 'duallora' cannot adapt the language model" in told
    assert not (tmp_path / "never").exists()
    assert "gate.calibration_error" in lamina.refused("configure", model, "--set=gate.calibration_error=0.1")
    assert "gate.calibration_error" in lamina.refused(
        "create", tmp_path / "other", "--backbone", base, "--method=olora", "--set=gate.calibration_error=0.1"
    )
    bare = backbone(tmp_path / "bare", template=None)
    assert lamina("create", tmp_path / "bare-model", "--backbone", bare, "--method=olora", *SETTINGS).code == 0
    assert lamina("learn", tmp_path / "bare-model", instructions(tmp_path / "films.jsonl")).code == 0
    assert "chat template" in lamina.refused("predict", tmp_path / "bare-model", "Hi", "--chat")


def test_a_run_opens_as_a_model_and_goes_on(lamina: Command, base: Path, tmp_path: Path) -> None:
    first = instructions(tmp_path / "a.jsonl", "film", domain="films").read_text()
    second = instructions(tmp_path / "b.jsonl", "book", options=None, domain="books").read_text()
    (tmp_path / "both.jsonl").write_text(first + second)
    given = {**SMALL, "method.name": "olora", "backbone.name": str(base), "data.source": str(tmp_path / "both.jsonl")}
    runs.create(
        runs.load_config(None, sorted(given.items(), key=lambda item: item[0] != "method.name")), tmp_path / "run"
    )
    record = runs.read_record(tmp_path / "run")
    said = lamina("create", tmp_path / "model", "--from-run", tmp_path / "run", "--probes=2")
    assert said.code == 0, said
    model = Model(tmp_path / "model")
    assert [task.name for card in model.cards for task in card.tasks] == ["films", "books"]
    figures = model.evaluate(tmp_path / "both.jsonl").figures
    right = {
        word: sum(one.correct for name, one in figures.classes.items() if word in name) for word in ("films", "books")
    }
    assert [right["films"] / 4, right["books"] / 4] == record.matrix.accuracy_ij[-1].tolist()
    rows = lamina("status", tmp_path / "model").out.splitlines()
    for number, name in enumerate(("films", "books")):
        assert f"{100 * record.matrix.accuracy_ij[number, number]:.1f}%" in next(r for r in rows if r.startswith(name))
    assert "is a run, not a model" in lamina.refused("predict", tmp_path / "run", "x")
    assert lamina("learn", tmp_path / "model", instructions(tmp_path / "songs.jsonl", "song"), "--force").code == 0
