"""Files of a run that were damaged, edited, or cannot be written: named in a sentence, and never used in silence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.conftest import QUICK, Command, paint
from tests.faults.processes import copy_unfinished, newest

from lamina import files, runs
from lamina.engine.loop import Event
from lamina.errors import RunError


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file and leave its checksum alone. None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# -- a file with a checksum -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{}, {"a": [1, 0.1, 1e-30, None, True], "ü": {"b": "c\n"}}])
def test_what_is_written_with_a_checksum_is_read_back(content: dict[str, Any], tmp_path: Path) -> None:
    files.write_checked(tmp_path / "x.json", content)
    assert files.read_checked(tmp_path / "x.json") == content
    reformatted = json.dumps(json.loads((tmp_path / "x.json").read_text()), indent=7)
    (tmp_path / "x.json").write_text(reformatted)
    assert files.read_checked(tmp_path / "x.json") == content


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path, content = tmp_path / "x.json", {"threads": 1, "name": "abc", "share": 0.25}
    files.write_checked(path, content)
    whole, unnoticed = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused, found = "", None
        try:
            found = files.read_checked(path)
        except RunError as error:
            refused = str(error)
        assert found == content or "x.json" in refused, "only white space may change unnoticed"
        unnoticed += not refused
    assert unnoticed < 10


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_measured_only_if_asked_for(
    lamina: Command, tmp_path: Path, finished: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    damaged = newest(out)
    flip(damaged / "learner.safetensors", 1000)
    message = lamina.refused("evaluate", "run")
    assert str(damaged.name) in message
    assert "damaged" in message
    assert "--fall-back" in message
    said = lamina("evaluate", "run", "--fall-back")
    assert said.code == 0
    assert f"Continuing from checkpoint {int(damaged.name) - 1}" in said.err


# -- the files that decide a result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["resume", "evaluate"])
@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("environment.json", {"threads": 9}, "does not fit its sha256"),
        ("environment.json", {"sha256": None}, "has no sha256"),
        ("config.json", {"seed": 1}, "does not fit its sha256"),
        ("config.json", {"sha256": None}, "has no sha256"),
        ("source.json", {"stream": "0"}, "does not fit its sha256"),
    ],
)
def test_an_edited_file_is_refused(
    lamina: Command, tmp_path: Path, finished: Path, command: str, name: str, changes: dict[str, Any], told: str
) -> None:
    out = copy_unfinished(finished, tmp_path / "run")
    edit(out / name, **changes)
    message = lamina.refused(command, "run")
    assert f"run/{name}" in message
    assert told in message
    assert not (out / "results.json").exists()


@pytest.mark.parametrize("name", ["config.json", "environment.json", "source.json"])
@pytest.mark.parametrize("text", ["[]", "3", "{", "", "[" * 100_000, "9" * 10_000, "\xff"])
def test_a_file_of_another_form_is_refused(
    lamina: Command, tmp_path: Path, finished: Path, name: str, text: str
) -> None:
    out = copy_unfinished(finished, tmp_path / "run")
    (out / name).write_bytes(text.encode("latin-1"))
    assert f"run/{name} is damaged" in lamina.refused("resume", "run")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"threads": "many"}, "threads = 'many': allowed is a whole number"),
        ({"threads": 0}, "threads = 0"),
        ({"device": None}, "field required"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"hour": 3}, "hour = 3"),
    ],
)
def test_an_environment_is_read_by_its_types(
    lamina: Command, tmp_path: Path, finished: Path, changes: dict[str, Any], told: str
) -> None:
    """As another version of lamina might write it, with a checksum that fits."""
    out = copy_unfinished(finished, tmp_path / "run")
    content = files.read_checked(out / "environment.json") | changes
    files.write_checked(out / "environment.json", {k: v for k, v in content.items() if v is not None or k == "gpu"})
    message = lamina.refused("resume", "run")
    assert "environment.json is damaged" in message
    assert told in message


def test_a_run_of_an_older_version_is_refused_with_the_new_names(
    lamina: Command, tmp_path: Path, finished: Path
) -> None:
    out = copy_unfinished(finished, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    del config["sha256"], config["stream"]["joint"]
    config["stream"]["joined"] = False
    config["keep_chain"] = False
    (out / "config.json").write_text(json.dumps(config))
    message = lamina.refused("resume", "run")
    assert "run/config.json" in message
    assert "stream.joined = False: this setting is now called stream.joint" in message
    assert "keep_chain = False: this setting was removed" in message


@pytest.mark.parametrize("how", ["cut", "digit", "list", "unchecked"])
def test_a_damaged_record_is_named_and_made_anew(lamina: Command, tmp_path: Path, finished: Path, how: str) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    path = out / "results.json"
    text, expected = path.read_text(), json.loads(path.read_text())
    damaged = {
        "cut": text[:-100],
        "digit": text.replace('"final_accuracy": 0.', '"final_accuracy": 1.').replace(
            '"final_accuracy": 1.0', '"final_accuracy": 0.0'
        ),
        "list": "[]",
        "unchecked": text.replace("sha256", "sha255", 1),
    }[how]
    assert damaged != text
    path.write_text(damaged)
    message = lamina.refused("report", "run")
    assert "run/results.json" in message
    assert "`lamina resume run` writes it anew" in message
    said = lamina("resume", "run")
    assert said.code == 0
    assert "run/results.json is damaged, and is made anew" in said.err
    record = json.loads(path.read_text())
    for key in ("matrix", "task_aware", "metrics", "losses", "classes", "lineage"):
        assert record[key] == expected[key]
    assert lamina("report", "run").code == 0


# -- what is not finished ---------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a run as a crash would."""


