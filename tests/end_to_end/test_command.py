"""The command as people use it: its help, its settings in and out, and runs on folders of images and on texts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.end_to_end.conftest import LIGHT, QUICK, Command, paint
from tests.tiny import raw_bert

from lamina import config as configuration
from lamina import runs
from lamina.methods import METHODS

COMMANDS = ("demo", "run", "resume", "evaluate", "report", "compare", "methods", "data")
RECORD = (
    *("sha256", "format", "name", "created", "seed", "split", "method", "stream", "matrix", "task_aware"),
    *(
        "task_inference_accuracy",
        "config",
        "source",
        "backbone",
        "machine",
        "code",
        "classes",
        "batch",
        "cost",
        "lineage",
    ),
    *("losses", "skipped", "notes", "metrics"),
)
"""The keys of results.json."""


def plain(text: str) -> str:
    """Without colours and frames, its lines joined."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_and_version_import_nothing_heavy() -> None:
    for flag in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "lamina.cli", flag], capture_output=True, text=True, check=True
        )
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
        assert "typer" in imported
        assert not {name.partition(".")[0] for name in imported} & {"torch", "transformers", "numpy", "pydantic", "PIL"}
        assert done.stdout.strip()


def test_version(lamina: Command) -> None:
    from lamina import __version__

    assert lamina("--version").out.strip() == f"lamina {__version__}"


def test_the_top_says_where_to_start(lamina: Command) -> None:
    for arguments in (["--help"], []):
        said = lamina(*arguments)
        shown = plain(said.out + said.err)
        assert "lamina demo" in shown
        assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, "data check"])
def test_every_command_explains_itself(lamina: Command, command: str) -> None:
    said = lamina(*command.split(), "--help")
    assert said.code == 0
    shown = plain(said.out)
    assert f"lamina {command}" in shown
    explained = shown.split("Options")[0].split("Arguments")[0].split("Commands")[0]
    assert len(explained.split()) > 8, "a usage line and at least a sentence"
    if command == "run":
        assert shown.count("lamina run") >= 3, "examples"


def test_the_methods_fit_one_screen(lamina: Command) -> None:
    listed = lamina("methods").out
    lines = listed.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 116
    assert lines[0].split("  ")[0] == "method"
    listed_methods = [line.split(maxsplit=1) for line in lines[1:-3]]
    assert listed_methods == [[name, method.advice] for name, method in METHODS.items()]
    assert "Did you mean 'inflora'?" in lamina.refused("methods", "inflra")


def test_a_terminal_without_unicode_is_no_obstacle() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "lamina.cli", "methods", "inflora"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert b"?: share of the inputs' energy" in said.stdout


