"""Checkpoints are whole or absent, whenever the machine stops; what is damaged is named and never used."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lamina.engine import checkpoint
from lamina.errors import CheckpointError
from lamina.files import replace_text


class PowerCut(BaseException):
    """Nothing of ours may catch this."""


def content(version: int) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """Every file says which version it is of, so that a mix would show."""
    documents = {"state": {"version": version, "list": [0.1 * version]}, "clock": {"version": version}}
    tensors = {
        "learner": {"version": torch.tensor(version), "weight": torch.full((3, 2), version / 3)},
        "memory": {"a/b": torch.full((2, 5), float(version)).T, "version": torch.tensor(version)},
        "none": {},
    }
    return documents, tensors


def version_of(loaded: checkpoint.Loaded) -> int:
    version = loaded.documents["state"]["version"]
    documents, tensors = content(version)
    assert loaded.documents == documents
    assert loaded.tensors.keys() == tensors.keys()
    for name, group in tensors.items():
        assert loaded.tensors[name].keys() == group.keys()
        assert all(torch.equal(loaded.tensors[name][key], value) for key, value in group.items())
    return version


def test_what_is_saved_comes_back(tmp_path: Path):
    folder = tmp_path / "not" / "there yet"
    assert checkpoint.load_newest(folder) is None
    for version in (1, 2, 3):
        assert checkpoint.save(folder, *content(version)) == folder / f"{version:06d}"
        loaded = checkpoint.load_newest(folder)
        assert (version_of(loaded), loaded.number, loaded.damaged) == (version, version, {})
    assert sorted(path.name for path in folder.iterdir()) == ["000002", "000003"], "the two newest are kept"


def test_what_is_saved_comes_back_in_its_order(tmp_path: Path):
    """The order in which branches were finished decides the last bits of the folded weight."""
    checkpoint.save(tmp_path, {"state": {"second": {"z": 1, "a": 2}, "first": 3}}, {})
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert [*loaded.documents["state"]] == ["second", "first"]
    assert [*loaded.documents["state"]["second"]] == ["z", "a"]


def steps_of_a_save(folder: Path) -> list[str]:
    steps: list[str] = []
    checkpoint.save(folder, *content(0), on_step=steps.append)
    return steps


def test_killed_at_every_step_of_a_save_the_old_or_the_new_is_found(tmp_path: Path):
    steps = steps_of_a_save(tmp_path / "count")
    assert len(steps) >= 6
    for number, step in enumerate(steps):
        folder = tmp_path / str(number)
        checkpoint.save(folder, *content(1))
        checkpoint.save(folder, *content(2))
        left = iter(steps)

        def cut(_: str, left: object = left, step: str = step) -> None:
            if next(left) == step:
                raise PowerCut

        with pytest.raises(PowerCut):
            checkpoint.save(folder, *content(3), on_step=cut)
        assert version_of(checkpoint.load_newest(folder)) == (3 if step == "renamed" else 2), step
        checkpoint.save(folder, *content(4))
        assert version_of(checkpoint.load_newest(folder)) == 4
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [], "no rubbish is left"
        assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("call", ["fsync", "rename", "rmtree"])
def test_killed_in_every_call_to_the_disk_the_old_or_the_new_is_found(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = shutil if call == "rmtree" else os
    real, fatal = getattr(module, call), 0
    while True:
        folder, count = tmp_path / f"{call}{fatal}", iter(range(100))
        for version in (1, 2):
            checkpoint.save(folder, *content(version))

        def cut(*arguments: object, count: object = count, fatal: int = fatal, **named: object) -> None:
            if next(count) == fatal:
                raise PowerCut
            real(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(module, call, cut)
            try:
                checkpoint.save(folder, *content(3))
            except PowerCut:
                assert version_of(checkpoint.load_newest(folder)) in (2, 3)
            else:
                break
        fatal += 1
    assert fatal >= {"fsync": 7, "rename": 1, "rmtree": 2}[call]


def test_everything_is_on_disk_before_the_name_and_the_name_before_anything_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    real_fsync, real_rename, real_rmtree = checkpoint.fsync, os.rename, shutil.rmtree
    monkeypatch.setattr(checkpoint, "fsync", lambda p: (events.append(f"sync {p.name}"), real_fsync(p)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), real_rename(a, b)))
    for version in (1, 2):
        checkpoint.save(tmp_path, *content(version))
    events.clear()
    monkeypatch.setattr(shutil, "rmtree", lambda p, **kw: (events.append(f"delete {p.name}"), real_rmtree(p, **kw)))
    checkpoint.save(tmp_path, *content(3))
    files = sorted(path.name for path in (tmp_path / "000003").iterdir() if path.name != "manifest.json")
    assert events == [
        "delete .000003.tmp",
        *(f"sync {name}" for name in files),
        "sync manifest.json",
        "sync .000003.tmp",
        "rename",
        f"sync {tmp_path.name}",
        "delete 000001",
    ]


def test_a_flipped_bit_anywhere_is_noticed_named_and_passed_over(tmp_path: Path):
    checkpoint.save(tmp_path, *content(1))
    directory = checkpoint.save(tmp_path, *content(2))
    files = sorted(directory.iterdir())
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        if path.name == "manifest.json":
            texts = json.loads(whole)
            places = [i for i in range(len(whole)) if whole[i : i + 1].strip()][::3]
            assert texts
        else:
            places = sorted({0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1} & set(range(len(whole))))
        for place in places:
            for bit in (0, 5):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
                with pytest.raises(CheckpointError) as refused:
                    checkpoint.load(directory)
                named = "000002/" if path.name == "manifest.json" else f"000002/{path.name}"
                assert named in str(refused.value), f"byte {place} of {path.name}: {refused.value}"
        loaded = checkpoint.load_newest(tmp_path)
        assert version_of(loaded) == 1
        assert len(loaded.damaged) == 1
        assert "000002" in next(iter(loaded.damaged.values()))
        path.write_bytes(whole)
    assert version_of(checkpoint.load_newest(tmp_path)) == 2


@pytest.mark.parametrize("name", ["state.json", "memory.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "longer"])
def test_a_missing_or_cut_file_is_noticed_named_and_passed_over(name: str, how: str, tmp_path: Path):
    checkpoint.save(tmp_path, *content(1))
    path = checkpoint.save(tmp_path, *content(2)) / name
    whole = path.read_bytes()
    changed = {"empty": b"", "cut short": whole[:-3], "longer": whole + b"}"}
    path.unlink() if how == "missing" else path.write_bytes(changed[how])
    loaded = checkpoint.load_newest(tmp_path)
    assert version_of(loaded) == 1
    assert name in next(iter(loaded.damaged.values()))


def test_where_none_is_whole_each_is_named(tmp_path: Path):
    for version in (1, 2):
        (checkpoint.save(tmp_path, *content(version)) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole:\n.*000002/state.json.*\n.*000001/state.json"):
        checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/b", "..", "."])
def test_a_manifest_that_names_files_elsewhere_is_refused(name: str, tmp_path: Path):
    (tmp_path / "x").write_text("{}")
    directory = checkpoint.save(tmp_path / "folder", *content(1))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest[name] = {"sha256": checkpoint.sha256(tmp_path / "x"), "bytes": 2}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"not a file in its own directory|is missing"):
        checkpoint.load(directory)


@pytest.mark.parametrize("text", ["[]", "3", '{"state.json": 3}', '{"state.json": {}}', '{"state.json": null}'])
def test_a_manifest_of_another_form_is_refused(text: str, tmp_path: Path):
    directory = checkpoint.save(tmp_path, *content(1))
    (directory / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        checkpoint.load(directory)


def test_what_is_not_a_checkpoint_is_no_matter(tmp_path: Path):
    checkpoint.save(tmp_path, *content(1))
    (tmp_path / "notes").mkdir()
    (tmp_path / "000009").write_text("a file")
    (tmp_path / ".000007.tmp").mkdir()
    assert version_of(checkpoint.load_newest(tmp_path)) == 1
    checkpoint.save(tmp_path / "other", *content(1))


def test_a_small_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "pointer"
    replace_text(path, "old")
    replace_text(path, "new")
    assert path.read_text() == "new"

    def cut(*_: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(PowerCut):
            replace_text(path, "newer")
    assert path.read_text() == "new"
    replace_text(path, "newest")
    assert [p.name for p in tmp_path.iterdir()] == ["pointer"]


def test_damaged_one_set_aside_no_longer_counts(tmp_path):
    """After a fall back the next save must not keep the damaged checkpoint in place of the whole one."""
    for version in (1, 2):
        checkpoint.save(tmp_path, {"state": {"version": version}}, {})
    (tmp_path / "000002" / "state.json").write_text("{}")
    loaded = checkpoint.load_newest(tmp_path)
    for directory in loaded.damaged:
        checkpoint.set_aside(directory)
    checkpoint.save(tmp_path, {"state": {"version": 3}}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001", "000002", "damaged-000002"]
    assert checkpoint.load_newest(tmp_path).documents["state"]["version"] == 3
