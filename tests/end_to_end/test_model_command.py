"""A model from the command line: made, taught, measured, refused, rolled back; and what is said about wrong input."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from tests.end_to_end.conftest import Command
from tests.models import CLASSES, SMALL, backbone, images, png
from tests.tiny import raw_bert, raw_vit

from lamina.model import Model

SETTINGS = [f"--set={key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def model(lamina: Command, base: Path, tmp_path: Path) -> Path:
    """A model that has learnt three classes."""
    data = images(tmp_path / "first.parquet", CLASSES[:3])
    path = tmp_path / "animals"
    said = lamina("create", path, "--backbone", base, "--method=finetune", "--probes=3", *SETTINGS)
    assert said.code == 0, said
    assert f"Next: lamina learn {path} DATA" in said.out
    assert Model(path).facts.base.parameters == sum(p.numel() for p in raw_vit(blocks=2).parameters())
    said = lamina("learn", path, data)
    assert said.code == 0, said
    assert "3 new classes (ant, bee, cat)" in said.err
    assert "version 1 knows 3 classes" in said.out
    return path


def photo(folder: Path, name: str = "photo.png") -> Path:
    import numpy as np

    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(png(np.full((20, 20, 3), 99, np.uint8)))
    return folder / name


def test_learns_what_is_new_and_says_so(lamina: Command, model: Path, tmp_path: Path) -> None:
    both = images(tmp_path / "second.parquet", CLASSES[2:5], seed=3)
    said = lamina(
        "learn", model, both, "--name", "autumn", "--set=gate.task_drop=1", "--set=gate.negative_flips=1", "--json"
    )
    assert said.code == 0, said
    assert "2 new classes (dog, eel) and 1 known class again (cat)" in said.err
    gate = json.loads(said.out)
    assert gate["accepted"]
    assert [change["name"] for change in gate["tasks"]] == ["first"]
    assert gate["tasks"][0]["examples"] == 9
    assert lamina("status", model).out.count("autumn") == 1
    events = [json.loads(line)["event"] for line in lamina("history", model, "--json").out.splitlines()]
    assert events == ["created", "learnt", "learnt"]
    assert "gate.task_drop: 0.05 -> 0.5" in lamina("configure", model, "--set=gate.task_drop=0.5").out
    assert "task_drop: 0.5" in lamina("configure", model).out
    assert "freed" in lamina("prune", model, "--keep=1").out
    assert "was pruned" in lamina.refused("rollback", model, "first")
    card = (model / "README.md").read_text()
    assert "| autumn |" in card
    assert 'pipeline_tag: "image-classification"' in card


def test_a_refused_task_waits_and_can_be_forced(lamina: Command, model: Path, tmp_path: Path) -> None:
    lamina("configure", model, "--set=gate.new_accuracy=1", "--set=gate.task_drop=1", "--set=gate.negative_flips=1")
    wrong = images(tmp_path / "wrong.parquet", CLASSES[:3], seed=5, swapped=True)
    before = {
        path: path.read_bytes()
        for path in model.rglob("*")
        if path.is_file() and path.name not in ("events.jsonl", "lock")
    }
    said = lamina("learn", model, wrong, "--set=training.lr=1e-9", "--set=training.head_lr=1e-9")
    assert said.code == 1
    assert "limit broken: the new task reaches" in said.out
    assert all(path.read_bytes() == content for path, content in before.items())
    assert lamina("gate", model).code == 1
    assert "the gate refused" in lamina("status", model).out
    other = images(tmp_path / "other.parquet", CLASSES[3:], seed=6)
    assert "--discard" in lamina.refused("learn", model, other)
    said = lamina("learn", model, wrong, "--set=training.lr=1e-9", "--set=training.head_lr=1e-9", "--force")
    assert said.code == 0, said
    assert "(forced)" in said.out
    assert Model(model).cards[-1].forced
    assert "forced" in lamina("status", model).out
    said = lamina("rollback", model, "first")
    assert "as after 'first'" in said.out
    assert Model(model).version == 3


def test_predicts_files_folders_and_standard_input(
    lamina: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = photo(tmp_path / "new")
    photo(tmp_path / "new" / "deeper", "other.png")
    said = lamina("predict", model, tmp_path / "new", "--top=3", "--format=json")
    assert said.code == 0, said
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [Path(line["input"]).name for line in lines] == ["other.png", "photo.png"]
    assert lines[0]["top"][0]["class"] == lines[0]["class"]
    assert sum(guess["probability"] for guess in lines[0]["top"]) == pytest.approx(1, abs=1e-4)
    (tmp_path / "new" / "broken.jpg").write_bytes(b"no image")
    said = lamina("predict", model, tmp_path / "new", "--format=csv")
    assert said.code == 1
    rows = said.out.splitlines()
    assert rows[0] == "input,rank,class,probability,task,error"
    assert len(rows) == 4
    assert "broken.jpg" in rows[1]
    assert "1 of 3 inputs could not be read" in said.err
    assert lamina("predict", model, tmp_path / "new" / "broken.jpg").code == 2
    for given in (one.read_bytes(), f"{one}\n".encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        said = lamina("predict", model, "-")
        assert said.code == 0, said
        assert "first" in said.out
    assert "does not exist" in lamina.refused("predict", model, tmp_path / "gone.jpg")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in lamina.refused("predict", model, tmp_path / "empty")
    assert "takes images" in lamina.refused("predict", model, "--text", "hello")
    assert "nothing to predict" in lamina.refused("predict", model)


def test_measures_labelled_data(lamina: Command, model: Path, tmp_path: Path) -> None:
    data = images(tmp_path / "more.parquet", CLASSES[1:4], seed=8)
    said = lamina("evaluate", model, data)
    assert said.code == 0, said
    assert "not measured, since the model does not know them: dog" in said.out
    assert "on 8 examples" in said.out
    assert "name the data" in lamina.refused("evaluate", model)
    assert "no example of a class" in lamina.refused("evaluate", model, images(tmp_path / "no.parquet", CLASSES[4:]))


def test_a_probe_measures_what_no_probe_was_kept_of(lamina: Command, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    lamina("create", path, "--backbone", base, "--method=finetune", *SETTINGS)
    first, second = (images(tmp_path / f"{n}.parquet", part) for n, part in enumerate((CLASSES[:3], CLASSES[3:])))
    lamina("learn", path, first)
    loose = ("--set=gate.task_drop=1", "--set=gate.negative_flips=1")
    said = lamina("learn", path, second, "--probe", first, "--json", *loose)
    assert said.code == 0, said
    gate = json.loads(said.out)
    assert [(change["name"], change["examples"]) for change in gate["tasks"]] == [("probe 0.parquet", 12)]
    other = tmp_path / "other"
    lamina("create", other, "--backbone", base, "--method=finetune", *SETTINGS)
    lamina("learn", other, first)
    unknown = images(tmp_path / "unknown.parquet", ("fox",))
    told = lamina.refused("learn", other, second, "--probe", unknown)
    assert "no example of a class that the model knows" in told


def test_texts(lamina: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "up", "down", "left", "right", "go", "now"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    raw_bert(vocabulary=len(words)).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    rows = [
        f"go {way} now {extra},{way}"
        for way in ("up", "down", "left")
        for extra in ("", "go", "now", "go now", "now now")
    ]
    (tmp_path / "ways.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    quick = [one for one in SETTINGS if "image_size" not in one]
    path = tmp_path / "model"
    made = lamina("create", path, "--backbone", tmp_path / "bert", "--probes=2", "--set=data.max_length=16", *quick)
    assert made.code == 0, made
    said = lamina("learn", path, tmp_path / "ways.csv")
    assert said.code == 0, said
    said = lamina("predict", path, "--text", "go up now", "--text", " ", "--format=json")
    assert said.code == 1
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert lines[0]["class"] in ("up", "down", "left")
    assert lines[1] == {"input": " ", "error": "an empty text"}
    (tmp_path / "new.jsonl").write_text('{"text": "go left"}\n"go down"\n')
    assert len(lamina("predict", path, tmp_path / "new.jsonl", "--format=json").out.splitlines()) == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"go left\n\ngo up\n")))
    assert len(lamina("predict", path, "-", "--format=json").out.splitlines()) == 2
    (tmp_path / "wrong.csv").write_text("words\nup\n")
    assert "has no column `text`" in lamina.refused("predict", path, tmp_path / "wrong.csv")
    (tmp_path / "more.csv").write_text(
        "text,label\n" + "\n".join(f"go right {way},right" for way in ("up", "now", "go")) + "\n"
    )
    loose = ("--set=gate.task_drop=1", "--set=gate.negative_flips=1")
    said = lamina("learn", path, tmp_path / "more.csv", *loose, "--json")
    assert said.code == 0, said
    assert json.loads(said.out)["tasks"][0]["examples"] == 3


def test_probabilities_of_lda_are_tempered(lamina: Command, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    data = images(tmp_path / "a.parquet", CLASSES[:3], train=5, noise=90)
    lamina("create", path, "--backbone", base, "--method=fsa", *SETTINGS)
    assert lamina("learn", path, data).code == 0
    model = Model(path)
    assert model.cards[-1].temperature > 1.2
    predictor = model.predictor()
    batch, _ = predictor.read([photo(tmp_path / "p").read_bytes()])
    assert batch is not None
    plain = predictor.scores(batch).softmax(1)
    tempered = predictor.predictions(batch)[0]
    assert tempered.label == predictor.labels[int(plain.argmax())]
    assert tempered.probability < float(plain.max())


def test_an_embedded_backbone_moves_with_the_model(lamina: Command, base: Path, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "whole"
    assert lamina("create", path, "--backbone", base, "--embed-base", "--method=finetune", *SETTINGS).code == 0
    data = images(tmp_path / "a.parquet", CLASSES[:2])
    assert lamina("learn", path, data).code == 0
    os.rename(path, tmp_path / "elsewhere")
    os.rename(base, tmp_path / "hidden")
    try:
        assert lamina("predict", tmp_path / "elsewhere", photo(tmp_path / "p")).code == 0
        assert str(base) in lamina.refused("predict", model, photo(tmp_path / "p"))
        assert lamina("configure", model, "--backbone", tmp_path / "hidden").code == 0
        assert lamina("predict", model, photo(tmp_path / "p")).code == 0
    finally:
        os.rename(tmp_path / "hidden", base)
    other = backbone(tmp_path / "other")
    weights = other / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-4] ^= 1
    weights.write_bytes(raw)
    assert "are not those of this model" in lamina.refused("configure", model, "--backbone", other)


def test_what_is_wrong_is_named(lamina: Command, model: Path, base: Path, tmp_path: Path) -> None:
    data = images(tmp_path / "more.parquet", CLASSES[3:])
    assert "is a model already" in lamina.refused("create", model)
    assert "is not a model" in lamina.refused("status", tmp_path / "nothing")
    assert "is not a model" in lamina.refused("learn", tmp_path, data)
    assert "already" in lamina.refused("learn", model, data, "--name=first")
    assert "no class 'yak'" in lamina.refused("learn", model, data, "--class=yak")
    assert "no domain 'sea'" in lamina.refused("learn", model, data, "--domain=sea")
    told = lamina.refused("configure", model, "--set=consolidation.classifier=lda")
    assert "consolidation.classifier = 'lda': the weights" in told
    assert "method.rank = 3: the weights" in lamina.refused("learn", model, data, "--set=method.rank=3")
    assert "no such setting" in lamina.refused("learn", model, data, "--set=gate.tusk_drop=3")
    assert "never learnt a task 'spring'" in lamina.refused("rollback", model, "spring")
    assert "--all" in lamina.refused("rollback", model)
    assert "no stream in advance" in lamina.refused("create", tmp_path / "m", "--set=stream.tasks=3")
    assert "learnt no task yet" in lamina.refused("predict", fresh(lamina, base, tmp_path), photo(tmp_path / "q"))
    (tmp_path / "inside").mkdir()
    inside = tmp_path / "inside" / "model"
    lamina("create", inside, "--backbone", base, *SETTINGS)
    assert "lies inside the data" in lamina.refused("learn", inside, tmp_path / "inside")
    content = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(content | {"format": 99}))
    assert "damaged" in lamina.refused("status", model)


def fresh(lamina: Command, base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "fresh"
    assert lamina("create", path, "--backbone", base, *SETTINGS).code == 0
    return path


def test_kept_examples_can_be_deleted(lamina: Command, model: Path, tmp_path: Path) -> None:
    assert list(model.glob("tasks/*/probes.safetensors"))
    said = lamina("forget", model, "first")
    assert "deleted" in said.out
    assert not list(model.glob("tasks/*/probes.safetensors"))
    data = images(tmp_path / "more.parquet", CLASSES[3:])
    said = lamina("learn", model, data)
    assert said.code == 0, said
    assert "not measured, since no probes of them are kept: first" in said.out
