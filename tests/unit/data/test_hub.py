"""Hugging Face datasets: addresses on the hub, and saved folders that hold more than the dataset."""

import os
from pathlib import Path

import datasets
import pytest

from lamina.data import open_source
from lamina.errors import DataError


def save(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_in_a_saved_dataset_is_refused_before_it_is_read(tmp_path: Path, linked: bool) -> None:
    folder = save(tmp_path / "saved")
    (file,) = folder.glob("*.arrow")
    file.unlink()
    os.mkfifo(tmp_path / "pipe" if linked else file)
    if linked:
        file.symlink_to(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"saved/.*arrow is no regular file \(a pipe, socket or device\). Remove it"):
        open_source(folder)


def test_links_in_a_circle_in_a_saved_dataset(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved")
    (folder / "again").symlink_to(folder)
    assert len(open_source(folder)) == 4


@pytest.mark.parametrize(
    "address",
    ["", ":", ":plain", "/etc", "./here", "../here", "a/b/c", "a/..", "a b", "a/b:", "a/b:c:d", "a/\x1b[31m", "~/x"],
)
def test_what_is_no_address_on_the_hub(address: str) -> None:
    with pytest.raises(DataError, match=r"'hf:.*' is no address on the Hugging Face hub; allowed are hf:owner/name"):
        open_source("hf:" + address)


@pytest.mark.parametrize("name", ["here", "owner/here"])
def test_an_address_on_the_hub_opens_no_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "train.csv").write_text("text,label\na,0\nb,1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=rf"hf:{name} is an address .*{name} is on this machine.*Give the path without hf:"
    ):
        open_source("hf:" + name)


def test_what_is_beside_a_saved_dataset_is_told(tmp_path: Path) -> None:
    one = save(tmp_path / "one")
    assert open_source(one).left_out == ()
    (one / "more").mkdir()
    (one / "other.arrow").write_text("")
    (one / ".cache").write_text("")
    assert [str(left) for left in open_source(one).left_out] == [
        "files and folders beside the saved dataset: 2 (more, other.arrow)",
        "hidden and system files and folders: 1 (.cache)",
    ]
    two = tmp_path / "two"
    dataset = datasets.load_from_disk(one)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(two)
    assert open_source(two).left_out == ()
    (two / "validation").mkdir()
    (two / "test" / "notes.txt").write_text("")
    assert [str(left) for left in open_source(two).left_out] == [
        "files and folders beside the saved dataset: 2 (test/notes.txt, validation)"
    ]
