"""A model's directory from strangers: what points out of it, or does not fit, is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models import CLASSES, backbone, images, small

from lamina.engine import checkpoint
from lamina.errors import LaminaError, ModelError
from lamina.files import write_checked
from lamina.model import Model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = small(
        tmp_path / "model", backbone(tmp_path / "vit"), "inflora", {"probes.per_class": 2, "gate.task_drop": 1}
    )
    data = images(tmp_path / "images.parquet")
    made.learn(data, name="first", classes=CLASSES[:3])
    made.learn(data, name="second", classes=CLASSES[3:], force=True)
    return made.path


def resigned(directory: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change a document of a version, and the manifest with it, as an attacker would."""
    file = directory / name
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    manifest[name] = {"sha256": checkpoint.sha256(file), "bytes": file.stat().st_size}
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def use(path: Path) -> None:
    opened = Model(path)
    assert opened.cards
    opened.predictor().close()


@pytest.mark.parametrize("head", ["../../elsewhere", "/etc", "0001-first/../0002-second", "nothing"])
def test_a_head_out_of_its_folder(model: Path, head: str) -> None:
    content = json.loads((model / "model.json").read_text())
    del content["sha256"]
    write_checked(model / "model.json", content | {"head": head})
    with pytest.raises(ModelError, match=r"is damaged|is missing"):
        use(model)


def test_what_points_out_of_the_folder(model: Path) -> None:
    directory = model / "tasks" / "0002-second"

    def parent(content: Any) -> None:
        content["parent"] = "../../../etc"

    def place(content: Any) -> None:
        content["stored"]["adapters"] = dict.fromkeys(content["stored"]["adapters"], "../../0001-first")

    def file(content: Any) -> None:
        content["stored"]["../../../secret"] = {}

    for name, change, told in (
        ("card.json", parent, "parent"),
        ("state.json", place, "not the name"),
        ("state.json", file, "stored"),
    ):
        before = {path: path.read_bytes() for path in directory.iterdir()}
        resigned(directory, name, change)
        with pytest.raises(ModelError, match=told):
            use(model)
        for path, content in before.items():
            path.write_bytes(content)
    use(model)


def test_a_link_to_another_file_is_not_followed(model: Path, tmp_path: Path) -> None:
    file = model / "tasks" / "0002-second" / "adapters.safetensors"
    (tmp_path / "copy").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "copy")
    with pytest.raises(ModelError, match=r"adapters\.safetensors"):
        use(model)


def test_weights_that_do_not_fit(model: Path) -> None:
    directory = model / "tasks" / "0002-second"

    def classes(content: Any) -> None:
        content["outline"]["head"][0]["classes"] = [0] * 99

    def sites(content: Any) -> None:
        content["outline"]["sites"]["block9.k"] = {"finished": {}, "live": {}}

    for change in (classes, sites):
        before = {path: path.read_bytes() for path in directory.iterdir()}
        resigned(directory, "state.json", change)
        with pytest.raises(ModelError, match="does not fit"):
            use(model)
        for path, content in before.items():
            path.write_bytes(content)


def test_a_header_that_claims_too_much(model: Path) -> None:
    directory = model / "tasks" / "0002-second"
    file = directory / "adapters.safetensors"
    file.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    resigned(directory, "card.json", lambda _: None)
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    manifest[file.name] = {"sha256": checkpoint.sha256(file), "bytes": file.stat().st_size}
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"adapters\.safetensors is damaged"):
        use(model)


def test_versions_store_what_is_new_only(model: Path) -> None:
    """The adapter of the first task lies in the folder of the first, and is used by the second."""
    state = json.loads((model / "tasks" / "0002-second" / "state.json").read_text())
    places = state["stored"]["adapters"]
    assert {place for name, place in places.items() if "/first/" in name} == {"0001-first"}
    assert {place for name, place in places.items() if "/second/" in name} == {"0002-second"}


def test_a_model_of_a_missing_backbone_says_where_it_was(model: Path, tmp_path: Path) -> None:
    (tmp_path / "vit").rename(tmp_path / "gone")
    with pytest.raises(LaminaError, match="vit"):
        use(model)
