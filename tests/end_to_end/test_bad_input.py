"""What is wrong is said in one message, with exit code 2 and no traceback: the thing, its value, what is allowed, and
what to do."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.end_to_end.conftest import LIGHT, QUICK, Command, paint
from tests.faults.processes import LEARNT, Moment, copy_unfinished, finish, halt_at, kill_all, newest, small_run, start
from tests.tiny import raw_vit

DIGITS = ("run", "--data", "digits", "--out", "run", *QUICK)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_a_file_with_several_errors_names_each_with_its_line(lamina: Command, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nmethod: inflra\ntraining:\n  lr: -1\n  epoch: 3\nsteam:\n  tasks: 2\n")
    message = lamina.refused("run", "run.yaml", "--out", "run")
    assert "4 errors in run.yaml" in message
    assert "method.name = 'inflra'" in message
    assert "Did you mean 'inflora'?" in message
    assert "line 4: training.lr = -1: input should be greater than 0" in message
    assert "line 5: training.epoch = 3" in message
    assert "Did you mean 'epochs'?" in message
    assert "line 6: steam" in message
    assert "Did you mean 'stream'?" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there(lamina: Command, tmp_path: Path) -> None:
    message = lamina.refused(*DIGITS, "--set=device=cuda")
    assert "device = 'cuda': PyTorch finds no CUDA device here" in message
    assert "device=auto" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n", "must hold keys and values, not a list"),
        ("training: [\n", "not YAML"),
        ("1: 2\n", "line 1: 1 = 1: keys should be strings"),
        ("method:\n  5: 1\n", "line 2: method.5 = 5: keys should be strings"),
        ("method: [a]\n", "must be a name, or a name and settings"),
        ("training: 5\n", "training = 5"),
    ],
)
def test_a_file_of_another_form(lamina: Command, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    message = lamina.refused("run", "run.yaml", "--out", "run")
    assert told in message
    assert "run.yaml" in message


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("nonsense", ["--set 'nonsense'", "key=value", "--set training.lr=0.001"]),
        ("method.rank=0", ["method.rank = 0", "greater than or equal to 1"]),
        ("method.rnak=3", ["method.rnak = 3", "Did you mean 'rank'?"]),
        ("method=finetun", ["'finetun'", "inflora, finetune", "Did you mean 'finetune'?"]),
        ("training.lr=.inf", ["training.lr = inf", "finite"]),
        ("training.schedule=cosin", ["'cosin'", "'quarter-cosine'", "Did you mean 'cosine'?"]),
        ("rehearsal.per_class=-1", ["rehearsal.per_class = -1", "greater than or equal to 0"]),
        ("jobs=2", ["jobs = 2", "'finetune'", "cannot be trained in parallel", "lamina, taskarithmetic, color"]),
        ("threads=100000", ["threads = 100000", "less than or equal to"]),
        ("threads=1024", ["threads = 1024: this machine has", f"Allowed are 1 to {4 * (os.cpu_count() or 1)}"]),
        ("method.rank=1000000000", ["method.rank = 1000000000", "are 192 wide. Allowed are 1 to 192"]),
        ("backbone.image_size=80000", ["backbone.image_size = 80000: a batch of 8", "this machine has", "At most"]),
        (
            "consolidation.random_features=10000000000000",
            ["random_features = 10000000000000", "GB", "Allowed are 1 to"],
        ),
        ("consolidation.class_covariance_rank=10000", ["class_covariance_rank = 10000", "Allowed are 0 to 192"]),
        ("training.lr=1e300", ["training.lr = 1e+300", "less than or equal to 1000"]),
        ("consolidation.head=lda", ["consolidation.head = 'lda'", "now called consolidation.classifier"]),
        ("stream.tasks=11", ["stream.tasks = 11", "'digits' has 10 classes", "1 to 10"]),
        ("stream.scenario=domain", ["domain", "single domain", "'digits'"]),
        ("stream.scenario=mixed", ["stream.plan"]),
        ("evaluation.split=val", ["evaluation.split = 'val'", "--set stream.validation=0.2"]),
        ("backbone.blocks=[99]", ["blocks 0 to 8", "[99]"]),
        ("backbone.image_size=33", ["33", "multiple of the patch size 8"]),
        ("backbone.name=nosuch", ["no backbone 'nosuch'", "'nano'"]),
        ("data.source=nosuch", ["nosuch does not exist", "a folder of class folders"]),
        ("data.cache=/proc/nowhere", ["/proc/nowhere", "--set data.cache=FOLDER"]),
    ],
)
def test_a_setting_that_cannot_be(lamina: Command, tmp_path: Path, setting: str, told: list[str]) -> None:
    method = ["--method=finetune"] if setting.startswith(("jobs", "consolidation.")) else []
    extra = ["--classifier=ridge"] if "random_features" in setting else []
    message = lamina.refused(*DIGITS, *method, *extra, "--set", setting)
    for part in told:
        assert part in message
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_more_random_features_of_a_method_than_there_is_memory_for(lamina: Command) -> None:
    message = lamina.refused(*DIGITS, "--method=lamina", "--set", "method.random_features=10000000")
    assert "method.random_features = 10000000" in message
    assert "Allowed are 1 to" in message


@pytest.mark.parametrize(
    ("flag", "new"), [("--joined", "--joint"), ("--merge=ema", "--merging"), ("--head", "--classifier")]
)
def test_a_flag_of_an_older_version(lamina: Command, flag: str, new: str) -> None:
    assert f"{flag.partition('=')[0]} is now called {new}" in lamina.refused(*DIGITS, flag)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("rnu",), "Did you mean 'run'?"), (("run", "--taks", "3"), "--tasks"), (("run", "--tasks", "x"), "--tasks")],
)
def test_a_misspelt_command_line(lamina: Command, arguments: tuple[str, ...], told: str) -> None:
    said = lamina(*arguments)
    assert said.code == 2
    assert told in said.err


# -- data -------------------------------------------------------------------------------------------------------------


def test_an_empty_class_folder(lamina: Command, tmp_path: Path) -> None:
    (paint(tmp_path / "photos", 2, 3) / "nothing").mkdir()
    message = lamina.refused("run", "--data", "photos", "--tasks", 3, "--out", "run", *QUICK)
    assert str(Path("photos") / "nothing") in message
    assert "holds no images" in message


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_cut_image_is_named_or_skipped_and_listed(lamina: Command, tmp_path: Path, suffix: str) -> None:
    cut = paint(tmp_path / "photos", 2, 8, suffix) / "class1" / f"3{suffix}"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    arguments = ("run", "--data", "photos", "--tasks", 2, *LIGHT)
    message = lamina.refused(*arguments, "--out", "run")
    assert str(Path("photos") / "class1" / f"3{suffix}") in message
    assert "--set data.on_damaged=skip" in message
    assert lamina(*arguments, "--set", "data.on_damaged=skip", "--out", "run").code == 0
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    (skipped,) = record["skipped"]
    assert f"class1/3{suffix}" in skipped
    assert sum(task["train"] + task["test"] for task in record["stream"]["tasks"]) == 15
    said = lamina("data", "check", "photos")
    assert said.code == 1
    assert f"class1/3{suffix}" in said.out


def test_texts_for_an_image_backbone(lamina: Command, tmp_path: Path) -> None:
    (tmp_path / "mail.csv").write_text("text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(20)))
    message = lamina.refused("run", "--data", "mail.csv", "--out", "run")
    assert "mail.csv" in message
    assert "texts" in message
    assert "'nano' takes images" in message


def test_a_resume_after_the_data_changed(lamina: Command, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    photos = paint(tmp_path / "photos", 4, 8)
    files = sorted(photos.rglob("*.png"))
    images = [file.read_bytes() for file in files]
    labels = [file.parent.name for file in files]
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "photos.parquet")
    assert lamina("run", "--data", "photos.parquet", "--tasks", 2, "--out", "run", *LIGHT).code == 0
    (tmp_path / "run" / "results.json").unlink()
    pq.write_table(pa.table({"image": images[1:2] + images[1:], "label": labels}), tmp_path / "photos.parquet")
    message = lamina.refused("resume", "run")
    assert "is not the data this run began with" in message
    assert "Restore it, or start a new run" in message
    pq.write_table(pa.table({"image": images[1:], "label": labels[1:]}), tmp_path / "photos.parquet")
    for command in ("resume", "evaluate"):
        assert "changed: class0 (test 2, now 1)" in lamina.refused(command, "run")
    (tmp_path / "new").mkdir()
    (tmp_path / "photos.parquet").rename(tmp_path / "new" / "photos.parquet")
    assert "is no longer at" in lamina.refused("resume", "run")


# -- backbones --------------------------------------------------------------------------------------------------------


def test_a_backbone_that_lacks_a_tensor(lamina: Command, tmp_path: Path) -> None:
    raw_vit(size=32).save_pretrained(tmp_path / "vit")
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    gone = next(name for name in sorted(weights) if name.endswith(("fc1.weight", "intermediate.dense.weight")))
    del weights[gone]
    save_file(weights, tmp_path / "vit" / "model.safetensors")
    message = lamina.refused(*DIGITS, "--backbone", "vit")
    assert "vit: the weights lack" in message
    assert "fc1.weight" in message
    assert not (tmp_path / "run").exists()


# -- run directories --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["resume", "evaluate", "report"])
@pytest.mark.parametrize("what", ["nothing", "a file", "a folder"])
def test_a_directory_that_is_no_run(lamina: Command, tmp_path: Path, command: str, what: str) -> None:
    if what == "a file":
        (tmp_path / "there").touch()
    elif what == "a folder":
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "photo.png").touch()
    message = lamina.refused(command, "there")
    assert "there" in message
    assert "run" in message
    if what == "a folder":
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["photo.png"], "it was not touched"


def test_a_place_for_a_run_that_is_taken(lamina: Command, tmp_path: Path, finished: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for out, told in [
        ("full", "is not empty and not a run"),
        ("file", "is a file"),
        (finished, f"holds a finished run, which `lamina report {finished}` shows"),
        (copy_unfinished(finished, tmp_path / "half"), "half` continues"),
    ]:
        message = lamina.refused(*DIGITS, "--out", out)
        assert told in message
        assert "--out" in message
    assert "cannot be made" in lamina.refused(*DIGITS, "--out", "file/run")


def test_what_a_killed_start_left_is_no_obstacle(lamina: Command, tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "lock").write_text("process 1 on nowhere\n")
    (out / ".config.json.tmp").write_text("{")
    assert lamina("run", "--data", photos, "--tasks", 2, "--out", out, "--method", "prototype", *QUICK).code == 0


def test_settings_of_a_run_that_cannot_be_read(lamina: Command, tmp_path: Path, finished: Path) -> None:
    out = copy_unfinished(finished, tmp_path / "run")
    (out / "config.json").write_text('{"seed": "x"}')
    assert "seed" in lamina.refused("resume", "run")
    (out / "config.json").write_text('{"seed": ')
    assert "config.json is damaged" in lamina.refused("resume", "run")
    (out / "config.json").write_text((finished / "config.json").read_text())
    (out / "environment.json").unlink()
    assert "environment.json is missing" in lamina.refused("resume", "run")


# -- checkpoints ------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_falls_back_to_the_checkpoint_before(lamina: Command, tmp_path: Path, finished: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("learner.safetensors", "state.json", "manifest.json"):
        out = copy_unfinished(finished, tmp_path / name)
        damaged = newest(out)
        flip(damaged / name, int(draw.integers(1 << 20)))
        said = lamina("resume", out)
        assert said.code == 0
        assert damaged.name in said.err
        assert "damaged" in said.err
        assert f"Continuing from checkpoint {int(damaged.name) - 1}" in said.err
        for learnt in LEARNT:
            assert (newest(out) / learnt).read_bytes() == (newest(finished) / learnt).read_bytes()


def test_where_every_checkpoint_is_damaged_each_file_is_named(lamina: Command, tmp_path: Path, finished: Path) -> None:
    out = copy_unfinished(finished, tmp_path / "run")
    damaged = [directory / "learner.safetensors" for directory in (out / "checkpoints").iterdir()]
    for path in damaged:
        flip(path, 1000)
    for command in ("resume", "evaluate"):
        message = lamina.refused(command, out)
        assert "no checkpoint is whole" in message
        for path in damaged:
            assert str(path) in message


# -- other processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def _nothing_left_at_work() -> Iterator[None]:
    yield
    kill_all()


@pytest.mark.usefixtures("_nothing_left_at_work")
def test_a_run_at_work_is_left_alone_and_a_dead_one_is_taken_over(lamina: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*small_run(out, "finetune", **{"stream.tasks": 2, "checkpoint_seconds": 0.0}))
    assert halt_at(process, out, Moment(0, "train", 1)) is not None
    before = newest(out).name
    message = lamina.refused("resume", out)
    assert f"process {process.pid} " in message
    assert "in use" in message
    assert f"`lamina resume {out}` continues" in lamina.refused(*DIGITS, "--out", out)
    assert newest(out).name == before
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert f"process {process.pid} " in (out / "lock").read_text()
    assert lamina("resume", out).code == 0


def test_a_stream_that_cannot_be_is_refused_before_anything_is_decoded(
    lamina: Command, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr("lamina.runs.setup.decode", lambda *given: decoded.append(given))
    said = lamina.refused("run", "--data", photos, "--tasks", 50, "--out", tmp_path / "out")
    assert "50" in said
    assert not decoded
    assert not (tmp_path / "out").exists()
