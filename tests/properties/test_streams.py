"""Streams: what every cut of a dataset keeps, whatever the data and the plan."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.streams import PlannedTask, Stream, class_plan, domain_plan, make_stream, named_plan
from lamina.errors import DataError
from lamina.types import LabelledData

often = settings(deadline=None, max_examples=40, derandomize=True)
SPLIT = {"train": 0, "val": 1, "test": 2}


def make_data(labels: list[int], domains: list[int], splits: list[int], classes: int, count: int = 1) -> LabelledData:
    return LabelledData(
        kind="image",
        name="small",
        table=None,  # no stream looks at an input
        labels_n=np.array(labels, np.int64),
        domains_n=np.array(domains, np.int64),
        splits_n=np.array(splits, np.int64),
        class_names=tuple(f"c{i}" for i in range(classes)),
        domain_names=tuple(f"d{i}" for i in range(count)),
        fingerprint="f",
    )


@st.composite
def datasets(draw: st.DrawFn, validation: bool = True) -> LabelledData:
    """Every class in every domain has something to train and to test on, and any number of further rows."""
    classes, domains = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    cells = [(c, d) for c in range(classes) for d in range(domains)]
    rows = [(c, d, split) for c, d in cells for split in (0, 2)]
    split = st.integers(0, 2) if validation else st.sampled_from([0, 2])
    rows += draw(st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, domains - 1), split), max_size=60))
    rows = draw(st.permutations(rows))
    return make_data(*(list(column) for column in zip(*rows, strict=True)), classes, domains)


def rows_of(stream: Stream, split: str) -> list[int]:
    return [int(row) for task in stream for row in task.split(split).rows_n]


@often
@given(datasets(), st.data())
def test_every_row_is_in_exactly_one_task(data: LabelledData, draw: st.DataObject):
    tasks, seed = draw.draw(st.integers(1, len(data.class_names))), draw.draw(st.none() | st.integers(0, 9))
    streams = [make_stream(data, class_plan(data, tasks, seed), "class")]
    if len(data.domain_names) > 1:
        streams.append(make_stream(data, domain_plan(data), "domain"))
    for stream in streams:
        for split, number in SPLIT.items():
            assert sorted(rows_of(stream, split)) == np.flatnonzero(data.splits_n == number).tolist()
        for task in stream:
            for split in SPLIT:
                part = task.split(split)
                assert np.array_equal(part.labels_n, data.labels_n[part.rows_n])
                assert set(part.labels_n) <= set(task.classes)
            assert set(task.train.labels_n) == set(task.classes)


@often
@given(datasets(), st.data())
def test_classes_are_shared_out_once_and_as_equally_as_can_be(data: LabelledData, draw: st.DataObject):
    count = len(data.class_names)
    tasks, seed = draw.draw(st.integers(1, count)), draw.draw(st.none() | st.integers(0, 99))
    plan = class_plan(data, tasks, seed)
    sizes = [len(task.classes) for task in plan]
    assert len(plan) == tasks
    assert sorted(label for task in plan for label in task.classes) == list(range(count))
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert len({task.name for task in plan}) == tasks
    assert sorted(task.name for task in plan) == [task.name for task in plan]
    ordered = class_plan(data, tasks)
    assert [len(task.classes) for task in ordered] == sizes, "a seed of the order permutes classes, and nothing else"
    assert [label for task in ordered for label in task.classes] == list(range(count))


def test_the_order_of_classes_is_drawn_from_its_seed():
    data = make_data([*range(30)] * 2, [0] * 60, [0] * 30 + [2] * 30, 30)
    orders = {seed: tuple(c for task in class_plan(data, 5, seed) for c in task.classes) for seed in range(5)}
    assert len(set(orders.values())) == 5
    assert all(orders[seed] == tuple(c for t in class_plan(data, 3, seed) for c in t.classes) for seed in orders)


@often
@given(datasets(), st.data())
def test_joined_is_exactly_the_union(data: LabelledData, draw: st.DataObject):
    stream = make_stream(data, class_plan(data, draw.draw(st.integers(1, len(data.class_names))), 3), "class")
    whole = stream.joint()
    assert len(whole) == 1
    assert whole[0].classes == tuple(label for task in stream for label in task.classes)
    for split in SPLIT:
        assert rows_of(whole, split) == rows_of(stream, split)
        assert np.array_equal(whole[0].split(split).labels_n, data.labels_n[rows_of(stream, split)])
    assert whole.fingerprint != stream.fingerprint
    assert whole.joint()[0].train.rows_n.tolist() == whole[0].train.rows_n.tolist()


def test_the_first_tasks_are_those_of_the_whole_stream():
    data = make_data([0, 1, 2] * 2, [0] * 6, [0] * 3 + [2] * 3, 3)
    whole = make_stream(data, class_plan(data, 3), "class")
    first = whole.first(2)
    assert first.tasks == whole.tasks[:2]
    assert len({whole.fingerprint, first.fingerprint, whole.first(1).fingerprint}) == 3
    assert [len(first.joint()), first.joint()[0].classes] == [1, whole[0].classes + whole[1].classes]
    with pytest.raises(DataError, match=r"stream.first = 4: the stream has 3 tasks. Choose 1 to 3"):
        whole.first(4)


def test_joined_domains_name_every_class_once():
    data = make_data([0, 1] * 4, [0, 0, 1, 1] * 2, [0] * 4 + [2] * 4, 2, 2)
    assert make_stream(data, domain_plan(data), "domain").joint()[0].classes == (0, 1)


@often
@given(datasets(), st.integers(1, 4))
def test_per_class_limits_every_class_of_every_domain(data: LabelledData, most: int):
    plan = class_plan(data, 1)
    limited, full = make_stream(data, plan, "class", per_class=most), make_stream(data, plan, "class")
    cells = Counter((data.labels_n[row], data.domains_n[row]) for row in rows_of(limited, "train"))
    available = Counter((data.labels_n[row], data.domains_n[row]) for row in rows_of(full, "train"))
    assert cells == {cell: min(most, n) for cell, n in available.items()}
    assert set(rows_of(limited, "train")) <= set(rows_of(full, "train"))
    for split in ("val", "test"):
        assert rows_of(limited, split) == rows_of(full, split)
    more = make_stream(data, plan, "class", per_class=most + 1)
    assert set(rows_of(limited, "train")) <= set(rows_of(more, "train")), "a larger limit adds, and exchanges nothing"


@often
@given(datasets(validation=False), st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_held_out_examples_are_stratified_and_not_trained_on(data: LabelledData, share: float):
    plan = class_plan(data, len(data.class_names))
    whole, cut = make_stream(data, plan, "class"), make_stream(data, plan, "class", validation=share)
    assert sorted(rows_of(cut, "train") + rows_of(cut, "val")) == sorted(rows_of(whole, "train"))
    assert rows_of(cut, "test") == rows_of(whole, "test")
    held = Counter((data.labels_n[row], data.domains_n[row]) for row in rows_of(cut, "val"))
    cells = Counter((data.labels_n[row], data.domains_n[row]) for row in rows_of(whole, "train"))
    for cell, n in cells.items():
        assert held[cell] == min(max(1, round(share * n)), n - 1), "near the share, and at least one is left"


@given(datasets(validation=False), st.integers(1, 3))
def test_what_is_held_out_is_not_taken_from_the_limit(data: LabelledData, most: int):
    plan = class_plan(data, 1)
    held = make_stream(data, plan, "class", validation=0.5)[0]
    limited = make_stream(data, plan, "class", validation=0.5, per_class=most)[0]
    for split in ("train", "val"):
        whole, few = (task.split(split) for task in (held, limited))
        cells = [list(zip(e.labels_n, data.domains_n[e.rows_n], strict=True)) for e in (whole, few)]
        assert set(few.rows_n) <= set(whole.rows_n)
        assert all(cells[1].count(cell) == min(most, cells[0].count(cell)) for cell in cells[0])


@given(datasets(), st.integers(1, 3))
def test_what_is_measured_can_be_limited_and_what_is_trained_on_stays(data: LabelledData, most: int):
    plan = class_plan(data, 1)
    full, few = make_stream(data, plan, "class")[0], make_stream(data, plan, "class", measured_per_class=most)[0]
    assert few.train.rows_n.tolist() == full.train.rows_n.tolist()
    for split in ("val", "test"):
        cells = [
            list(zip(task.split(split).labels_n, data.domains_n[task.split(split).rows_n], strict=True))
            for task in (full, few)
        ]
        assert all(cells[1].count(cell) == min(most, cells[0].count(cell)) for cell in cells[0])


def test_a_task_is_limited_as_a_whole_with_equal_numbers_of_its_classes():
    labels = [0] * 9 + [1] * 2 + [2] * 9 + [0, 1, 2] * 4
    data = make_data(labels, [0] * len(labels), [0] * 20 + [2] * 12, 3)
    plan = [PlannedTask(name="one", classes=(0, 1, 2))]
    stream = make_stream(data, plan, "mixed", per_task=10, measured_per_task=6)
    assert Counter(stream[0].train.labels_n.tolist()) == {0: 4, 1: 2, 2: 4}
    assert Counter(stream[0].test.labels_n.tolist()) == {0: 2, 1: 2, 2: 2}
    smaller = make_stream(data, plan, "mixed", per_task=4, measured_per_task=6)
    assert set(smaller[0].train.rows_n) < set(stream[0].train.rows_n)
    whole = make_stream(data, plan, "mixed", per_task=20)
    assert (len(whole[0].train), len(whole[0].test)) == (20, 12)


def test_the_order_of_domains_is_drawn_from_its_seed():
    data = make_data([0, 0] * 6, [k // 2 for k in range(12)], [0, 2] * 6, 1)
    names = [f"d{k}" for k in range(6)]
    data = replace(data, domain_names=tuple(names))
    given = [task.name for task in domain_plan(data)]
    drawn = [[task.name for task in domain_plan(data, None, seed)] for seed in (1, 2, 1)]
    assert given == names
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
    assert sorted(drawn[0]) == sorted(drawn[1]) == names
    assert [task.name for task in domain_plan(data, names[::-1])] == names[::-1]


def test_the_datas_own_validation_split_is_used_as_it_is():
    data = make_data([0] * 9, [0] * 9, [0] * 5 + [1] * 2 + [2] * 2, 1)
    stream = make_stream(data, class_plan(data, 1), "class", validation=0.5)
    assert (len(stream[0].train), stream[0].val.rows_n.tolist()) == (5, [5, 6])


def test_a_fingerprint_is_of_the_data_the_plan_and_the_rows():
    data = make_data([0, 1, 2, 3] * 8, [0] * 32, [0] * 20 + [2] * 12, 4)

    def print_of(data: LabelledData = data, tasks: int = 2, seed: int | None = None, **cut: object) -> str:
        return make_stream(data, class_plan(data, tasks, seed), "class", **cut).fingerprint

    others = [
        print_of(replace(data, fingerprint="g")),
        print_of(tasks=4),
        print_of(seed=1),
        print_of(per_class=2),
        print_of(per_class=3),
        print_of(validation=0.2),
        make_stream(data, [PlannedTask(name="other", classes=(0, 1, 2, 3))], "class").fingerprint,
    ]
    assert len({print_of(), *others}) == 1 + len(others)
    assert print_of() == print_of()
    assert print_of(per_class=99) == print_of(), "the same rows, however they were chosen"


def test_a_stream_has_no_cursor():
    data = make_data([0, 1] * 4, [0] * 8, [0] * 4 + [2] * 4, 2)
    stream = make_stream(data, class_plan(data, 2), "class")
    assert [(a.name, b.name) for a in stream for b in stream] == [
        (a, b) for a in ("task-01", "task-02") for b in ("task-01", "task-02")
    ]
    with pytest.raises(AttributeError):
        stream.tasks = ()


def test_a_named_plan_makes_a_mixed_stream():
    data = make_data([0, 1, 2] * 8, [0] * 12 + [1] * 12, ([0] * 6 + [2] * 6) * 2, 3, 2)
    stream = make_stream(data, named_plan(data, [("a", ["c0", "c2"], ["d0"]), ("b", ["c2", "c1"], ["d1"])]), "mixed")
    assert [(task.name, task.classes, task.domain) for task in stream] == [("a", (0, 2), "d0"), ("b", (2, 1), "d1")]
    assert set(data.domains_n[stream[1].train.rows_n]) == {1}


# ------------------------------------------------------------------------------------------------------------ refusals

DATA = make_data([0, 1, 2] * 8, [0] * 12 + [1] * 12, ([0] * 6 + [2] * 6) * 2, 3, 2)


@pytest.mark.parametrize("tasks", [0, 4, -1])
def test_more_tasks_than_classes(tasks: int):
    with pytest.raises(DataError, match=rf"stream.tasks = {tasks}: 'small' has 3 classes.*Choose 1 to 3 tasks"):
        class_plan(DATA, tasks)


def test_domains_that_there_are_not():
    with pytest.raises(DataError, match=r"stream.domains: 'd8', 'd9' not found in 'small', whose domains are d0, d1"):
        domain_plan(DATA, ["d8", "d0", "d9"])


@pytest.mark.parametrize("domains", [["d0"], ["d0", "d0"]], ids=["one", "twice"])
def test_domains_that_make_no_stream(domains: list[str]):
    with pytest.raises(
        DataError, match=r"stream.domains = .*two or more different domains of 'small', which has \['d0'"
    ):
        domain_plan(DATA, domains)


def test_unknown_names_are_all_told_at_once():
    plan = [("a", ["c0", "cat"], None), ("b", ["dog"], ["mars"])]
    with pytest.raises(
        DataError, match=r"no class 'cat' of task 'a', no class 'dog' of task 'b', no domain 'mars'.*'c2'"
    ):
        named_plan(DATA, plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([("a", (0, 1), None), ("b", (1, 2), None)], "tasks 'a' and 'b' share training examples"),
        ([("a", (0,), None), ("b", (0,), (1,))], "tasks 'a' and 'b' share training examples"),
        ([("a", (0,), (0,)), ("a", (1,), None)], r"task names repeat: \['a', 'a'\]"),
        ([("a", (0, 1, 2), (7,))], "task 'a' of 'small' has no train example"),
        ([("a", (9,), None)], "task 'a' of 'small' has no train example"),
    ],
    ids=["class twice", "domain twice", "one name", "empty domain", "empty class"],
)
def test_plans_that_make_no_stream(plan: list, message: str):
    with pytest.raises(DataError, match=message):
        make_stream(DATA, [PlannedTask(name=n, classes=c, domains=d) for n, c, d in plan], "mixed")


@pytest.mark.parametrize(("missing", "name"), [(2, "test"), (0, "train")])
@pytest.mark.parametrize("cut", [{}, {"per_class": 2}, {"validation": 0.2}], ids=["plain", "per_class", "validation"])
def test_a_split_without_examples(missing: int, name: str, cut: dict):
    data = replace(DATA, splits_n=np.full_like(DATA.splits_n, 2 - missing))
    with pytest.raises(DataError, match=f"has no {name} example: nothing could be {name}ed on"):
        make_stream(data, class_plan(data, 1), "class", **cut)


# ------------------------------------------------------------------------- a class needs something to be trained on


def without_training(label: int) -> LabelledData:
    """Four classes with three training and two test examples each, but none to train on for one of them."""
    labels = [c for c in range(4) for _ in range(5)]
    splits = [2 if k >= 3 or c == label else 0 for c in range(4) for k in range(5)]
    return make_data(labels, [0] * 20, splits, 4)


@pytest.mark.parametrize("label", range(4))
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_class_without_a_training_example_is_refused_by_name(label: int, tasks: int):
    data = without_training(label)
    with pytest.raises(DataError, match=rf"no training example of class 'c{label}' \(0 train, 0 val, 5 test\)"):
        make_stream(data, class_plan(data, tasks), "class")


def test_also_one_whose_only_training_examples_are_of_another_domain():
    data = make_data([0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1], [0, 0, 0, 2, 2, 2], 2, 2)
    plan = (PlannedTask(name="a", classes=(0, 1), domains=(0,)), PlannedTask(name="b", classes=(0, 1), domains=(1,)))
    with pytest.raises(DataError, match=r"task 'b' .* no training example of class 'c1'"):
        make_stream(data, plan, "mixed")
    assert len(make_stream(data, (plan[0],), "mixed")) == 1


def test_skipped_items_are_named_as_a_possible_cause():
    data = replace(without_training(1), skipped=("a.png", "b.png"))
    with pytest.raises(DataError, match="2 damaged items were skipped"):
        make_stream(data, class_plan(data, 2), "class")
