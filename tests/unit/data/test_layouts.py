"""Layouts of folders: what is understood, what is left out and named, and what is refused because it cannot be told."""

import os
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamina.data import Source, describe_source, open_source
from lamina.data.pixels import decode_once
from lamina.errors import DataError


def put(root: Path, *folders: str, n: int = 2) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            Image.new("RGB", (5, 4), (k, 0, 0)).save(root / folder / f"{k}.png")


def left(source: Source) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {found.reason: (found.count, found.examples) for found in source.left_out}


def test_plain_layouts_say_how_they_were_understood(tmp_path: Path) -> None:
    put(tmp_path / "classes", "cat", "dog")
    put(tmp_path / "splits", "train/cat", "train/dog", "test/cat")
    put(tmp_path / "domains", "photo/cat", "photo/dog", "sketch/cat")
    put(tmp_path / "both", *(f"{d}/{s}/{c}" for d in ("photo", "sketch") for s in ("train", "test") for c in "ab"))
    held = "; no test split, so a fixed 20% of each class is held out for testing"
    layouts = {
        "classes": "folders CLASS" + held,
        "splits": "folders SPLIT/CLASS: train/ is train, test/ is test",
        "domains": "folders DOMAIN/CLASS: photo/, sketch/" + held,
        "both": "folders DOMAIN/SPLIT/CLASS: photo/, sketch/",
    }
    assert {name: open_source(tmp_path / name).layout for name in layouts} == layouts
    assert all(open_source(tmp_path / name).left_out == () for name in layouts)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("train_images", "test_images"),
        ("images_train", "images_val"),
        ("TrainSet", "TestSet"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("fold1_train", "fold1_test"),
        ("train_1", "test_1"),
    ],
)
def test_split_folders_of_many_names(tmp_path: Path, train: str, test: str) -> None:
    put(tmp_path, *(f"{train}/c{k}" for k in range(3)), n=5)
    put(tmp_path, *(f"{test}/c{k}" for k in range(3)), n=2)
    source = open_source(tmp_path)
    assert source.class_names == ("c0", "c1", "c2")
    assert source.domain_names == ("all",)
    measured = 1 if "val" in test else 2
    in_test = [source.where(k) for k in np.flatnonzero(source.splits_n == measured)]
    assert len(in_test) == 6
    assert all(f"/{test}/" in where for where in in_test)
    if measured == 2:
        assert len(source) == 21
        assert "held out" not in source.layout


def test_a_split_unpacked_into_a_folder_of_its_own_name(tmp_path: Path) -> None:
    put(tmp_path, *(f"seg_{s}/seg_{s}/c{k}" for s in ("train", "test") for k in range(2)))
    source = open_source(tmp_path)
    assert source.class_names == ("c0", "c1")
    assert np.bincount(source.splits_n).tolist() == [4, 0, 4]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train/a", "train/b", "holdout/a", "holdout/b"), "also 'holdout', which is none"),
        (("seg_train/a", "seg_train/b", "seg_test/a", "seg_test/b", "seg_pred/a"), "may be splits .* or domains"),
        (("photo_train/a", "photo_train/b", "sketch_test/a", "sketch_test/b"), "may be splits .* or domains"),
        (("train_test/a", "train_test/b", "x/a"), "means both train and test"),
        (("photo/train/a", "photo/test/a", "sketch/train/a", "sketch/extra/a"), "also 'extra', which is none"),
        (("photo/train/a", "photo/test/a", "sketch/a", "sketch/b"), "sketch has none"),
        (
            ("train/photo/a", "train/photo/b", "train/sketch/a", "test/photo/a"),
            "it cannot be told. .*DOMAIN/SPLIT/CLASS",
        ),
        (("photo/a", "photo/b", "sketch/a", "sketch/b", "misc"), "misc holds images directly"),
    ],
)
def test_what_can_be_understood_in_two_ways_is_refused(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    put(tmp_path, *folders)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "folders",
    [
        tuple(f"{d}/set1/{s}/{c}" for d in ("photo", "art") for s in ("train", "test") for c in ("cat", "dog")),
        (*(f"archive/data/{s}/{c}" for s in ("train", "test") for c in ("cat", "dog")), "extra/cat", "extra/dog"),
        ("a/x/train", "a/x/test", "b/y"),
        ("train/a/seg_train", "train/a/seg_val", "train/b", "test/a", "test/b"),
    ],
)
def test_splits_deeper_than_expected_are_never_mixed(tmp_path: Path, folders: tuple[str, ...]) -> None:
    put(tmp_path, *folders)
    with pytest.raises(DataError, match=r"but holds folders of splits .*would be mixed. Point --data at"):
        open_source(tmp_path)


@pytest.mark.parametrize("names", [("trainA", "trainB", "testA", "testB"), ("steam_train", "steam_test", "car")])
def test_flat_folders_that_differ_in_the_split_only_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(tmp_path, *names)
    with pytest.raises(DataError, match="may be splits: it cannot be told"):
        open_source(tmp_path)


