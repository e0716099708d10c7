"""`lamina export` and `lamina import`, as a user gives them."""

from pathlib import Path

import pytest
from tests.end_to_end.conftest import Command
from tests.models import CLASSES, backbone, images, small
from tests.unit.export.language_worlds import run_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    base = backbone(tmp_path / "base")
    made = small(tmp_path / "m", base, "olora", {"probes.per_class": 2, "training.epochs": 1})
    made.learn(images(tmp_path / "a.parquet", CLASSES[:3]), name="first")
    return tmp_path / "m"


@pytest.mark.parametrize("format_", ["peft", "peft-tasks", "merged", "onnx"])
def test_every_format_says_how_to_use_it(format_: str, lamina: Command, model: Path, tmp_path: Path):
    said = lamina("export", model, tmp_path / "out", "--format", format_)
    assert said.code == 0, said
    assert "largest difference" in said.out
    assert "100.0% of 6 probes of 1 task" in said.out
    assert f"{format_}," in said.out
    assert said.out.rstrip().splitlines()[-1].startswith("    ")
    assert "exists already" in lamina.refused("export", model, tmp_path / "out", "--format", format_)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}) == 1
    assert "largest difference" in readme
    assert (tmp_path / "out" / "export.json").is_file()


def test_what_is_exported_is_imported_into_another_model(lamina: Command, model: Path, tmp_path: Path):
    assert lamina("export", model, tmp_path / "adapter", "--format", "peft").code == 0
    small(tmp_path / "other", tmp_path / "base", "olora")
    asked = ("import", tmp_path / "other", tmp_path / "adapter", "--name", "taken over")
    assert "outputs are ant,bee,cat, and --classes names ant,bee." in lamina.refused(*asked, "--classes", "ant,bee")
    (tmp_path / "adapter" / "export.json").rename(tmp_path / "export.json")
    asked_too = lamina.refused(*asked, "--classes", "ant,bee", "--same-base")
    assert "--classes names 2 classes" in asked_too
    (tmp_path / "export.json").rename(tmp_path / "adapter" / "export.json")
    said = lamina(*asked, "--classes", "ant,bee,cat")
    assert said.code == 0, said
    assert "version 1, task 'taken over' with 3 classes" in said.out
    assert "Next: lamina predict" in said.out
    assert "imported" in lamina("history", tmp_path / "other").out


def test_what_does_not_go_together(lamina: Command, model: Path, tmp_path: Path):
    assert "--with-base goes with adapters" in lamina.refused(
        "export", model, tmp_path / "out", "--format", "onnx", "--with-base"
    )
    assert "is not a model" in lamina.refused("export", tmp_path / "none", tmp_path / "out", "--format", "onnx")
    assert "does not exist" in lamina.refused(
        "export", model, tmp_path / "out", "--format", "merged", "--inputs", tmp_path / "nowhere"
    )
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_not_utf8(lamina: Command, tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes("Où est-il ?".encode("latin-1"))
    asked = ("export", run_of(tmp_path), tmp_path / "out", "--format", "merged", "--inputs", tmp_path / "latin.txt")
    assert "latin.txt cannot be read as UTF-8 text" in lamina.refused(*asked)
    assert not (tmp_path / "out").exists()