@pytest.mark.parametrize("name", METHODS)
def test_one_method_in_detail(lamina: Command, name: str) -> None:
    shown = lamina("methods", name).out
    method = METHODS[name]
    for part in (method.paper.title, method.paper.link, method.advice, method.needs.storage, method.needs.cost):
        assert part in shown
    for key, field in method.config_type.model_fields.items():
        assert f"  {key} = {field.get_default()}" in shown
    for key in method.config_type.around:
        assert f"  {key} = " in shown


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--method", "finetune", "--tasks", "5", "--lr", "1e-3", "--seed", "7"),
        ("--scenario", "domain", "--set", "stream.domains=[photo, sketch]", "--set", "data.crop_scale=[0.5, 1]"),
        ("--set", "stream.scenario=mixed", "--set", "stream.plan=[{name: a, classes: ['1', '2']}]", "--joint"),
        (
            "--method",
            "inflora",
            "--set",
            "method.epsilon=0.97",
            "--set",
            "backbone.mean=[0.1, 0.2, 0.3]",
            "--set",
            "training.weight_decay=1e-4",
        ),
    ],
)
def test_printed_settings_fed_back_are_the_same(lamina: Command, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    printed = lamina("run", *arguments, "--print-config").out
    (tmp_path / "run.yaml").write_text(printed)
    again = lamina("run", "run.yaml", "--print-config").out
    assert again == printed
    given = [arguments[i + 1] for i, flag in enumerate(arguments) if flag == "--set"]
    for text in given:
        key, _ = configuration.parse_override(text)
        assert f"{key.rpartition('.')[2]}:" in printed
    first = runs.load_config(tmp_path / "run.yaml", [])
    changed = runs.load_config(tmp_path / "run.yaml", [("seed", first.seed + 1)])
    settings = METHODS[first.method["name"]].config_type
    same = runs.load_config(tmp_path / "run.yaml", [])
    assert configuration.fingerprint(first, settings) == configuration.fingerprint(same, settings)
    assert configuration.fingerprint(first, settings) != configuration.fingerprint(changed, settings)
    assert not (tmp_path / "runs").exists(), "printing runs nothing"


def test_flags_go_over_the_file_and_set_over_flags(lamina: Command, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training:\n  lr: 1\n  epochs: 3\nmethod: finetune\nseed: 5\n")
    printed = lamina("run", "run.yaml", "--lr", "2", "--set", "training.lr=3", "--seed", "6", "--print-config").out
    (tmp_path / "all.yaml").write_text(printed)
    found = runs.load_config(tmp_path / "all.yaml", [])
    assert (found.training.lr, found.training.epochs, found.seed) == (3, 3, 6)
    assert found.method["name"] == "finetune"


# -- a run on a folder of images --------------------------------------------------------------------------------------


def test_a_folder_of_images_from_data_to_report(lamina: Command, tmp_path: Path) -> None:
    paint(tmp_path / "photos", 4, 10)
    cache = tmp_path / "decoded"
    said = lamina("run", "--data", "photos", "--tasks", 2, "--set", f"data.cache={cache}", "--out", "run", *LIGHT)
    assert said.code == 0
    assert "task 2/2 learnt" in said.err
    assert str(Path("run") / "results.json") in said.out
    assert str(tmp_path / "run" / "report.html") in said.out
    assert len(list(cache.glob("*/pixels.bin"))) == 1, "images are decoded once, where we said"

    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert tuple(record) == RECORD
    assert record["matrix"]["total"] == [[4, 0], [4, 4]]
    assert [task["classes"] for task in record["stream"]["tasks"]] == [["class0", "class1"], ["class2", "class3"]]
    assert record["config"]["data"]["source"] == str(tmp_path / "photos")
    assert 0 <= record["metrics"]["final_accuracy"] <= 1
    assert record["skipped"] == []
    phases = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    expected = [(f"task-0{task}", phase) for task in (1, 2) for phase in ("begin", "train", "end", "evaluate")]
    assert [(event["task"], event["phase"]) for event in phases] == expected
    assert_self_contained(tmp_path / "run" / "report.html")

    measured = lamina("evaluate", "run")
    assert measured.code == 0
    right, total = record["matrix"]["correct"][1], record["matrix"]["total"][1]
    for task, correct, count in zip(("task-01", "task-02"), right, total, strict=True):
        assert re.search(rf"{task}\s+{correct / count:.1%}\s.*\s{count}\s", measured.out)
    assert lamina("evaluate", "run", "--split", "train").code == 0
    assert "no finished task has val examples" in lamina.refused("evaluate", "run", "--split", "val")

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != "lock"}
    again = lamina("resume", "run")
    assert again.code == 0
    assert again.out == said.out
    assert "run was finished already; nothing was done." in again.err
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished run is not touched"

    other = lamina("run", "--data", "photos", "--tasks", 2, "--method", "finetune", "--out", "other", *QUICK)
    assert other.code == 0
    compared = lamina("report", "run", "other", "--out", "both.html")
    assert compared.code == 0
    assert str(tmp_path / "both.html") in compared.out
    page = (tmp_path / "both.html").read_text()
    assert "lamina" in page
    assert "finetune" in page
    assert_self_contained(tmp_path / "both.html")


def assert_self_contained(page: Path) -> None:
    """Nothing is fetched when it is opened: no script, and no address but those a reader may click on."""
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|iframe|object|embed)\b|@import", text, re.IGNORECASE)
    loaded = re.findall(r"<link[^>]*href=\"([^\"]*)|\ssrc=\"([^\"]*)|url\([\"']?([^)]*)", text, re.IGNORECASE)
    assert all("".join(address).startswith(("data:", "#")) for address in loaded)
    for address in re.finditer(r"https?://", text):
        before = text[max(0, address.start() - 60) : address.start()]
        assert re.search(r"<a [^>]*href=\"$|xmlns(:\w+)?=\"$", before), before


def test_the_same_command_twice_gives_the_same_numbers(lamina: Command, tmp_path: Path, photos: Path) -> None:
    records = []
    for out in ("one", "two"):
        assert lamina("run", "--data", photos, "--tasks", 2, "--out", out, *LIGHT).code == 0
        records.append(json.loads((tmp_path / out / "results.json").read_text()))
    for key in ("matrix", "task_aware", "losses", "metrics"):
        assert records[0][key] == records[1][key]


# -- the audit --------------------------------------------------------------------------------------------------------