def test_a_train_inside_a_class_is_no_split(tmp_path: Path) -> None:
    put(tmp_path, "toys/train", "toys/car", "toys/plane", "tools/bench_test", "tools/saw")
    assert open_source(tmp_path).class_names == ("tools", "toys")


def test_classes_may_be_called_like_trains_and_tests(tmp_path: Path) -> None:
    for name, classes in (
        ("toys", ("bullet_train", "steam_train", "test_tube")),
        ("deeper", ("bullet_train/images", "steam_train/images")),
        ("vehicles", ("car", "plane", "train")),
    ):
        put(tmp_path / name, *classes)
        source = open_source(tmp_path / name)
        assert source.class_names == tuple(part.partition("/")[0] for part in classes)
    put(
        tmp_path / "domains",
        *(f"{domain}/{thing}" for domain in ("photo", "clip") for thing in ("car", "plane", "train")),
    )
    source = open_source(tmp_path / "domains")
    assert source.class_names == ("car", "plane", "train")
    assert source.domain_names == ("clip", "photo")


@pytest.mark.parametrize("strays", [("photo",), ("photo", "sketch"), ("",)])
def test_stray_images_beside_class_folders_do_not_change_the_layout(tmp_path: Path, strays: tuple[str, ...]) -> None:
    put(tmp_path, *(f"{domain}/c{k}" for domain in ("photo", "sketch") for k in range(4)), n=8)
    whole = open_source(tmp_path)
    for stray in strays:
        Image.new("RGB", (3, 3)).save(tmp_path / stray / "preview.jpg")
    source = open_source(tmp_path)
    assert (source.class_names, source.domain_names) == (("c0", "c1", "c2", "c3"), ("photo", "sketch"))
    assert source.fingerprint == whole.fingerprint
    names = tuple(f"{stray}/preview.jpg".lstrip("/") for stray in strays)
    assert left(source) == {"images beside the class folders": (len(strays), names)}


def test_strays_in_a_split_folder_are_named(tmp_path: Path) -> None:
    put(tmp_path, "train/a", "train/b", "test/a", "test/b")
    put(tmp_path, "train", n=1)
    assert left(open_source(tmp_path)) == {"images beside the class folders": (1, ("train/0.png",))}


def test_classes_with_parts_stay_classes(tmp_path: Path) -> None:
    put(tmp_path, "cat", "dog", "bird", n=10)
    put(tmp_path, "cat/day", "cat/night", "dog/day", n=3)
    source = open_source(tmp_path)
    assert source.class_names == ("bird", "cat", "dog")
    assert len(source) == 39
    put(tmp_path, "cat/day", "cat/night", "dog/day", "dog/night", n=8)
    with pytest.raises(DataError, match="it cannot be told"):
        open_source(tmp_path)


def test_a_folder_around_the_data_is_looked_through(tmp_path: Path) -> None:
    put(tmp_path, "pets-v2/images/cat", "pets-v2/images/dog")
    put(tmp_path, "__MACOSX/pets-v2")
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.layout.startswith("inside pets-v2/images, folders CLASS")


def test_a_stray_image_in_the_folder_around_the_data_makes_it_no_class(tmp_path: Path) -> None:
    put(tmp_path, "outer/inner/a", "outer/inner/b", n=10)
    for stray in ("outer/stray.png", "outer/inner/stray.png"):
        Image.new("RGB", (3, 3)).save(tmp_path / stray)
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b")
    assert left(source) == {"images beside the class folders": (2, ("outer/inner/stray.png", "outer/stray.png"))}
    put(tmp_path, "outer", n=3)
    with pytest.raises(
        DataError, match=r"outer is the only folder and holds 4 images directly and 21 in folders .inner/.*Move"
    ):
        open_source(tmp_path)
    put(tmp_path, "outer", n=210)
    assert open_source(tmp_path).class_names == ("outer",)


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "@eaDir", ".thumbnails", "__MACOSX", ".git", "$RECYCLE.BIN"])
def test_hidden_folders_and_files_are_no_data(tmp_path: Path, hidden: str) -> None:
    put(tmp_path, "cat", "dog", n=5)
    whole = open_source(tmp_path)
    put(tmp_path, f"cat/{hidden}", f"{hidden}/dog", n=5)
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "desktop.ini"):
        (tmp_path / "dog" / name).write_bytes(b"\0")
    source = open_source(tmp_path)
    assert source.fingerprint == whole.fingerprint
    ((count, examples),) = left(source).values()
    assert count == 6
    assert len(examples) == 3
    assert "hidden and system files and folders: 6 (" in "\n".join(describe_source(source))


def test_other_files_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "cat", "dog")
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "cat" / "0.txt").write_text("")
    (tmp_path / "cat" / "0.heic").write_text("")
    (tmp_path / "dog" / "parts" / "none").mkdir(parents=True)
    assert left(open_source(tmp_path)) == {
        "empty folders": (2, ("dog/parts", "dog/parts/none")),
        "files without the suffix of an image": (3, ("cat/0.heic", "cat/0.txt", "labels.csv")),
    }