def test_an_unfinished_task_is_not_measured(lamina: Command, tmp_path: Path, finished: Path) -> None:
    def stop(_: object, event: Event) -> None:
        if event.task == 1 and event.phase == "train" and event.done == 2:
            raise Stop

    config = runs.load_config(None, [*files.read_checked(finished / "config.json").items()])
    with pytest.raises(Stop):
        runs.create(config, tmp_path / "run", stop)
    said = lamina("evaluate", "run")
    assert said.code == 0
    assert "task 'task-02' is not finished" in said.err
    assert "task-01" in said.out
    assert "task-02" not in said.out
    (accuracy,) = (line.split()[1] for line in said.out.splitlines() if line.startswith("task-01"))
    assert f"mean over tasks: {accuracy}" in said.out


# -- places -----------------------------------------------------------------------------------------------------------


def test_a_run_on_the_folder_one_is_in(lamina: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = paint(tmp_path / "photos", 2, 6)
    monkeypatch.chdir(photos)
    message = lamina.refused("run", "--data", ".", "--tasks", 2, *QUICK)
    assert "runs/photos-lamina-seed0 lies inside the data folder" in message
    assert "--out" in message
    assert "lies inside the data folder" in lamina.refused("run", "--data", photos, "--out", "class0/run", *QUICK)
    assert sorted(path.name for path in photos.iterdir()) == ["class0", "class1"]
    monkeypatch.chdir(tmp_path)
    assert lamina("run", "--data", "photos/../photos/", "--tasks", 2, "--method", "prototype", *QUICK).code == 0
    assert (tmp_path / "runs" / "photos-prototype-seed0" / "results.json").exists()


def test_the_data_of_a_run_may_move(lamina: Command, tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", 2, 6)
    assert lamina("run", "--data", photos, "--tasks", 2, "--method", "prototype", "--out", "run", *QUICK).code == 0
    measured = lamina("evaluate", "run").out
    photos.rename(tmp_path / "moved")
    for command in ("evaluate", "resume"):
        (tmp_path / "run" / "results.json").unlink(missing_ok=True)
        message = lamina.refused(command, "run")
        assert f"no longer at {photos}" in message
        assert "--data" in message
    assert lamina("evaluate", "run", "--data", "moved").out == measured
    assert lamina("resume", "run", "--data", "moved").code == 0
    assert lamina("evaluate", "run").out == measured
    (tmp_path / "moved" / "class1" / "0.png").unlink()
    message = lamina.refused("evaluate", "run")
    assert "changed: class1 (" in message


@pytest.mark.parametrize("command", ["report", "evaluate", "resume"])
def test_a_folder_of_runs_lists_them(lamina: Command, tmp_path: Path, finished: Path, command: str) -> None:
    for name in ("a", "b"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    message = lamina.refused(command, "runs")
    assert "folder of 2: runs/a, runs/b" in message


def test_finished_runs_are_compared_by_report(lamina: Command, tmp_path: Path, finished: Path) -> None:
    for arguments in ([finished], [finished, finished]):
        message = lamina.refused("compare", *arguments)
        assert f"lamina report {finished}" in message


# -- files that cannot be written or read -----------------------------------------------------------------------------


def test_a_name_that_is_too_long(lamina: Command, photos: Path) -> None:
    message = lamina.refused("run", "--data", photos, "--tasks", 2, "--out", 300 * "x", *QUICK)
    assert "File name too long" in message
    assert "Choose a shorter name" in message


@pytest.mark.parametrize("name", ["events.jsonl", "report.html", "results.json"])
def test_a_full_disk_costs_no_training(lamina: Command, tmp_path: Path, finished: Path, name: str) -> None:
    """/dev/full takes nothing, as a full disk does."""
    out = copy_unfinished(finished, tmp_path / "run")
    if name == "events.jsonl":
        shutil.rmtree(newest(out))
        (out / "events.jsonl").unlink()
        (out / "events.jsonl").symlink_to("/dev/full")
    temporary = out / {"report.html": f".{name}.{os.getpid()}.tmp"}.get(name, f".{name}.tmp")
    temporary.symlink_to("/dev/full")
    message = lamina.refused("resume", "run")
    assert "No space left on device" in message
    assert "Make room" in message
    (out / "events.jsonl").unlink()
    temporary.unlink(missing_ok=True)
    assert lamina("resume", "run").code == 0
    assert newest(out).name == newest(finished).name


def test_a_link_that_leads_nowhere(lamina: Command, tmp_path: Path, finished: Path) -> None:
    out = copy_unfinished(finished, tmp_path / "run")
    (out / "lock").unlink(missing_ok=True)
    (out / "lock").symlink_to(tmp_path / "gone" / "lock")
    assert "lock: No such file or directory" in lamina.refused("resume", "run")


def test_a_finished_run_that_cannot_be_locked_is_shown(lamina: Command, tmp_path: Path, finished: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "lock").unlink()
    (out / "lock").symlink_to(tmp_path / "gone" / "lock")
    assert lamina("resume", "run").code == 0


def test_the_reader_of_a_pipe_may_leave() -> None:
    command = f"{sys.executable} -m lamina.cli run --print-config | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_memory_that_runs_out_is_said(lamina: Command, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(runs, "create", exhausted)
    message = lamina.refused("run", "--data", photos, "--tasks", 2, *QUICK)
    assert "out of memory" in message
    assert "training.batch_size" in message