def test_data_check(lamina: Command, tmp_path: Path) -> None:
    good = paint(tmp_path / "good", 3, 10)
    said = lamina("data", "check", good)
    assert said.code == 0
    assert "30 images, 3 classes" in said.out
    assert "0 problems" in said.out
    bad = paint(tmp_path / "bad", 3, 10)
    (bad / "class1" / "4.png").write_bytes(b"not an image")
    (bad / "class2" / "copy.png").write_bytes((bad / "class0" / "0.png").read_bytes())
    said = lamina("data", "check", bad)
    assert said.code == 1
    assert str(bad / "class1" / "4.png") in said.out
    assert "in more than one class" in said.out
    assert str(bad / "class2" / "copy.png") in said.out
    assert "does not exist" in lamina.refused("data", "check", "nowhere")


# -- texts ------------------------------------------------------------------------------------------------------------

TOPICS = {
    "sport": ["ball", "goal", "team", "match", "score"],
    "food": ["bread", "salt", "soup", "oven", "taste"],
    "space": ["star", "moon", "orbit", "comet", "probe"],
    "music": ["song", "drum", "choir", "chord", "opera"],
}


def test_a_stream_of_texts(lamina: Command, tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "of", *(w for ws in TOPICS.values() for w in ws)]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    raw_bert(vocabulary=len(words)).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    draw = np.random.default_rng(0)
    rows = [
        " ".join(draw.choice(own if draw.random() < 0.7 else words[5:8]) for _ in range(draw.integers(3, 12)))
        + f",{topic}"
        for topic, own in TOPICS.items()
        for _ in range(30)
    ]
    (tmp_path / "mail.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    said = lamina(
        *("run", "--data", "mail.csv", "--backbone", "bert", "--tasks", 2, "--epochs", 8, "--out", "run"),
        *("--set=precision=fp32", "--set=threads=1", "--set=data.max_length=16", "--set=training.batch_size=8"),
        *("--lr=0.005", "--set=method.rank=4"),
    )
    assert said.code == 0, said.err
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["stream"]["kind"] == "text"
    assert record["backbone"]["kind"] == "text"
    assert record["metrics"]["final_accuracy"] > 0.5, "four topics, told by their words"
    measured = lamina("evaluate", "run")
    assert f"mean over tasks: {record['metrics']['final_accuracy']:.1%}" in measured.out


def test_long_decoding_is_told(lamina: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "photos", 2, 6)
    told = []
    monkeypatch.setattr("lamina.cli.progress.Watcher.__call__", lambda _, stream, event: told.append((stream, event)))
    assert lamina("run", "--data", "photos", "--tasks", 2, "--out", "run", *LIGHT).code == 0
    loading = [event.done for stream, event in told if stream is None and event.phase == "load"]
    assert loading
    assert loading[-1] == 12


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_are_printed_as_they_are(lamina: Command, tmp_path: Path) -> None:
    """Square brackets are rich's markup, which would fail or vanish."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    domains = ("[/photo]", "[red]ink", "[old]")
    files = sorted(paint(tmp_path / "photos", 2, 8).rglob("*.png"))
    rows = [(file.read_bytes(), f"[b]{file.parent.name}", domain) for domain in domains for file in files]
    columns = dict(zip(("image", "label", "domain"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    arguments = ("run", "--data", "all.parquet", "--scenario", "domain", "--method", "prototype", "--out", "run")
    said = lamina(*arguments, *QUICK)
    assert said.code == 0, said.err
    assert "task 1/3 [/photo]: [b]class0, [b]class1" in said.err
    measured = lamina("evaluate", "run").out
    assert all(re.search(rf"^{re.escape(domain)} +\d", measured, re.MULTILINE) for domain in domains)


def test_what_was_found_is_told_at_the_start_and_recorded(lamina: Command, tmp_path: Path) -> None:
    paint(tmp_path / "photos", 3, 5)
    said = lamina("run", "--data", "photos", "--tasks", 3, "--method", "prototype", "--out", "run", *QUICK)
    assert "prototype: photos: 15 images, 3 classes" in said.err
    assert said.err.index("15 images") < said.err.index("task 1/3 task-01: class0 (4 training examples)")
    source = json.loads((tmp_path / "run" / "results.json").read_text())["source"]
    assert source["splits"] == {"train": 12, "val": 0, "test": 3}
    assert source["classes"] == {f"class{n}": {"train": 4, "val": 0, "test": 1} for n in range(3)}


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_threads_wait_without_spinning_unless_told_to(
    lamina: Command, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    """The OpenMP runtime reads this when torch is imported, which no command has done before its first line."""
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    lamina("run", "--print-config")
    assert os.environ["OMP_WAIT_POLICY"] == after