def test_runs_of_lamina_in_the_data_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "cat", "dog")
    whole = open_source(tmp_path)
    for run in ("runs/-lamina-seed0", "cat/run1"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        for name in ("config.json", "environment.json"):
            (tmp_path / run / name).write_text("{}")
    decode_once(whole, store_px=8, cache=tmp_path / "cache")
    (copy,) = (tmp_path / "cache").iterdir()
    source = open_source(tmp_path)
    assert source.fingerprint == whole.fingerprint
    assert left(source) == {"runs and caches of lamina": (3, (f"cache/{copy.name}", "cat/run1", "runs/-lamina-seed0"))}


def test_pipes_sockets_and_folders_named_like_images(tmp_path: Path) -> None:
    put(tmp_path, "photo/cat", "photo/dog", "sketch/cat", "sketch/dog")
    os.mkfifo(tmp_path / "photo" / "cat" / "pipe.png")
    os.mkfifo(tmp_path / "photo" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(tmp_path / "sketch" / "cat" / "s.png"))
    (tmp_path / "photo" / "cat" / "folder.png").mkdir()
    source = open_source(tmp_path)
    assert source.domain_names == ("photo", "sketch")
    assert len(source) == 8
    assert left(source) == {
        "empty folders": (1, ("photo/cat/folder.png",)),
        "pipes, sockets and devices": (3, ("photo/cat/pipe.png", "photo/pipe.png", "sketch/cat/s.png")),
    }
    with pytest.raises(DataError, match="neither a file nor a folder"):
        open_source(tmp_path / "photo" / "pipe.png")


def test_links_are_followed_once_and_never_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "data", "cat")
    put(tmp_path / "elsewhere", "", "more")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    for k, target in enumerate((".", "..", "../cat", "../../data", str(tmp_path), "nowhere", "5")):
        (tmp_path / "data" / "cat" / str(k)).symlink_to(target)
    (tmp_path / "data" / "cat" / "again").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "data" / "cat" / "gone.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "data" / "cat" / "linked.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    source = open_source(tmp_path / "data")
    assert [source.where(k).removeprefix(f"{tmp_path}/data/") for k in range(len(source))] == [
        *("cat/0.png", "cat/1.png", "cat/again/0.png", "cat/again/1.png", "cat/linked.png", "dog/0.png", "dog/1.png")
    ]
    assert left(source)["broken links and files that cannot be reached"][0] == 3
    assert left(source)["links to folders that are read already"][0] == 6


def test_a_forest_of_links_ends(tmp_path: Path) -> None:
    put(tmp_path / "data", "cat")
    for k in range(24):
        (tmp_path / f"f{k}").mkdir()
        for name in "ab":
            (tmp_path / f"f{k}" / name).symlink_to(tmp_path / f"f{k + 1}")
    put(tmp_path, "f24")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "f0")
    assert len(open_source(tmp_path / "data")) == 4


def test_very_deep_folders_end(tmp_path: Path) -> None:
    put(tmp_path, "cat", "dog", "cat/" + "/".join("x" * 60))
    source = open_source(tmp_path)
    assert len(source) == 4
    assert left(source)["folders more than 32 deep"][0] == 1


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "cat", "dog")
    whole = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"folder .*dog cannot be listed \(Permission denied\)"):
        open_source(tmp_path)


def test_class_folders_in_two_forms_of_unicode_are_one_class(tmp_path: Path) -> None:
    forms = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}
    put(tmp_path, f"train/{forms['NFC']}", f"test/{forms['NFD']}", "train/x", "test/x")
    source = open_source(tmp_path)
    assert source.class_names == ("café", "x")
    assert source.read(0) == source.read(4)


def test_names_of_files_that_are_no_unicode(tmp_path: Path) -> None:
    put(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / os.fsdecode(b"caf\xe9.png"))
    (tmp_path / "cat" / os.fsdecode(b"\xff.txt")).write_text("")
    source = open_source(tmp_path)
    assert {source.where(k).rpartition("/")[2] for k in range(2)} == {"1.png", "caf\\xe9.png"}
    assert all(isinstance(source.read(k), bytes) for k in range(4))
    assert left(source) == {"files without the suffix of an image": (1, ("cat/\\xff.txt",))}
    (tmp_path / "dog").rename(tmp_path / os.fsdecode(b"d\xf6g"))
    with pytest.raises(DataError, match=r"is not valid Unicode .*Rename it") as refused:
        open_source(tmp_path)
    str(refused.value).encode()


@pytest.mark.parametrize("where", ["x" * 300, "a\0b", "~nobody-of-this-name/x", "\udcff"])
def test_paths_that_cannot_be(where: str) -> None:
    with pytest.raises(DataError):
        open_source(where)


def test_spaces_of_other_languages_in_a_path(tmp_path: Path) -> None:
    put(tmp_path / "bilder\u3000\u00a0neu", "cat", "dog")
    assert (
        describe_source(open_source(tmp_path / "bilder\u3000\u00a0neu"))[0]
        == "bilder\\u3000\\xa0neu: 4 images, 2 classes, 1 domain"
    )


def test_links_in_a_circle_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "a")
