"""Instructions: rows, classes, what is refused, and labelled texts by a template."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tests.instructions import chats, rows

from lamina.data import (
    Message,
    Row,
    as_dict,
    as_instructions,
    audit,
    describe_source,
    from_arrays,
    instructions_from,
    open_source,
    render,
    undecoded,
)
from lamina.data.streams import class_plan, domain_plan, make_stream
from lamina.errors import ConfigError, DataError

GOOD = {"prompt": "Which?", "completion": "a", "options": ["a", "b"]}
TEMPLATE = "{text}\nOptions: {options}\nAnswer:"


def test_rows_are_read_with_their_options() -> None:
    source = instructions_from(rows(6))
    assert (source.kind, source.class_names, source.domain_names) == (
        "instructions",
        ("positive", "negative"),
        ("all",),
    )
    assert source.read(1) == Row("Review 1: the film is a bore.\nAnswer:", "negative", ("positive", "negative"))
    assert source.labels_n.tolist() == [0, 1, 0, 1, 0, 1]
    assert source.splits_n.tolist() == [0, 0, 0, 0, 2, 2]
    assert source.where(3) == "records row 3"
    assert source.layout == "items in memory: prompts with their completions, splits in 'split'"


def test_chats_end_with_their_completion() -> None:
    source = instructions_from(chats(4))
    prompt = (Message("system", "Be brief."), Message("user", "What is the capital of country 1?"))
    assert source.read(1) == Row(prompt, "Madrid")
    assert source.class_names == ("all",)
    assert np.bincount(source.splits_n, minlength=3).tolist() == [3, 0, 1]


def test_classes_are_completions_where_all_rows_of_a_domain_have_the_same_options() -> None:
    shuffled = [{**GOOD, "domain": "x"}, {**GOOD, "completion": "b", "options": ["b", "a"], "domain": "x"}]
    free = [{"prompt": "Why?", "completion": text, "domain": "y"} for text in "cd"]
    mixed = [{**GOOD, "domain": "z"}, {**GOOD, "options": ["a", "c"], "domain": "z"}]
    source = instructions_from([*free, *shuffled, *mixed])
    assert source.class_names == ("y", "x: a", "x: b", "z")
    assert source.labels_n.tolist() == [0, 0, 1, 2, 3, 3]
    # One domain: the completions alone, in the order of the options, and none that no row has.
    source = instructions_from(
        [{**GOOD, "options": ["c", "b", "a"]}, {**GOOD, "completion": "b", "options": ["c", "b", "a"]}]
    )
    assert source.class_names == ("b", "a")


def test_every_cell_is_held_out_from() -> None:
    source = instructions_from([{k: v for k, v in row.items() if k != "split"} for row in rows(20)])
    for label in (0, 1):
        assert np.bincount(source.splits_n[source.labels_n == label], minlength=3).tolist() == [8, 0, 2]


def test_streams_of_instructions() -> None:
    source = instructions_from([*rows(8, domain="b"), *rows(8, domain="a", options=None)])
    data = undecoded(source)
    stream = make_stream(data, domain_plan(data), "domain")
    assert [task.classes for task in stream] == [(0, 1), (2,)]
    assert stream.kind == "instructions"
    assert len(make_stream(data, class_plan(data, 3), "class")) == 3


def test_the_same_in_nfc() -> None:
    source = instructions_from([{"prompt": "?", "completion": "cafe\u0301", "options": ["caf\u00e9", "b"]}] * 2)
    assert source.read(0).completion == "caf\u00e9"  # type: ignore[union-attr]
    assert source.class_names == ("caf\u00e9",)


def test_fingerprint_sees_every_text() -> None:
    base = instructions_from(rows(6)).fingerprint
    for change in ({"prompt": "Other"}, {"completion": "negative"}, {"options": ["positive", "negative", "x"]}):
        changed = rows(6)
        changed[0] = {**changed[0], **change}
        assert instructions_from(changed).fingerprint != base
    assert instructions_from(rows(6)).fingerprint == base


def said(role: str, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": "a"}, "row 1 has no completion. Add one"),
        ({"prompt": "a", "completion": ""}, "row 1 has a blank completion"),
        ({"prompt": "a", "completion": " \n"}, "row 1 has a blank completion"),
        ({"prompt": "a", "completion": 3}, r"row 1 has the completion 3 \(int\); allowed is text"),
        ({"completion": "a"}, "row 1 has no prompt"),
        ({"prompt": "\t", "completion": "a"}, "row 1 has a blank prompt"),
        ({"prompt": ["a"], "completion": "a"}, r"row 1 has the prompt \['a'\] \(list\)"),
        ("text", r"row 1 is 'text' \(str\); allowed is an object"),
        ({**GOOD, "options": ["a", "b", "a"]}, "row 1 has the option 'a' more than once"),
        ({**GOOD, "options": ["a", " a"]}, "row 1 has the option 'a' more than once"),
        ({**GOOD, "options": ["b", "c"]}, r"the completion 'a', which is none of its options \(b, c\)"),
        ({**GOOD, "options": []}, "row 1 has an empty list of options"),
        ({**GOOD, "options": ["a"]}, "row 1 has the single option 'a', which would always be predicted"),
        ({**GOOD, "options": ["a", " "]}, "row 1 has a blank option 2"),
        ({**GOOD, "options": ["a", None]}, "row 1 has no option 2"),
        ({**GOOD, "options": "a b"}, r"row 1 has the options 'a b' \(str\); allowed is a list"),
        ({"messages": []}, r"row 1 has the messages \[\]; allowed is a list"),
        ({"messages": "hello"}, "row 1 has the messages 'hello'; allowed is a list"),
        ({"messages": [said("user")]}, "the last message of records row 1 has the role 'user'; allowed is assistant"),
        (
            {"messages": [said("human"), said("assistant")]},
            "message 1 of records row 1 has the role 'human'; allowed are",
        ),
        ({"messages": ["a", said("assistant")]}, "message 1 of records row 1 has the role None"),
        ({"messages": [said("user", None), said("assistant")]}, r"row 1 has no content of message 1 \(user\)"),
        ({"messages": [said("user"), said("assistant", " ")]}, r"row 1 has a blank content of message 2 \(assistant\)"),
        ({"messages": [said("assistant")]}, "the messages of records row 1 hold none of the role user"),
        ({"messages": [said("user"), said("assistant")], "completion": "a"}, "has both 'messages' and 'completion'"),
        ({"prompt": "a\ud83d", "completion": "a"}, "the prompt of records row 1 is not valid Unicode"),
        ({"prompt": "a", "completion": "\udc00"}, "the completion of records row 1 is not valid Unicode"),
        ({**GOOD, "options": ["a", "\ud83d"]}, "the option 2 of records row 1 is not valid Unicode"),
        ({"messages": [said("user", "\ud83d"), said("assistant")]}, "content of message 1 .* is not valid Unicode"),
        (
            {"prompt": "a", "completion": "a\0", "options": ["a\0", "b"], "domain": "y"},
            r"the class of records row 1, by its completion, is 'y: a.x00', which holds a control character",
        ),
        ({**GOOD, "split": "later"}, "row 1 has the split 'later'; allowed are"),
    ],
)
def test_rows_that_are_refused(record: Any, told: str) -> None:
    more = {"split": "train", "domain": "x"} if isinstance(record, dict) else {}
    good = GOOD | {key: value for key, value in more.items() if key in record}
    with pytest.raises(DataError, match=told):
        instructions_from([good, record])


def test_a_domain_that_only_some_rows_have() -> None:
    with pytest.raises(DataError, match="row 1 has no domain"):
        instructions_from([{**GOOD, "domain": "x"}, GOOD])
    with pytest.raises(DataError, match="holds no rows"):
        instructions_from([])


def test_classes_of_the_same_name_are_refused() -> None:
    pairs = [("a", "b: c"), ("a: b", "c")]
    with pytest.raises(DataError, match="two domains come to classes of the same name, 'a: b: c'"):
        instructions_from([{"prompt": "?", "completion": c, "options": [c, "z"], "domain": d} for d, c in pairs])


def test_columns_that_are_not_used_are_named() -> None:
    source = instructions_from([{**GOOD, "id": 1, "note": None}, {**chats(1)[0], "prompt": "x", "id": 2}])
    assert [str(left) for left in source.left_out] == ["columns that are not used: 2 (id, prompt)"]


def test_the_audit_finds_prompts_that_are_in_two_splits_and_completions_that_differ() -> None:
    copied = [
        {**GOOD, "prompt": "Twice  in two SPLITS", "split": "train"},
        {**GOOD, "prompt": "twice in two splits", "split": "test"},
    ]
    odd = [{**GOOD, "prompt": "Odd", "split": "train"}, {**GOOD, "prompt": "Odd", "completion": "b", "split": "train"}]
    found = audit(instructions_from([*copied, *odd]), min_per_class=1)
    assert found.leaks.groups == 1
    assert found.leaks.examples[0] == ("records row 0 [train, a]", "records row 1 [test, a]")
    assert found.conflicts.groups == 1
    assert "1 prompt in more than one split: tests will look too good" in found.problems
    assert found.untested == ("b",)


def test_a_class_that_no_training_row_has_is_named() -> None:
    source = instructions_from(
        [{**GOOD, "split": "train"}, {**GOOD, "prompt": "And?", "completion": "b", "split": "test"}]
    )
    assert audit(source).untaught == ("b",)
    assert "1 class without training items: b" in render(audit(source))


def test_what_is_said_of_instructions() -> None:
    source = instructions_from([*rows(6, domain="x"), *rows(6, domain="y", options=None)], name="films")
    lines = describe_source(source)
    assert lines[0] == "films: 12 instructions, 3 classes, 2 domains"
    assert "classes: x: positive, x: negative, y (2 to 4 training instructions each)" in lines
    assert "options: 2 in each row that has any; 6 rows without" in lines
    assert lines[-1] == "longest: prompt 37 characters (films row 1), completion 13 characters (films row 7)"
    assert as_dict(source)["instructions"]["options"] == [2, 2]
    chat = instructions_from(chats(4))
    assert {"chats: 4 rows", "options: none: any completion is allowed"} <= set(describe_source(chat))


def texts(**more: Any) -> Any:
    return from_arrays(
        ["good", "bad", "fine", "poor", "yes it is", "no", "well"],
        ["x: up", "x: down", "x: up", "x: down", "y: yes", "y: no", "x: up"],
        splits=["train", "train", "test", "test", "train", "test", "train"],
        domains=["x", "x", "x", "x", "y", "y", "x"],
        **more,
    )


def test_labelled_texts_by_a_template() -> None:
    source = texts()
    made = as_instructions(source, TEMPLATE)
    assert made.kind == "instructions"
    assert made.class_names == source.class_names
    np.testing.assert_array_equal(made.labels_n, source.labels_n)
    assert made.read(0) == Row("good\nOptions: x: down, x: up\nAnswer:", "x: up", ("x: down", "x: up"))
    answers = ["up", "down", "up", "down", "yes", "no", "up"]
    told = as_instructions(source, "{domain}? {{{text}}}", answers)
    assert told.read(1) == Row("x? {bad}", "down", ("down", "up"))
    # y: no has no training row: it is no option, and a test row of it has a completion that is none.
    assert told.read(5) == Row("y? {no}", "no", ("yes",))
    assert told.where(5) == "arrays[5]"
    assert told.layout == (
        "items in memory; prompts by the template '{domain}? {{{text}}}', completions from the answers given"
    )
    assert (
        len({source.fingerprint, made.fingerprint, told.fingerprint, as_instructions(source, "{text}").fingerprint})
        == 4
    )


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{text} {label}", r"has the field {label}; allowed are {text}, {options}, {domain}"),
        ("{text.__class__}", r"has the field {text.__class__}"),
        ("{text!r}", r"has the field {text!r}"),
        ("{text:>9}", r"has the field {text:>9}"),
        ("{}", r"has the field {}"),
        ("{options}", r"without {text}"),
        ("", r"without {text}"),
        ("{text", r"is no template"),
        ("{text} }", r"is no template"),
    ],
)
def test_templates_that_are_refused(template: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        as_instructions(texts(), template)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (
            ["up", "down", "more", "down", "yes", "no", "up"],
            r"arrays\[2\] has the answer 'more', and arrays\[0\], of the same",
        ),
        (
            ["up", "up", "up", "up", "yes", "no", "up"],
            "classes 'x: down' and 'x: up' of domain 'x' have the same answer, 'up'",
        ),
        (["up", " ", "up", "down", "yes", "no", "up"], r"arrays\[1\] has a blank answer"),
        (["up", None, "up", "down", "yes", "no", "up"], r"arrays\[1\] has no answer"),
        (["up"], "holds 7 rows but 1 answers"),
    ],
)
def test_answers_that_are_refused(answers: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        as_instructions(texts(), TEMPLATE, answers)


def test_images_and_blank_texts_are_no_prompts() -> None:
    with pytest.raises(DataError, match="holds no labelled texts"):
        as_instructions(from_arrays(np.zeros((2, 4, 4), np.uint8), [0, 1]), TEMPLATE)
    made = as_instructions(from_arrays(["a", " "], ["x", "y"], splits=["train", "train"]), TEMPLATE)
    with pytest.raises(DataError, match=r"arrays\[1\] has a blank text"):
        made.read(1)


def test_a_column_of_answers(tmp_path: Path) -> None:
    table = {
        "text": ["a", "b", "c"],
        "label": ["t: x", "t: y", "t: x"],
        "answer": ["x", "y", "x"],
        "reply": ["1", "2", "1"],
    }
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    plain = pa.table({name: table[name] for name in ("text", "label")})
    parquet.write_table(plain, tmp_path / "b.parquet")
    assert source.fingerprint == open_source(tmp_path / "b.parquet").fingerprint
    made = as_instructions(source, TEMPLATE)
    assert made.read(1) == Row("b\nOptions: x, y\nAnswer:", "y", ("x", "y"))
    assert made.layout.endswith("completions from the column of answers")
    (tmp_path / "c.csv").write_text("text,label,answer\na,0,no\nb,1,yes\n")
    assert as_instructions(open_source(tmp_path / "c.csv"), TEMPLATE).read(1).completion == "yes"  # type: ignore[union-attr]


def test_a_column_of_answers_is_nothing_to_encoders(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a", "b"], "label": [0, 1], "answer": [None, 3]}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source.kind == "text"
    with pytest.raises(DataError, match=r"a.parquet row 0 has no answer"):
        as_instructions(source, TEMPLATE)


@pytest.mark.shared
def test_the_shared_tasks() -> None:
    shared = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "text14"
    if not shared.is_dir():
        pytest.skip("the shared datasets are not beside this checkout")
    source = open_source(shared)
    made = as_instructions(source, TEMPLATE)
    assert len(made.domain_names) == 14
    assert made.class_names == source.class_names
    row = made.read(0)
    assert isinstance(row, Row)
    assert row.completion in row.options
    assert f"Options: {', '.join(row.options)}\nAnswer:" in str(row.prompt)
