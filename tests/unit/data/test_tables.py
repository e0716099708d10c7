"""Parquet, CSV and Hugging Face datasets: what is accepted, and what is said about what is not."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lamina.data import Columns, open_source
from lamina.errors import DataError

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def images(**more: list[Any]) -> dict[str, Any]:
    return {"image": [png(k) for k in range(6)], "label": [0, 1, 2] * 2, **more}


def write(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_with_all_columns(tmp_path: Path) -> None:
    (tmp_path / "README.json").write_text(json.dumps({"class_names": ["a", "b", "c"], "domains": ["sketch", "photo"]}))
    splits = pa.array(["train"] * 4 + ["test"] * 2).dictionary_encode()
    columns = images(domain=["photo", "sketch"] * 3, split=splits, source=[f"{k}.png" for k in range(6)])
    write(tmp_path / "all.parquet", columns)
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b", "c")
    assert source.domain_names == ("sketch", "photo")
    assert source.domains_n.tolist() == [1, 0] * 3
    assert source.splits_n.tolist() == [0] * 4 + [2] * 2
    assert source.read(4) == png(4)
    assert source.where(4) == "all.parquet row 4 (4.png)"
    assert open_source(tmp_path / "all.parquet").fingerprint == source.fingerprint


def test_parquet_files_follow_one_another_and_their_names_tell_the_split(tmp_path: Path) -> None:
    write(tmp_path / "train-00-of-01.parquet", images())
    write(tmp_path / "test-00-of-01.parquet", images())
    source = open_source(tmp_path)
    assert source.splits_n.tolist() == [2] * 6 + [0] * 6
    assert source.class_names == ("0", "1", "2")
    assert source.where(7) == "train-00-of-01.parquet row 1"
    assert source.read(7) == png(1)


def test_fingerprint_of_parquet_does_not_depend_on_how_it_was_written(tmp_path: Path) -> None:
    one, other, third = (tmp_path / name for name in ("one.parquet", "other.parquet", "third.parquet"))
    write(one, images())
    pq.write_table(pa.table(images()), other, row_group_size=2, compression="zstd")
    write(third, {**images(), "image": [png(k + 1) for k in range(6)]})
    assert open_source(one).fingerprint == open_source(other).fingerprint
    assert open_source(one).fingerprint != open_source(third).fingerprint


def test_pairs_of_bytes_and_path(tmp_path: Path) -> None:
    (tmp_path / "beside.png").write_bytes(png(9))
    pairs = [{"bytes": png(0), "path": None}, {"bytes": None, "path": "beside.png"}] * 3
    source = open_source(write(tmp_path / "x.parquet", images(image=pairs)))
    assert source.read(0) == png(0)
    assert source.read(1) == png(9)


@pytest.mark.parametrize("escape", ["../secret.png", "sub/../../secret.png", "ABSOLUTE"])
def test_a_path_in_a_table_never_leads_out_of_its_folder(tmp_path: Path, escape: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    (tmp_path / "data").mkdir()
    path = str(tmp_path / "secret.png") if escape == "ABSOLUTE" else escape
    pairs = [{"bytes": png(0), "path": None}, {"bytes": None, "path": path}] * 3
    with pytest.raises(DataError, match=r"x.parquet names the file .*secret.png', which is outside .*data"):
        open_source(write(tmp_path / "data" / "x.parquet", images(image=pairs)))


def test_class_names_that_datasets_left_in_parquet(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}, features=features)
    table = dataset.with_format("arrow")[:]
    pq.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.kind == "text"
    assert source.class_names == ("no", "yes")


def test_other_column_names(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", {"img": images()["image"], "fine": [0, 1, 2] * 2})
    with pytest.raises(DataError, match=r"neither a column 'image'.*columns: img, fine. .*data.columns.image=NAME or"):
        open_source(file)
    with pytest.raises(DataError, match=r"no column 'label'.*columns: img, fine. .*--set data.columns.label=NAME"):
        open_source(file, columns=Columns(image="img"))
    with pytest.raises(DataError, match=r"no column 'text'.*columns: img, fine. .*--set data.columns.text=NAME"):
        open_source(file, kind="text", columns=Columns(image="img", label="fine"))
    source = open_source(file, columns=Columns(image="img", label="fine"))
    assert len(source) == 6


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (images(label=[0, 1, 2, 0, None, 2]), r"x.parquet row 4 has no label"),
        (images(label=[0, 1, 2, 0, -1, 2]), r"x.parquet row 4 has the label -1"),
        (images(label=[0.0] * 6), r"has the label 0.0 \(float\)"),
        (images(split=["train"] * 5 + ["later"]), r"x.parquet row 5 has the split 'later'"),
        (images(split=["train"] * 5 + [None]), r"x.parquet row 5 has none"),
        (images(domain=["a"] * 5 + [None]), r"x.parquet row 5 has no domain"),
        (images(image=[png(0)] * 5 + [None]), r"x.parquet row 5 has no image"),
        (images(image=["a.png"] * 6), r"column 'image' of x.parquet is of type string; allowed for images is binary"),
        (
            {"text": [1, 2], "label": [0, 1]},
            r"column 'text' of x.parquet is of type int64; allowed for texts is string",
        ),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(write(tmp_path / "x.parquet", columns))


def test_labels_beyond_the_class_names(tmp_path: Path) -> None:
    (tmp_path / "README.json").write_text(json.dumps({"class_names": ["a", "b"]}))
    file = write(tmp_path / "x.parquet", images())
    with pytest.raises(DataError, match=r"x.parquet row 2 has the label 2; allowed is 0 to 1, one for each class name"):
        open_source(file)


def test_damaged_tables(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"x.parquet cannot be read as Parquet"):
        open_source(file)
    write(file, images())
    (tmp_path / "README.json").write_text("{")
    with pytest.raises(DataError, match=r"README.json is not valid JSON"):
        open_source(file)
    (tmp_path / "README.json").write_text('{"class_names": 3}')
    with pytest.raises(DataError, match=r"'class_names' in .*README.json is not a list of names"):
        open_source(file)


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "intents.csv"
    file.write_text(
        'text,label,split,domain\n"hello, you",greet,train,chat\n17,bye,train,chat\nso long,bye,test,mail\n'
    )
    source = open_source(file)
    assert (source.kind, source.name, source.class_names) == ("text", "intents", ("bye", "greet"))
    assert [source.read(i) for i in range(3)] == ["hello, you", "17", "so long"]
    assert source.labels_n.tolist() == [1, 0, 0]
    assert source.splits_n.tolist() == [0, 0, 2]
    assert source.domain_names == ("chat", "mail")
    assert source.where(1) == "intents.csv row 1"


def test_wrong_csv(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text,label\na,1\nb\n")
    with pytest.raises(DataError, match=r"x.csv cannot be read as CSV \(.*\). Correct the line"):
        open_source(file)
    file.write_text("phrase,intent\na,1\n")
    with pytest.raises(DataError, match=r"x.csv has no column 'text'.*columns: phrase, intent"):
        open_source(file)
    with pytest.raises(DataError, match=r"a CSV file, which can only hold texts"):
        open_source(file, kind="image")


def test_saved_dataset(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(k), "path": None} for k in range(6)], "label": [0, 1] * 3}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "one")
    source = open_source(tmp_path / "one")
    assert source.class_names == ("cat", "dog")
    assert source.read(4) == png(4)
    assert sorted(np.bincount(source.splits_n).tolist()) == [0, 2, 4]
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([5, 0])})
    both.save_to_disk(tmp_path / "both")
    source = open_source(tmp_path / "both")
    assert source.splits_n.tolist() == [0] * 6 + [2] * 2
    assert source.read(6) == png(5)
    assert source.where(7) == "both/test row 1"


def test_wrong_saved_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    datasets.DatasetDict({"train": dataset, "unsupervised": dataset}).save_to_disk(tmp_path / "x")
    with pytest.raises(DataError, match="a split named 'unsupervised'; allowed are train"):
        open_source(tmp_path / "x")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a saved Hugging Face dataset"):
        open_source(broken)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def give(name: str, configuration: str | None) -> datasets.DatasetDict:
        asked.append((name, configuration))
        dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
        return datasets.DatasetDict({"train": dataset, "test": dataset})

    monkeypatch.setattr(datasets, "load_dataset", give)
    source = open_source("hf:owner/intents:plain")
    assert asked == [("owner/intents", "plain")]
    assert (source.name, source.where(3)) == ("intents", "intents/test row 1")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, _configuration: str | None) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"hf:owner/x cannot be had .*Couldn't reach 'owner/x'.*HF_HUB_OFFLINE=1"):
        open_source("hf:owner/x")


@pytest.mark.shared
def test_real_parquet() -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared datasets are not beside this checkout")
    source = open_source(SHARED / "emoji_styles")
    assert len(source) == 2620
    assert source.domain_names == ("noto", "twemoji", "fluent3d", "fluent_line")
    assert source.class_names[:2] == ("air or water craft", "bird")
    assert np.bincount(source.splits_n).tolist() == [1848, 0, 772]


def test_a_split_column_that_contradicts_the_name_of_its_file_is_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.parquet", images(split=[name] * 6))
    assert np.bincount(open_source(tmp_path).splits_n).tolist() == [6, 0, 6]
    write(tmp_path / "test.parquet", images(split=["test"] * 2 + ["train"] * 4))
    with pytest.raises(
        DataError, match=r"test.parquet row 2 is of the split train by its column 'split', but of test by .*Correct"
    ):
        open_source(tmp_path)
    (tmp_path / "test.parquet").unlink()
    write(tmp_path / "train.parquet", images(split=["train"] * 4 + ["test"] * 2))
    assert np.bincount(open_source(tmp_path).splits_n).tolist() == [4, 0, 2]
