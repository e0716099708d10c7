"""Names: which are one, which look alike, which split a name means, and what is refused."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lamina.data import from_arrays, open_source
from lamina.data.names import alike, listed, refuse_likely_splits, shown, split_of
from lamina.errors import DataError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (0, "train Training train_set training_set train-images TrainImages trainset traindata train2017 images_train"),
        (1, "val valid validation dev images_val val_set Validation-Data valset val2017"),
        (2, "test testing test_set testset TestImages TEST"),
        (None, "bullet_train test_tube seg_train trains contest training_camp images data set 2017 photo trainval x"),
    ],
)
def test_which_split_a_name_means(split: int | None, names: str) -> None:
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)
    assert split_of("test set") == 2


@pytest.mark.parametrize("name", ["train_test", "train-val", "test_val_images"])
def test_a_name_that_means_two_splits_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"the name '{name}' means both .* and .*Rename it"):
        split_of(name)
    with pytest.raises(DataError, match="means both"):
        from_arrays(["a", "b"], [0, 1], splits=["train", name])


def test_names_are_compared_in_one_form_of_unicode() -> None:
    assert COMPOSED != DECOMPOSED
    source = from_arrays(
        list("abcd"), [COMPOSED, DECOMPOSED, "x", "x"], domains=[DECOMPOSED, COMPOSED] * 2, splits=["train", "test"] * 2
    )
    assert source.class_names == ("café", "x")
    assert source.domain_names == ("café",)
    listed_names = from_arrays(list("ab"), [COMPOSED, "x"], class_names=[DECOMPOSED, "x"])
    assert listed_names.labels_n.tolist() == [0, 1]
    with pytest.raises(DataError, match="class name 'café' is listed more than once"):
        from_arrays(list("ab"), [0, 1], class_names=[COMPOSED, DECOMPOSED])


def test_names_that_look_alike() -> None:
    assert alike(["a", "b", "A ", "b", "c", "d"]) == [("a", "A "), ("b", "b")]
    assert alike(["New York", "new  york", "New\u00a0York", "New\u200bYork"]) == [
        ("New York", "new  york", "New\u00a0York")
    ]
    assert alike(["1", "01", "001", "10", "0", "00"]) == [("1", "01", "001"), ("0", "00")]
    assert alike(["cat", "dog", "x1", "x01"]) == []


@pytest.mark.parametrize("blank", ["", " ", "\t", "\u00a0"])
def test_an_empty_name_is_refused(blank: str) -> None:
    with pytest.raises(DataError, match=r"arrays\[1\] has no label: it is empty. Remove the row, or label it"):
        from_arrays(list("abc"), ["x", blank, "y"])
    with pytest.raises(DataError, match=r"arrays\[1\] has no domain"):
        from_arrays(list("abc"), [0, 1, 0], domains=["x", blank, "y"])
    with pytest.raises(DataError, match=r"the name of class 1 is empty"):
        from_arrays(list("abc"), [0, 1, 0], class_names=["x", blank])


@pytest.mark.parametrize("sign", ["\n", "\x1b[31m", "\0", "\u2028"])
def test_a_name_that_would_write_on_the_terminal_is_refused(sign: str) -> None:
    for change in ({"labels": ["a", f"b{sign}"]}, {"domains": ["a", f"b{sign}"]}, {"class_names": ["a", f"b{sign}"]}):
        given: dict[str, Any] = {"labels": [0, 1], **change}
        with pytest.raises(DataError, match=r"holds a control character .*Rename it") as refused:
            from_arrays(["x", "y"], **given)
        assert str(refused.value).isprintable()


def test_markup_in_names_is_a_name_like_any_other() -> None:
    source = from_arrays(list("abcd"), ["[/b]", "[old]"] * 2, domains=["v1 [/beta]", "[old]"] * 2)
    assert source.class_names == ("[/b]", "[old]")
    assert source.domain_names == ("v1 [/beta]", "[old]")


def test_what_is_shown_fits_on_a_line() -> None:
    assert shown("a\nb\x1b") == "a\\nb\\x1b"
    assert len(shown("x" * 1000)) == 60
    assert listed(["a", "a ", "b"]) == "a, 'a ', b"
    assert listed("abcdefg", 3) == "a, b, c, ..."


def test_true_and_false_are_names_of_classes() -> None:
    for labels in ([True, False] * 2, np.array([True, False] * 2)):
        source = from_arrays(list("abcd"), labels)
        assert source.class_names == ("False", "True")
        assert source.labels_n.tolist() == [1, 0, 1, 0]
        assert from_arrays(list("abcd"), labels, class_names=["no", "yes"]).labels_n.tolist() == [1, 0, 1, 0]
    with pytest.raises(DataError, match=r"arrays\[1\] has the label 1 \(int\)"):
        from_arrays(list("ab"), [True, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 2**70]}, r"arrays\[1\] has the label 1180591620717411303424; allowed is 0 or more, in 64 bits"),
        ({"labels": np.array([0, 2**64 - 1], np.uint64)}, r"arrays\[1\] has the label 18446744073709551615"),
        ({"labels": [[0], [1]]}, r"arrays\[0\] has the label \[0\] \(list\)"),
        ({"labels": ["a", "x" * 10**6 + "\n"]}, "holds a control character"),
        ({"splits": [True, False]}, r"arrays\[0\] has the split True; allowed are train"),
        (
            {"domains": [0.5, float("nan")]},
            r"arrays\[0\] has the domain 0.5 \(float\); allowed are names and whole numbers",
        ),
        ({"domains": [{"a": 1}, {}]}, r"arrays\[0\] has the domain {'a': 1} \(dict\)"),
    ],
)
def test_wrong_labels_splits_and_domains(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"labels": [0, 1], **change}
    with pytest.raises(DataError, match=message) as refused:
        from_arrays(["x", "y"], **given)
    assert len(str(refused.value)) < 400


CSV = "text,label\n"


def csv(tmp_path: Path, labels: list[str]) -> Path:
    file = tmp_path / "x.csv"
    file.write_text(CSV + "".join(f"t{k},{label}\n" for k, label in enumerate(labels)))
    return file


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["01", "1", "001"], ("001", "01", "1"), [1, 2, 0]),
        (["10", "9", "9"], ("9", "10"), [1, 0, 0]),
        ([" 10", "9 "], ("9", "10"), [1, 0]),
        (["True", "False"], ("False", "True"), [1, 0]),
        (["1.0", "2.0"], ("1.0", "2.0"), [0, 1]),
        (["1e3", "1000"], ("1000", "1e3"), [1, 0]),
        (["2024-01-02", "2024-01-03"], ("2024-01-02", "2024-01-03"), [0, 1]),
        (["a", "NA", "null"], ("NA", "a", "null"), [1, 0, 2]),
        (["a", "a "], ("a", "a "), [0, 1]),
        (["12345678901234567890", "1"], ("1", "12345678901234567890"), [1, 0]),
    ],
)
def test_labels_of_a_csv_are_read_as_written(
    tmp_path: Path, labels: list[str], names: tuple[str, ...], ids: list[int]
) -> None:
    source = open_source(csv(tmp_path, labels))
    assert source.class_names == names
    assert source.labels_n.tolist() == ids


@pytest.mark.parametrize("labels", [["a", ""], ["1", ""], ["1", "NaN"], ["1", "null", "2"], [" ", "b"]])
def test_a_missing_label_of_a_csv_is_named(tmp_path: Path, labels: list[str]) -> None:
    row = next(k for k, label in enumerate(labels) if label.strip() in ("", "NaN", "null"))
    with pytest.raises(DataError, match=f"x.csv row {row} has no label.*Remove the row, or label it"):
        open_source(csv(tmp_path, labels))


@pytest.mark.parametrize(
    "names",
    [
        ("mytrain", "mytest"),
        ("MyTrain", "mytest", "other"),
        ("trn", "tst"),
        ("tr", "tst"),
        ("trainpets", "evalpets"),
        ("pets_trn", "pets_val"),
        ("petstrain-00-of-02", "petstrain-01-of-02", "petstest-00-of-01"),
        ("train", "bus", "tst"),
    ],
)
def test_names_that_are_splits_in_all_likelihood_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(
        DataError, match=r"x holds .*, which may be splits: it cannot be told, .*Rename them train and test"
    ):
        refuse_likely_splits(names, "x")
    if "train" in names:
        return
    for name in names:
        for label in "ab":
            (tmp_path / "folders" / name / label).mkdir(parents=True)
            Image.new("RGB", (3, 3)).save(tmp_path / "folders" / name / label / "0.png")
        (tmp_path / "tables").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": ["x", "y"], "label": ["a", "b"]}), tmp_path / "tables" / f"{name}.parquet")
    for place in ("folders", "tables"):
        with pytest.raises(DataError, match=f"{place} holds .* which may be splits|Name both by their splits"):
            open_source(tmp_path / place)


def test_names_of_things_are_no_splits() -> None:
    for names in (
        ("train", "bus"),
        ("bullet_train", "steam_train", "test_tube"),
        ("trainer", "tester"),
        ("tr", "te", "en"),
        ("trial", "trip", "valley", "device", "contest", "strain"),
        ("part-00-of-02", "part-01-of-02"),
        ("0", "1", "2"),
    ):
        refuse_likely_splits(names, "x")
    refuse_likely_splits(("train", "test"), "x", ("train", "test"))
