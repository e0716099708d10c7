"""Tables that are not what they claim to be: each is refused with a sentence, and nothing hangs."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lamina.data import Columns, audit, open_source
from lamina.data.pixels import decode_once
from lamina.errors import DataError


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


TEXTS: dict[str, Any] = {"text": list("abcdef"), "label": [0, 1] * 3}
IMAGES: dict[str, Any] = {"image": [png(k) for k in range(6)], "label": [0, 1] * 3}


def write(path: Path, columns: dict[str, Any] | pa.Table) -> Path:
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
    return path


def refused(where: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        open_source(where, **options)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 700
    return message


# -- CSV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no column 'text', which should hold the text of each row. Its columns: none"),
        (b"\n\n", "no column 'text'"),
        (b"text,text,label\na,b,c\n", "has 2 columns named 'text'; allowed is one. Rename or remove"),
        (b"text,label,label\na,b,c\n", "has 2 columns named 'label'"),
        (b"text,label\n", "x holds no items"),
        (b"text,label\na\n", "Expected 2 columns, got 1"),
        (b"text,label\na,b,c\n", "Expected 2 columns, got 3"),
        ("text,label\ncafé,b\n".encode("latin-1"), "is not text in UTF-8. Save it in that encoding"),
        (b"text,label\n" + b"a,b\n" * 9000 + "café,b\n".encode("latin-1"), "is not text in UTF-8"),
        ("text,label\na,b\n".encode("utf-16"), "is not text in UTF-8"),
        (b"\0" * 1000, "x.csv"),
        (b"text;label\na;b\n", "no column 'text', which should hold the text of each row. Its columns: text;label"),
        (b'text,label\na,"b\nc"\n', "holds a control character"),
        (b"text,label,split\na,b,train\nc,d,\n", "x.csv row 1 has none. Give every row a split"),
        (b"text,label,split\na,b,train_test\n", "means both train and test"),
        (b"text,label,domain\na,b,x\nc,d,\n", "x.csv row 1 has no domain"),
        (b"PK\x03\x04" + bytes(range(256)) * 9, "x.csv"),
        (b'"' + b"x" * 200_000 + b"\n", "cannot be read as CSV"),
    ],
)
def test_csv(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    assert told in refused(tmp_path / "x.csv")


def test_csv_files_that_are_good(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    rows = b"text,label\n" + b"".join(b"t%d,%d\n" % (k, k % 2) for k in range(10))
    file.write_bytes(rows)
    plain = open_source(file)
    for content in (
        b"\xef\xbb\xbf" + rows,
        rows.replace(b"\n", b"\r\n"),
        rows + b"\n\n",
        rows.replace(b"t1,", b'"t1",'),
    ):
        file.write_bytes(content)
        assert open_source(file).fingerprint == plain.fingerprint
    # Columns that nobody asked for may hold anything, and stand twice.
    more = [b"text,note,label,note"] + [b"t%d,%s,%d,x" % (k, b"7" if k < 9 else b"seven", k % 2) for k in range(10)]
    file.write_bytes(b"\n".join(more))
    assert open_source(file).fingerprint == plain.fingerprint


def test_a_long_cell_of_a_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text,label\n"' + "word " * 2_000_000 + '",a\nshort,b\n')
    source = open_source(tmp_path / "x.csv")
    assert [len(str(source.read(k))) for k in range(2)] == [10_000_000, 5]


def test_a_cell_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.data.csv_files._LONGEST_CELL", 2**16)
    (tmp_path / "x.csv").write_text('text,label\n"' + "word " * 100_000 + '",a\nshort,b\n')
    assert "has a cell of more than 0 MB, or a quotation mark that is never closed" in refused(tmp_path / "x.csv")


# -- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({}, "Its columns: none"),
        ({"text": [], "label": []}, "of type null; allowed for texts is string"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "x holds no items"),
        ({"text": [None] * 6, "label": [0] * 6}, "of type null; allowed for texts is string"),
        ({"text": [["a"]] * 6, "label": [0] * 6}, "of type list<"),
        ({"text": [{"a": "b"}] * 6, "label": [0] * 6}, "of type struct<"),
        ({**TEXTS, "label": [None] * 6}, "x.parquet row 0 has no label"),
        ({**TEXTS, "label": [[0]] * 6}, "x.parquet row 0 has the label [0] (list)"),
        ({**TEXTS, "label": [b"a"] * 6}, "row 0 has the label b'a' (bytes)"),
        ({**TEXTS, "label": [{"a": 0}] * 6}, "row 0 has the label {'a': 0} (dict)"),
        ({**TEXTS, "label": [1.5] * 6}, "row 0 has the label 1.5 (float)"),
        ({**TEXTS, "label": pa.array([0] * 5 + [2**64 - 1], pa.uint64())}, "row 5 has the label 18446744073709551615"),
        ({**TEXTS, "label": ["a"] * 5 + [""]}, "x.parquet row 5 has no label: it is empty"),
        ({**TEXTS, "label": pa.array(["a"] * 5 + [None]).dictionary_encode()}, "x.parquet row 5 has no label"),
        ({**TEXTS, "domain": [0.5] * 6}, "row 0 has the domain 0.5 (float)"),
        ({**TEXTS, "split": [True] * 6}, "row 0 has the split True"),
        ({**TEXTS, "split": [["train"]] * 6}, "row 0 has the split ['train']"),
        ({**IMAGES, "image": [{"bytes": "a", "path": "b"}] * 6}, "of type struct<bytes: string"),
        ({**IMAGES, "image": [{"bytes": b"a"}] * 6}, "of type struct<bytes: binary>"),
        ({**IMAGES, "image": [{"bytes": None, "path": None}] * 6}, "x.parquet row 0 has no image"),
        ({**IMAGES, "image": [{"bytes": None, "path": "a\0b"}] * 6}, "which no file can be called"),
        ({**IMAGES, "image": [[1, 2]] * 6}, "of type list<"),
    ],
)
def test_parquet(tmp_path: Path, columns: dict[str, Any], told: str) -> None:
    assert told in refused(write(tmp_path / "x.parquet", columns))


def test_parquet_that_stands_twice_or_is_no_unicode(tmp_path: Path) -> None:
    doubled = pa.table([pa.array(["a", "b"]), pa.array(["a", "b"]), pa.array([0, 1])], names=["text", "text", "label"])
    assert "has 2 columns named 'text'" in refused(write(tmp_path / "x.parquet", doubled))
    broken = pa.array([b"\xff\xfe", b"b"]).view(pa.string())
    for column in ("text", "label", "domain", "split"):
        table = {"text": ["a", "b"], "label": ["a", "b"], column: broken}
        message = refused(write(tmp_path / "x.parquet", table))
        assert f"column {column!r} of x.parquet cannot be read (" in message


@pytest.mark.parametrize("kind", ["dictionary", "large", "view"])
def test_columns_that_are_encoded_otherwise_are_the_same(tmp_path: Path, kind: str) -> None:
    plain = open_source(write(tmp_path / "x.parquet", {**TEXTS, "label": list("xyxyxy"), "split": ["train"] * 6}))

    def other(values: list[str]) -> Any:
        if kind == "dictionary":
            return pa.array(values).dictionary_encode()
        return pa.array(values, pa.large_string() if kind == "large" else pa.string_view())

    columns = {"text": other(list("abcdef")), "label": other(list("xyxyxy")), "split": other(["train"] * 6)}
    source = open_source(write(tmp_path / "x.parquet", columns))
    assert source.fingerprint == plain.fingerprint
    assert source.read(3) == "d"


@pytest.mark.parametrize(
    "metadata",
    [
        b"{",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"info": null}',
        b'{"info": {"features": []}}',
        b'{"info": {"features": {"label": []}}}',
        b'{"info": {"features": {"label": {"names": 3}}}}',
        b'{"info": {"features": {"label": {"names": [1, 2]}}}}',
        b'{"info": {"features": {"label": {"names": {"0": "a"}}}}}',
    ],
)
def test_metadata_of_hugging_face_that_is_broken(tmp_path: Path, metadata: bytes) -> None:
    table = pa.table(TEXTS).replace_schema_metadata({b"huggingface": metadata})
    message = refused(write(tmp_path / "x.parquet", table))
    assert "the `huggingface` metadata of " in message
    assert "Write the file again" in message


def test_files_that_list_other_class_names(tmp_path: Path) -> None:
    for name, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
        told = json.dumps({"info": {"features": {"label": {"names": names}}}})
        write(tmp_path / f"{name}.parquet", pa.table(TEXTS).replace_schema_metadata({b"huggingface": told.encode()}))
    assert "list different class names (b, a; a, b)" in refused(tmp_path)


@pytest.mark.parametrize(
    "readme", ["[]", "3", '"x"', "null", "[" * 100_000, '{"domains": [1]}', '{"class_names": ["a", ""]}']
)
def test_a_readme_that_is_broken(tmp_path: Path, readme: str) -> None:
    write(tmp_path / "x.parquet", {**TEXTS, "domain": list("xyxyxy")})
    (tmp_path / "README.json").write_text(readme)
    message = refused(tmp_path)
    assert "README.json" in message or "the name of class 1 is empty" in message


def test_files_that_tell_only_in_part(tmp_path: Path) -> None:
    for name in ("train", "test", "extra"):
        write(tmp_path / f"{name}.parquet", TEXTS)
    assert "the name of test.parquet tells a split, that of extra.parquet does not" in refused(tmp_path)
    (tmp_path / "extra.parquet").unlink()
    for column in ("split", "domain"):
        write(tmp_path / "test.parquet", {**TEXTS, column: ["test"] * 6})
        assert f"test.parquet has a column {column!r}, train.parquet does not" in refused(tmp_path)


def test_files_named_by_their_splits_in_other_ways(tmp_path: Path) -> None:
    write(tmp_path / "fashion-test.parquet", TEXTS)
    assert len(open_source(tmp_path)) == 6, "a lone file may be about anything"
    write(tmp_path / "fashion-train.parquet", TEXTS)
    source = open_source(tmp_path)
    assert source.splits_n.tolist() == [2] * 6 + [0] * 6
    assert (
        source.layout
        == "Parquet, 2 files: texts in column 'text', labels in 'label', splits told by the names of the parts"
    )


def test_what_lies_beside_parquet_files_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", TEXTS)
    whole = open_source(tmp_path)
    (tmp_path / "._x.parquet").write_bytes(b"\0")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "more.parquet").mkdir()
    (tmp_path / "README.json").write_text("{}")
    source = open_source(tmp_path)
    assert source.fingerprint == whole.fingerprint
    assert [str(left) for left in source.left_out] == [
        "files and folders beside the Parquet files: 2 (more.parquet, pipe.parquet)",
        "hidden and system files and folders: 1 (._x.parquet)",
    ]


def test_paths_in_a_table_that_lead_to_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    paths = ["pipe.png", "folder.png", "gone.png"]
    pairs = [{"bytes": None, "path": path} for path in paths] + [{"bytes": png(k), "path": None} for k in range(3)]
    source = open_source(write(tmp_path / "x.parquet", {**IMAGES, "image": pairs}))
    assert [told.partition(":")[0] for told in audit(source).damaged] == [f"x.parquet row {k}" for k in range(3)]
    _, keep = decode_once(source, store_px=8, cache=tmp_path / "cache", on_damaged="skip")
    assert keep.tolist() == [3, 4, 5]


def test_a_column_of_a_name_with_dots(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", {"a.b": list("abcdef"), "a": [{"b": 1}] * 6, "label": [0, 1] * 3})
    assert open_source(file, columns=Columns(text="a.b")).read(0) == "a"


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def test_saved_datasets_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "dataset_dict.json").write_text('{"splits": []}')
    assert "empty holds no splits" in refused(tmp_path / "empty")
    dataset = datasets.Dataset.from_dict(TEXTS)
    for k, content in enumerate(["[]", "3", "null", '{"_data_files": 3}', '{"_data_files": [{}]}', "[" * 100_000]):
        dataset.save_to_disk(tmp_path / str(k))
        (tmp_path / str(k) / "state.json").write_text(content)
        assert "cannot be read as a saved Hugging Face dataset (" in refused(tmp_path / str(k))
    for name in ("dataset_info.json", "data-00000-of-00001.arrow"):
        for junk in (b"", b"[]", b"junk" * 100):
            dataset.save_to_disk(tmp_path / "one")
            (tmp_path / "one" / name).write_bytes(junk)
            assert "cannot be read as a saved Hugging Face dataset (" in refused(tmp_path / "one")


def test_splits_that_list_other_class_names(tmp_path: Path) -> None:
    def of(names: list[str]) -> datasets.Dataset:
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        return datasets.Dataset.from_dict(TEXTS, features=features)

    datasets.DatasetDict({"train": of(["a", "b"]), "test": of(["b", "a"])}).save_to_disk(tmp_path / "x")
    assert "x/train and x/test list different class names" in refused(tmp_path / "x")


def test_numbers_of_bits_in_damaged_parquet(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", IMAGES)
    whole = (tmp_path / "x.parquet").read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(whole)
        for place in draw.integers(0, len(whole), int(draw.integers(1, 8))):
            broken[place] = int(draw.integers(256))
        (tmp_path / "x.parquet").write_bytes(bytes(broken[: int(draw.integers(1, len(whole) + 200))]))
        with contextlib.suppress(DataError):
            audit(open_source(tmp_path / "x.parquet"))
