"""Whatever happens while a model learns, it is the model before or the model after, and nothing learnt is lost."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.processes import PRELOADED, lamina, start
from tests.models import CLASSES, backbone, content, images, small

from lamina.errors import ModelError
from lamina.model import Model, store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with one task, data for a second, the model with that task trained and not committed, and with it learnt."""
    folder = tmp_path_factory.mktemp("world")
    base = backbone(folder / "vit")
    data = images(folder / "images.parquet")
    model = small(
        folder / "before", base, "inflora", {"probes.per_class": 2, "gate.task_drop": None, "gate.negative_flips": None}
    )
    model.learn(data, name="first", classes=CLASSES[:3])
    shutil.copytree(folder / "before", folder / "trained")
    shutil.copytree(folder / "before", folder / "after")
    Model(folder / "after").learn(data, name="second", classes=CLASSES[3:])
    run_killed(folder / "trained", data, 0)
    assert (folder / "trained" / "work" / "checkpoints").is_dir()
    return {"data": data, **{name: folder / name for name in ("before", "trained", "after")}}


class Counter:
    """Wraps every operation on the disk from the commit on. In the middle of the n-th the process is killed."""

    def __init__(self, fatal: int, log: Path) -> None:
        self.fatal, self.log, self.count, self.on = fatal, log, 0, False

    def wrapped(
        self, name: str, real: Callable[..., Any], half: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            if self.on:
                if self.count == self.fatal:
                    if half is not None:
                        half(*arguments, **named)
                    self.log.write_bytes(f"{name} {arguments[-1]}".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                self.count += 1
            return real(*arguments, **named)

        return operation

    def install(self) -> None:
        from lamina import files
        from lamina.engine import checkpoint

        os.fsync = self.wrapped("fsync", os.fsync)
        os.rename = self.wrapped("rename", os.rename)
        os.replace = self.wrapped("replace", os.replace)
        Path.write_text = self.wrapped(
            "write", Path.write_text, lambda path, text, **_: path.write_bytes(text[: len(text) // 2].encode())
        )  # type: ignore[method-assign]
        checkpoint.save_file = self.wrapped("tensors", checkpoint.save_file, lambda _, path: path.write_bytes(b"half"))
        shutil.rmtree = self.wrapped("remove", shutil.rmtree)
        assert files.os is os
        add = store.Store.add

        def begin(*arguments: Any, **named: Any) -> None:
            self.on = True
            add(*arguments, **named)

        store.Store.add = begin  # type: ignore[method-assign]


def learn_and_die(model: Path, data: Path, fatal: int, log: Path) -> None:
    counter = Counter(fatal, log)
    counter.install()
    Model(model).learn(data, name="second", classes=CLASSES[3:])
    log.write_text("done")


def run_killed(model: Path, data: Path, fatal: int) -> str:
    """Let a process learn the second task and kill it in the middle of this operation of the commit. Returns which it was."""
    log = model.parent / f"{model.name}.log"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "lamina.model"])
    process = context.Process(target=learn_and_die, args=(model, data, fatal, log))
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return log.read_text()


def same(ours: Path, theirs: Path) -> bool:
    """Whether two models have learnt the same, to the last bit."""
    one, other = (Model(path).store for path in (ours, theirs))
    left, right = (each.state(str(each.facts().head)) for each in (one, other))
    assert left[0]["state"]["outline"] == right[0]["state"]["outline"]
    return all(
        left[1][group].keys() == right[1][group].keys()
        and all(torch.equal(left[1][group][name], right[1][group][name]) for name in left[1][group])
        for group in ("learner", "memory", "consolidation")
    )


def test_killed_at_every_step_of_the_commit(world: dict[str, Path], tmp_path: Path) -> None:
    before = content(world["before"])
    struck: list[str] = []
    for fatal in range(60):
        model = tmp_path / f"model{fatal}"
        shutil.copytree(world["trained"], model)
        told = run_killed(model, world["data"], fatal)
        if told == "done":
            break
        struck.append(told)
        found, opened = content(model), Model(model)
        if opened.version == 1:
            kept = {name: value for name, value in found.items() if name in before}
            assert kept == before, told
        else:
            assert same(model, world["after"]), told
        opened.predictor().close()  # a reader, before anything is tidied
        if opened.version == 1:
            opened.learn(world["data"], name="second", classes=CLASSES[3:])
        assert same(model, world["after"]), told
        with opened.store.writing():
            pass
        assert sorted(path.name for path in (model / "tasks").iterdir()) == ["0001-first", "0002-second"], told
        shutil.rmtree(model)
    else:
        raise AssertionError("the commit has more steps than were tried")
    kinds = {told.split()[0] for told in struck}
    assert {"fsync", "rename", "replace", "write", "tensors"} <= kinds
    assert len(struck) > 15


def read_all(path: Path) -> None:
    opened = Model(path)
    assert len(opened.cards) == 2
    opened.predictor().close()
    for folder in opened.store.versions():
        opened.store.state(folder)
        for what in ("probes", "rehearsal"):
            opened.store.kept(folder, what)


def test_a_flipped_byte_is_named(world: dict[str, Path], tmp_path: Path) -> None:
    files = [file for file in world["after"].rglob("*") if file.is_file() and file.suffix in (".json", ".safetensors")]
    assert len(files) > 10
    for file in files:
        model = tmp_path / "model"
        shutil.copytree(world["after"], model)
        damaged = model / file.relative_to(world["after"])
        raw = bytearray(damaged.read_bytes())
        raw[len(raw) // 2] ^= 0x10
        damaged.write_bytes(raw)
        with pytest.raises(ModelError, match=damaged.parent.name) as told:
            read_all(model)
        if damaged.name != "manifest.json":  # it may then name the file that does not fit
            assert damaged.name in str(told.value)
        shutil.rmtree(model)


def test_a_full_disk_leaves_the_version_before(world: dict[str, Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    used = sum(file.stat().st_size for file in world["trained"].rglob("*") if file.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={used + 250_000}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        model = disk / "model"
        shutil.copytree(world["trained"], model)
        (disk / "filler").write_bytes(b"0" * max(0, shutil.disk_usage(disk).free - 20_000))
        code, _, err = lamina(
            "learn", model, world["data"], "--name=second", *(f"--class={name}" for name in CLASSES[3:])
        )
        assert code == 2, err
        assert "Make room" in err
        before = content(world["before"])
        assert {name: value for name, value in content(model).items() if name in before} == before
        Model(model).predictor().close()
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        Model(model).learn(world["data"], name="second", classes=CLASSES[3:])
        assert same(model, world["after"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_one_writer_and_many_readers(world: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world["before"], model)
    writer = start(
        "learn", model, world["data"], "--name=second", "--epochs=400", *(f"--class={name}" for name in CLASSES[3:])
    )
    while not (model / "work" / "plan.json").exists():
        assert writer.poll() is None
    code, _, err = lamina("rollback", model, "--all")
    assert code == 2
    assert f"process {writer.pid}" in err
    assert "in use by" in err
    code, _, err = lamina("predict", model, world["data"].parent / "vit" / "config.json")  # a reader is served
    assert code == 2
    assert "1 of 1 inputs could not be read" in err
    writer.kill()
    writer.finish(60)
    opened = Model(model)
    opened.rollback(None)  # a dead holder's lock is free
    assert opened.classes == ()
    opened.rollback("first")
    assert opened.version == 3


def test_a_reader_during_commits_sees_whole_versions(world: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world["before"], model)
    seen: list[tuple[int, int]] = []
    wrong: list[Exception] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                opened = Model(model)
                predictor = opened.predictor()
                seen.append((predictor.version, len(predictor.labels)))
                predictor.close()
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                wrong.append(error)

    def wait_for(version: int) -> None:
        deadline = time.monotonic() + 60
        while not wrong and (not seen or seen[-1][0] < version):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for(1)
        for number in range(3):
            given = ("--class=dog", "--class=eel", f"--name=more-{number}", "--force")
            code, _, err = lamina("learn", model, world["data"], *given)
            assert code == 0, err
        wait_for(4)
    finally:
        done.set()
        reader.join()
    assert wrong == []
    assert [version for version, _ in seen] == sorted(version for version, _ in seen)
    assert {version for version, _ in seen} >= {1, 4}


def test_events_of_a_cut_off_line(world: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world["before"], model)
    with (model / "events.jsonl").open("a") as log:
        log.write('{"time": "2026-')
    opened = Model(model)
    count = len(opened.history)
    opened.forget_kept()
    assert len(opened.history) == count + 1
    assert json.loads((model / "events.jsonl").read_text().splitlines()[-1])["event"] == "deleted kept examples"
