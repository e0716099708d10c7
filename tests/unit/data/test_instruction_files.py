"""Files and folders of instructions: JSON lines, JSON, Parquet, saved datasets, and the layouts of benchmarks."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from tests.instructions import chats, rows

from lamina.data import Columns, Message, Row, open_source
from lamina.data.records import Source
from lamina.errors import DataError


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def bare(n: int = 4) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "split"} for row in rows(n)]


def counts(source: Source) -> list[int]:
    return np.bincount(source.splits_n, minlength=3).tolist()  # type: ignore[no-any-return]


def left(source: Source) -> list[str]:
    return list(map(str, source.left_out))


def test_json_lines(tmp_path: Path) -> None:
    file = put(tmp_path / "films.jsonl", "\ufeff" + lines(rows(3)) + "\n  \n" + lines(rows(3)))
    source = open_source(file)
    assert (source.kind, source.name, len(source)) == ("instructions", "films", 6)
    assert source.where(4) == "films.jsonl:7"
    assert source.layout.startswith("rows in 1 file (jsonl): prompts with their completions, splits in 'split'")
    # A text may hold what other programs take for the end of a line.
    odd = put(
        tmp_path / "odd.jsonl",
        json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False) + "\n" + lines(bare(1)),
    )
    assert open_source(odd).read(0).prompt == "a\u2028b"  # type: ignore[union-attr]


def test_a_json_list(tmp_path: Path) -> None:
    source = open_source(put(tmp_path / "films.json", rows(6)), kind="instructions")
    assert (len(source), source.where(2)) == (6, "films.json row 2")
    assert counts(source) == [4, 0, 2]


def test_other_names_of_columns(tmp_path: Path) -> None:
    records = [
        {"question": f"{k}?", "reply": "ab"[k % 2], "choices": ["a", "b"], "task": "x", "part": "train"}
        for k in range(4)
    ]
    columns = Columns(prompt="question", completion="reply", options="choices", domain="task", split="part")
    source = open_source(put(tmp_path / "a.jsonl", lines(records)), columns=columns)
    assert source.read(1) == Row("1?", "b", ("a", "b"))
    assert source.domain_names == ("x",)


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(rows(6)), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source.read(0) == Row("Review 0: the film is a joy.\nAnswer:", "positive", ("positive", "negative"))
    assert source.where(1) == "a.parquet row 1"
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(chats(4)), "test": datasets.Dataset.from_list(chats(2))}
    ).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert counts(source) == [4, 0, 2]
    assert source.read(0).prompt[1] == Message("user", "What is the capital of country 0?")  # type: ignore[union-attr]
    (tmp_path / "f").mkdir()
    for split in ("train", "test"):
        parquet.write_table(pa.Table.from_pylist(bare()), tmp_path / "f" / f"{split}.parquet")
    source = open_source(tmp_path / "f")
    assert counts(source) == [4, 0, 4]


def test_labelled_tables_stay_what_they_are(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": [0, 1], "messages": ["x", "y"], "prompt": ["p", "q"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").kind == "text"
    parquet.write_table(table.select(["text", "label"]), tmp_path / "b.parquet")
    told = r"b.parquet has neither the columns 'prompt' and 'completion' nor .*columns: text, label"
    with pytest.raises(DataError, match=told):
        open_source(tmp_path / "b.parquet", kind="instructions")


def test_folders_are_domains_and_names_of_files_are_splits(tmp_path: Path) -> None:
    for domain in ("films", "books"):
        for split in ("train", "dev", "test"):
            put(tmp_path / domain / f"{split}.jsonl", lines(bare()))
    put(tmp_path / "README.json", {"domains": ["films", "books"]})
    put(tmp_path / "notes.txt", "x")
    put(tmp_path / ".hidden" / "train.jsonl", "{")
    put(tmp_path / "films" / "dataset_info.json", {"features": {}})
    source = open_source(tmp_path)
    assert source.domain_names == ("films", "books")
    assert counts(source) == [8, 8, 8]
    assert source.class_names == ("films: positive", "films: negative", "books: positive", "books: negative")
    assert "domains told by the names of folders" in source.layout
    assert left(source) == [
        "JSON files without a list of rows: 1 (films/dataset_info.json)",
        "files that are neither JSON, JSON lines nor Parquet: 1 (notes.txt)",
        "hidden and system files and folders: 1 (.hidden)",
    ]


def test_folders_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for domain in ("films", "books"):
            put(tmp_path / "data" / split / domain / "part-0.jsonl", lines(bare()))
    source = open_source(tmp_path)
    assert source.domain_names == ("books", "films")
    assert counts(source) == [8, 0, 8]


def test_parquet_in_folders(tmp_path: Path) -> None:
    for domain in ("a", "b"):
        (tmp_path / domain).mkdir()
        parquet.write_table(pa.Table.from_pylist(bare()), tmp_path / domain / "x.parquet")
    assert open_source(tmp_path).domain_names == ("a", "b")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["train.jsonl", "more.jsonl"], "the name of train.jsonl tells a split, that of more.jsonl does not"),
        (["mytrain.jsonl", "mytest.jsonl"], "may be splits: it cannot be told"),
        (["trn/a.jsonl", "tst/a.jsonl"], "may be splits: it cannot be told"),
        (["train/test.jsonl", "test/test.jsonl", "train/train.jsonl"], "test.jsonl is of two splits"),
        (["a.jsonl", "films/a.jsonl"], "lies beside the folder 'films', which is read as a domain"),
    ],
)
def test_places_that_cannot_be_told(tmp_path: Path, files: list[str], told: str) -> None:
    for file in files:
        put(tmp_path / file, lines(bare()))
    with pytest.raises(DataError, match=told):
        open_source(tmp_path)


def test_columns_that_contradict_their_place(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", lines([{**row, "split": "train"} for row in bare()]))
    put(tmp_path / "test.jsonl", lines([{**row, "split": "train"} for row in bare()]))
    with pytest.raises(
        DataError, match=r"test.jsonl:1 is of the split train by its column 'split', but of test by its place"
    ):
        open_source(tmp_path)
    put(tmp_path / "x" / "a" / "a.jsonl", lines([{**row, "domain": "b"} for row in bare()]))
    put(tmp_path / "x" / "b" / "a.jsonl", lines([{**row, "domain": "b"} for row in bare()]))
    with pytest.raises(DataError, match="is of the domain 'b' by its column 'domain', but of 'a' by its folder"):
        open_source(tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"prompt": "a", "completion": "b"', r"a.jsonl:3 is not valid JSON"),
        ('{"prompt": "a", "completion": NaN}', r"a.jsonl:3 is not valid JSON \(NaN is no number"),
        ('{"prompt": -Infinity}', r"a.jsonl:3 is not valid JSON"),
        ('{"prompt": "a", "prompt": "b"}', r"a.jsonl:3 is not valid JSON \(the key 'prompt' is there more than once"),
        ("[" * 200_000, r"a.jsonl:3 is nested too deep"),
        ('{"n": ' + "9" * 10_000 + "}", r"a.jsonl:3 is not valid JSON"),
        ("7", r"a.jsonl:3 is 7 \(int\); allowed is an object"),
        ('{"prompt": "a\\ud83d", "completion": "b"}', r"the prompt of a.jsonl:3 is not valid Unicode"),
        ('{"prompt": "a"}', r"a.jsonl:3 has no completion"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, content: str, told: str) -> None:
    file = put(tmp_path / "a.jsonl", lines(bare(2)) + content + "\n")
    for where in (file, tmp_path):
        with pytest.raises(DataError, match=told):
            open_source(where)


def test_files_that_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(bare(1)).encode() + b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2 is not text in UTF-8"):
        open_source(file)
    for content, told in (
        ("", "not valid JSON"),
        ("{}", "holds no rows: it is empty"),
        ("[]", "holds no rows: it is empty"),
        ('{"data": []}', "allowed is a list of rows"),
        ('[{"prompt": "a", "answr": "b"}]', "The columns found: prompt, answr; completion is missing"),
    ):
        with pytest.raises(DataError, match=told):
            open_source(put(tmp_path / "b.json", content))
    with pytest.raises(DataError, match=r"c.json holds no rows .*The columns found: text, label"):
        open_source(put(tmp_path / "c.json", [{"text": "a", "label": 0}]))
    with pytest.raises(DataError, match="a file of instructions, but the kind asked for is text"):
        open_source(file, kind="text")
    with pytest.raises(DataError, match="a CSV file, which can only hold labelled texts"):
        open_source(put(tmp_path / "d.csv", "prompt,completion\na,b\n"))
    with pytest.raises(DataError, match="a CSV file, which can only hold labelled texts"):
        open_source(put(tmp_path / "e.csv", "text,label\na,b\n"), kind="instructions")
    with pytest.raises(DataError, match="holds images, but the kind asked for is instructions"):
        open_source("digits", kind="instructions")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no rows with the columns"):
        open_source(tmp_path / "empty", kind="instructions")
    put(tmp_path / "t" / "train.json", {"rows": []})
    put(tmp_path / "t" / "x.jsonl", lines(bare(2)))
    with pytest.raises(DataError, match=r"train.json holds .* \(dict\); allowed is a list of rows"):
        open_source(tmp_path / "t")


def test_images_with_descriptions_beside_them_stay_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.new("RGB", (3, 3)).save(tmp_path / name / f"{k}.png")
    put(tmp_path / "metadata.jsonl", lines(bare()))
    assert open_source(tmp_path).kind == "image"


def test_links_that_leave_the_folder_lead_to_no_pipe(tmp_path: Path) -> None:
    put(tmp_path / "away" / "a.jsonl", lines(bare()))
    (tmp_path / "data" / "x").mkdir(parents=True)
    put(tmp_path / "data" / "x" / "a.jsonl", lines(bare()))
    (tmp_path / "data" / "y").symlink_to(tmp_path / "away")
    (tmp_path / "data" / "z").symlink_to(tmp_path / "data")
    source = open_source(tmp_path / "data")
    assert source.domain_names == ("x", "y")
    assert left(source) == ["links to folders that are read already: 1 (z)"]


def test_trace(tmp_path: Path) -> None:
    for task in ("C-STANCE", "ScienceQA"):
        for name, n in (("train", 3), ("eval", 1), ("test", 2)):
            put(tmp_path / task / f"{name}.json", [{"prompt": f"{task} {name} {k}?", "answer": "A"} for k in range(n)])
    source = open_source(tmp_path)
    assert source.domain_names == source.class_names == ("C-STANCE", "ScienceQA")
    assert counts(source) == [6, 2, 4]
    assert source.read(0) == Row("C-STANCE eval 0?", "A")
    assert source.layout.startswith("TRACE, 6 files (the column answer is the completion, eval the split val)")
    put(tmp_path / "ScienceQA" / "test.json", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"ScienceQA/test.json row 0 has no completion"):
        open_source(tmp_path)


def test_cl_benchmark_of_o_lora(tmp_path: Path) -> None:
    for kind, name, labels in (("SC", "amazon", ["bad", "good"]), ("COPA", "COPA", ["A", "B"])):
        for split in ("train", "dev", "test"):
            instances = [{"label": labels[k % 2], "sentence": f"{name} {k}"} for k in range(4)]
            put(tmp_path / kind / name / f"{split}.json", instances)
        put(tmp_path / kind / name / "labels.json", labels)
    source = open_source(tmp_path)
    assert source.domain_names == ("COPA", "amazon")
    assert source.class_names == ("COPA: A", "COPA: B", "amazon: bad", "amazon: good")
    assert counts(source) == [8, 8, 8]
    assert source.read(0) == Row("COPA 0\nAnswer:", "A", ("A", "B"))
    assert source.read(13) == Row(
        "What is the sentiment of the following paragraph? Choose one from the option.\nOption: bad, good \namazon 1\nAnswer:",
        "good",
        ("bad", "good"),
    )
    assert source.layout.startswith("CL_Benchmark of O-LoRA, 2 datasets: ")
    # A single dataset is asked in the same way.
    assert open_source(tmp_path / "SC" / "amazon").read(1) == source.read(13)
    put(tmp_path / "SC" / "amazon" / "dev.json", [{"label": "so so", "sentence": "x"}])
    with pytest.raises(
        DataError, match=r"SC/amazon/dev.json row 0 has the completion 'so so', which is none of its options"
    ):
        open_source(tmp_path)
    put(tmp_path / "SC" / "amazon" / "dev.json", [{"label": "bad"}])
    with pytest.raises(DataError, match=r"SC/amazon/dev.json row 0 has no sentence"):
        open_source(tmp_path)
    put(tmp_path / "SC" / "amazon" / "labels.json", ["a", "a"])
    with pytest.raises(DataError, match=r"labels.json holds .*; allowed is a list of different labels"):
        open_source(tmp_path)


def test_an_unknown_type_of_task(tmp_path: Path) -> None:
    put(tmp_path / "Odd" / "x" / "train.json", [{"label": "a", "sentence": f"s{k}"} for k in range(5)])
    put(tmp_path / "Odd" / "x" / "labels.json", ["a", "b"])
    source = open_source(tmp_path)
    assert source.read(0) == Row("Option: a, b \ns0\nAnswer:", "a", ("a", "b"))
    assert "(no instruction is known for the task type Odd)" in source.layout


def task(n: int = 5) -> dict[str, Any]:
    return {
        "Contributors": ["x"],
        "Definition": ["Translate."],
        "Positive Examples": [{"input": "a", "output": "b"}],
        "Negative Examples": [],
        "Instances": [
            {"id": str(k), "input": f"in {k}", "output": [f"out {k}", "other"][: 1 + k % 2]} for k in range(n)
        ],
    }


def test_super_natural_instructions(tmp_path: Path) -> None:
    for k in (1, 2):
        put(tmp_path / "tasks" / f"task00{k}_words.json", task())
    put(tmp_path / "tasks" / "README.md", "x")
    source = open_source(tmp_path)
    assert source.domain_names == source.class_names == ("task001_words", "task002_words")
    assert source.read(1) == Row("Definition: Translate.\n\nInput: in 1\nOutput:", "out 1")
    assert counts(source) == [8, 0, 2]
    assert "(the first output is the completion)" in source.layout
    assert left(source) == [
        "examples of task files: 2 (tasks/task001_words.json: Positive Examples, tasks/task002_words.json: Positive Examples)",
        "files that are neither JSON, JSON lines nor Parquet: 1 (tasks/README.md)",
        "rows with further outputs: 4 (tasks/task001_words.json row 1, tasks/task001_words.json row 3,"
        " tasks/task002_words.json row 1, ...)",
    ]
    assert len(open_source(tmp_path / "tasks" / "task001_words.json")) == 5
    for change, told in (
        ({"Instances": []}, "task001_words.json has the Instances"),
        ({"Definition": ["a", "b"]}, "task001_words.json has the Definition"),
        ({"Instances": [{"input": "a", "output": []}]}, r"task001_words.json row 0 has the output \[\]"),
        ({"Instances": [{"output": ["a"]}]}, r"task001_words.json row 0 has no input"),
        ({"Instances": ["a"]}, r"task001_words.json row 0 is 'a'"),
    ):
        put(tmp_path / "tasks" / "task001_words.json", {**task(), **change})
        with pytest.raises(DataError, match=told):
            open_source(tmp_path)


def test_a_first_row_without_a_completion_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", lines([{"prompt": "a"}, {"prompt": "b", "completion": "c"}]))
    with pytest.raises(DataError, match=r"a.jsonl:1 has no completion"):
        open_source(tmp_path / "a.jsonl")
