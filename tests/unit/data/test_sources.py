"""Folders, arrays and digits: what is accepted, and what is said about what is not."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from lamina.data import audit, from_arrays, open_source, render
from lamina.errors import ConfigError, DataError

IMAGES_N = np.arange(10 * 4 * 4 * 3, dtype=np.uint8).reshape(10, 4, 4, 3)
LABELS = [0, 1] * 5


def put(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (shade, 0, 0)).save(path)


def test_class_folders_are_split_by_a_seeded_stratified_choice(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        for k in range(10):
            put(tmp_path / name / f"{k}.png", k)
    (tmp_path / "cat" / "Thumbs.db").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    source = open_source(tmp_path)
    assert (source.kind, source.class_names, source.domain_names) == ("image", ("cat", "dog"), ("all",))
    assert len(source) == 20
    for label in (0, 1):
        assert np.bincount(source.splits_n[source.labels_n == label], minlength=3).tolist() == [8, 0, 2]
    assert source.where(0) == str(tmp_path / "cat" / "0.png")
    assert source.read(0) == (tmp_path / "cat" / "0.png").read_bytes()
    again = open_source(tmp_path)
    np.testing.assert_array_equal(again.splits_n, source.splits_n)
    assert again.fingerprint == source.fingerprint


def test_fingerprint_of_a_folder_ignores_its_place_and_sees_its_files(tmp_path: Path) -> None:
    for k in range(4):
        put(tmp_path / "a" / "x" / f"{k}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    first, moved = open_source(tmp_path / "a"), open_source(tmp_path / "elsewhere")
    assert first.fingerprint == moved.fingerprint
    put(tmp_path / "elsewhere" / "x" / "9.png")
    assert open_source(tmp_path / "elsewhere").fingerprint != first.fingerprint


def test_split_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        for k in range(count):
            put(tmp_path / split / "a" / f"{k}.png")
    source = open_source(tmp_path)
    assert source.splits_n.tolist() == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_domain_folders(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for domain in ("photo", "sketch"):
        for split in splits:
            for name in ("cat", "dog"):
                for k in range(2):
                    put(tmp_path / domain / split / name / f"{k}.png")
    source = open_source(tmp_path)
    assert source.domain_names == ("photo", "sketch")
    assert source.class_names == ("cat", "dog")
    cells = set(zip(source.labels_n.tolist(), source.domains_n.tolist(), source.splits_n.tolist(), strict=True))
    assert len(cells) == 8


def test_images_one_folder_deeper_are_of_the_class_above(tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        for k in range(2):
            put(tmp_path / name / "images" / f"{k}.png")
    source = open_source(tmp_path)
    assert source.class_names == ("n01", "n02")
    assert source.domain_names == ("all",)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "0.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folder .*dog holds no images .*Put images in it, or remove it"):
        open_source(tmp_path)


def test_folders_of_no_known_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither folders of images.*one folder per class"):
        open_source(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train holds no class folders"):
        open_source(tmp_path)
    (tmp_path / "extra").mkdir()
    put(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(DataError, match="also 'extra', which is none"):
        open_source(tmp_path)


def test_only_test_folders(tmp_path: Path) -> None:
    put(tmp_path / "test" / "cat" / "0.png")
    with pytest.raises(DataError, match="no training items, only test"):
        open_source(tmp_path)


def test_what_is_not_there_or_of_the_wrong_type(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist. Allowed are a folder"):
        open_source(tmp_path / "nowhere")
    file = tmp_path / "data.xlsx"
    file.write_text("")
    with pytest.raises(DataError, match=r"type '.xlsx'; allowed are .parquet, .csv, .jsonl and .json"):
        open_source(file)
    with pytest.raises(ConfigError, match=r"data.kind is 'sound'; allowed are auto, image, text and instructions"):
        open_source(file, kind="sound")  # type: ignore[arg-type]
    put(tmp_path / "cat" / "0.png")
    with pytest.raises(DataError, match="can only hold images"):
        open_source(tmp_path, kind="text")


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan")])
def test_a_test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"data.test_fraction is .*more than 0 and less than 1"):
        from_arrays(IMAGES_N, LABELS, test_fraction=fraction)


def test_arrays() -> None:
    source = from_arrays(
        IMAGES_N, ["b", "a"] * 5, splits=["train"] * 8 + ["test"] * 2, domains=["y"] * 5 + ["x"] * 5, name="mine"
    )
    assert source.class_names == ("a", "b")
    assert source.labels_n.tolist() == [1, 0] * 5
    assert source.splits_n.tolist() == [0] * 8 + [2] * 2
    assert source.domain_names == ("y", "x")
    np.testing.assert_array_equal(source.read(3), IMAGES_N[3])
    assert source.where(3) == "mine[3]"
    assert from_arrays(["x", "y"], [0, 1]).kind == "text"
    assert from_arrays([b"x", b"y"], [0, 1]).kind == "image"


def test_fingerprint_of_arrays_sees_everything_but_the_name() -> None:
    base = from_arrays(IMAGES_N, LABELS, splits=[0] * 8 + [2] * 2)
    changed = IMAGES_N.copy()
    changed[7, 0, 0, 0] += 1
    others = [
        from_arrays(changed, LABELS, splits=[0] * 8 + [2] * 2),
        from_arrays(IMAGES_N, LABELS[::-1], splits=[0] * 8 + [2] * 2),
        from_arrays(IMAGES_N, LABELS, splits=[0] * 7 + [2] * 3),
        from_arrays(IMAGES_N, LABELS, splits=[0] * 8 + [2] * 2, class_names=["a", "b"]),
        from_arrays(IMAGES_N, LABELS, splits=[0] * 8 + [2] * 2, domains=["d"] * 5 + ["e"] * 5),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert from_arrays(IMAGES_N, LABELS, splits=[0] * 8 + [2] * 2, name="other").fingerprint == base.fingerprint


def test_labels_without_names_are_their_own_names() -> None:
    source = from_arrays(IMAGES_N, [7, 3] * 5)
    assert source.class_names == ("3", "7")
    assert source.labels_n.tolist() == [1, 0] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0] * 9}, r"holds 10 items but 9 labels"),
        ({"labels": [0] * 9 + [None]}, r"arrays\[9\] has no label"),
        ({"labels": [0] * 9 + [-1]}, r"arrays\[9\] has the label -1; allowed is 0 or more"),
        ({"labels": [0] * 9 + [2], "class_names": ["a", "b"]}, r"arrays\[9\] has the label 2; allowed is 0 to 1"),
        ({"labels": [0.5] * 10}, r"arrays\[0\] has the label 0.5 \(float\)"),
        ({"labels": ["a"] * 9 + [1]}, r"arrays\[9\] has the label 1 \(int\)"),
        ({"labels": ["a"] * 9 + ["c"], "class_names": ["a", "b"]}, r"label 'c', which is none of the 2 class names"),
        ({"class_names": [1, 2]}, r"the name of class 0 is 1 \(int\); allowed is text \(str\)"),
        ({"class_names": ["a", None]}, r"the name of class 1 is None"),
        ({"class_names": ["a", "a"]}, r"class name 'a' is listed more than once"),
        ({"splits": ["train"] * 9 + ["exam"]}, r"arrays\[9\] has the split 'exam'; allowed are train, training, val"),
        ({"splits": [0] * 9 + [3]}, r"arrays\[9\] has the split 3"),
        ({"splits": ["test"] * 10}, r"no training items, only test"),
        ({"domains": ["a"] * 9 + [None]}, r"arrays\[9\] has no domain"),
        ({"images_or_texts": IMAGES_N.astype(np.float32)}, r"type float32; allowed are .*uint8"),
        ({"images_or_texts": IMAGES_N[:, :, :, :2]}, r"shape \(4, 4, 2\)"),
        ({"images_or_texts": IMAGES_N[:, :0]}, r"holds no pixels"),
        ({"images_or_texts": ["text"] * 9 + [b"bytes"]}, r"arrays\[9\] is of type bytes; allowed here is text"),
        ({"images_or_texts": [1] * 10}, r"arrays\[0\] is of type int"),
        ({"images_or_texts": [], "labels": []}, r"arrays holds no items"),
    ],
)
def test_wrong_arrays_are_named(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"images_or_texts": IMAGES_N, "labels": LABELS, **change}
    with pytest.raises(DataError, match=message):
        from_arrays(**given)  # type: ignore[arg-type]


def test_digits() -> None:
    source = open_source("digits")
    assert len(source) == 1797
    assert source.class_names == tuple("0123456789")
    assert np.bincount(source.splits_n, minlength=3)[1] == 0
    assert abs((source.splits_n == 2).mean() - 0.2) < 0.005
    pixels = source.read(0)
    assert isinstance(pixels, np.ndarray)
    assert (pixels.shape, pixels.dtype, pixels.max()) == ((8, 8), np.uint8, 239)
    assert open_source("digits").fingerprint == source.fingerprint
    with pytest.raises(DataError, match="`digits` holds images"):
        open_source("digits", kind="text")


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'lamina\[demo\]'"):
        open_source("digits")


def table(path: Path, **columns: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"text": list("abcd"), "label": [0, 1, 0, 1], **columns}), path)


def test_what_is_beside_a_data_folder_of_parquet_files_is_told(tmp_path: Path) -> None:
    table(tmp_path / "data" / "train-0.parquet")
    put(tmp_path / "train" / "a" / "0.png")
    for name in ("notes.txt", "README.json", "data/more.txt", "data/README.json", ".git"):
        (tmp_path / name).write_text("{}")
    assert [str(left) for left in open_source(tmp_path).left_out] == [
        "files and folders beside the Parquet files: 4 (README.json, data/more.txt, notes.txt, ...)",
        "hidden and system files and folders: 1 (.git)",
    ]


def test_a_list_of_domains_that_lacks_one_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "x.parquet", domain=["photo", "sketch", "clip\nart", "photo"])
    readme = tmp_path / "README.json"
    readme.write_text('{"domains": ["sketch", "photo"]}')
    with pytest.raises(DataError, match="control character"):
        open_source(tmp_path)
    table(tmp_path / "x.parquet", domain=["photo", "sketch", "art", "photo"])
    told = r"x.parquet row 2 has the domain 'art', which the list of domains in README.json lacks \('sketch', 'photo'\)"
    with pytest.raises(DataError, match=told):
        open_source(tmp_path)
    readme.write_text('{"domains": ["sketch", "photo", "sketch", "art"]}')
    with pytest.raises(DataError, match="domain 'sketch' is listed more than once"):
        open_source(tmp_path)
    readme.write_text('{"domains": ["sketch", "none", "art", "photo"]}')
    assert open_source(tmp_path).domain_names == ("sketch", "art", "photo")


def test_names_of_files_are_escaped_for_messages(tmp_path: Path) -> None:
    name = "bad\x1b[31m\n\u202e.png"
    put(tmp_path / "x" / "0.png")
    (tmp_path / "x" / name).write_bytes(b"")
    source = open_source(tmp_path)
    assert source.where(1) == str(tmp_path / "x") + r"/bad\x1b[31m\n\u202e.png"
    found = audit(source)
    assert found.damaged[0].startswith(str(tmp_path / "x" / name) + ": ")
    lines = render(found).splitlines()
    assert [line for line in lines if "bad" in line] == [
        f"  {source.where(1)}: {found.damaged[0].rpartition(name + ': ')[2]}"
    ]
    assert all(line.isprintable() for line in lines)


def test_names_of_classes_are_escaped_for_the_terminal() -> None:
    labels = ["\u202eevil", "b" * 9] * 5
    found = audit(from_arrays(["same"] * 10, labels, domains=labels, name="run\n"))
    assert all(line.isprintable() for line in render(found).splitlines())
    assert (
        len({len(line) for line in render(found).splitlines() if line.startswith(("domain  ", "\\u202eevil", "b" * 9))})
        == 1
    )
