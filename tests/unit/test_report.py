"""The report: what it says is what lamina.maths.metrics says, it asks nothing of the network, and trusts no text."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina import report
from lamina.errors import RunError
from lamina.maths import metrics
from lamina.maths.metrics import DEFINITIONS, FORMULAS
from lamina.record import Record
from lamina.report import charts, text
from lamina.report.run_view import OF_LANGUAGE

VOID = {"meta", "link", "br", "hr", "img"}
OPTIONAL = {"th", "td", "tr", "li", "p"}


def content(
    name: str = "inflora", tasks: int = 3, learnt: int | None = None, per_task: int = 2, **more: Any
) -> dict[str, Any]:
    """A record as JSON, with made-up figures: each task loses four of its hundred correct predictions per later task."""
    learnt = tasks if learnt is None else learnt
    names = [f"task-{i + 1:02d}" for i in range(tasks)]
    classes = [[f"class {i * per_task + c}" for c in range(per_task)] for i in range(tasks)]
    total = [[100 if j <= i else 0 for j in range(learnt)] for i in range(learnt)]
    correct = [[max(0, 95 - 4 * (i - j)) if j <= i else 0 for j in range(learnt)] for i in range(learnt)]
    return {
        "format": 2,
        "name": name,
        "created": "2026-11-20T08:00:00Z",
        "method": {
            "name": name,
            "title": "A Paper",
            "authors": "Liang & Li",
            "venue": "CVPR 2024",
            "link": "https://arxiv.org/abs/2404.00228",
            "departures": ["rank 10"],
        },
        "seed": 0,
        "config": {"method": {"name": name, "rank": 10}, "seed": 0},
        "stream": {
            "scenario": "class-incremental",
            "fingerprint": "ab12",
            "data": "digits",
            "tasks": [{"name": n, "classes": c, "domain": None} for n, c in zip(names, classes, strict=True)],
        },
        "backbone": {"name": "nano", "hash": "8f3a", "parameters": 4050000, "kind": "image"},
        "machine": {"cpu": "EPYC", "cores": 2},
        "code": {"version": "0.1.0", "commit": "abc123"},
        "matrix": {"correct": correct, "total": total},
        "task_aware": {"correct": [[min(99, c + 3) if c else 0 for c in row] for row in correct], "total": total},
        "task_inference_accuracy": [1.0, 0.95, 0.9][:learnt],
        "metrics": {},
        "classes": [
            {"name": c, "task": n, "correct": 40 - i % 20, "total": 50}
            for i, n in enumerate(names[:learnt])
            for c in classes[i]
        ],
        "cost": {
            "seconds": {"load": 1.0, "train": 22.0, "total": 25.0},
            "steps": 72,
            "train_examples_per_second": 812.0,
            "peak_memory_mb": 900.0,
            "trainable_parameters": 70000,
            "stored_parameters": 400000,
            "memory_bytes": 120000,
        },
        "lineage": [
            {"task": n, "finished": "2026-11-20T08:00:00Z", "steps": 24, "loss_first": 2.3, "loss_last": 0.1}
            for n in names[:learnt]
        ],
        "losses": [[s, 2.3 / (1 + s % 24)] for s in range(24 * learnt)],
        "skipped": [],
        "notes": [],
    } | more


def record(*args: Any, **more: Any) -> Record:
    return Record.from_json(content(*args, **more), "made up")


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; collects what a browser would fetch, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.fetched += [v for k in ("src", "srcset", "data", "poster") if (v := values.get(k))]
        if tag in ("link", "use", "image"):
            self.fetched += [v for k in ("href", "xlink:href") if (v := values.get(k)) and v != "data:,"]

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag and self.open[-1] in OPTIONAL:
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_figures_are_those_of_metrics_with_their_definitions() -> None:
    run = record()
    matrix = run.matrix
    page = report.render([run])
    shown = parsed(page).text
    assert f"{100 * metrics.final_accuracy(matrix):.1f} %" in shown
    assert f"{100 * metrics.average_accuracy(matrix):.1f} %" in shown
    assert f"{100 * metrics.forgetting(matrix):.1f} points" in shown
    assert "−6.0 points" in shown  # backward transfer, with a real minus
    assert f"{100 * metrics.final_accuracy(run.task_aware):.1f} %" in shown
    for texts in (DEFINITIONS, FORMULAS):
        for name, explained in texts.items():
            assert (explained in shown) == (name not in OF_LANGUAGE), name
    headlines = shown[: shown.index("All metrics")]
    assert "a[" not in headlines
    assert "After 3 tasks, it classifies 91.0 % of test images correctly. Forgetting is 6.0 points." in headlines
    assert "4.05 M parameters" in shown
    assert "task 1 after task 3: 87.0 % (87 of 100; 95 %: 79.0 to 92.2 %)" in shown


@pytest.mark.parametrize("runs", [[record()], [record(), record("prototype")]], ids=["one", "two"])
def test_the_page_is_self_contained_and_well_formed(runs: list[Record]) -> None:
    page = report.render(runs)
    parser = parsed(page)
    assert parser.fetched == []
    assert "script" not in parser.tags
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert set(re.findall(r'https?://[^"<\s]+', page)) == {"https://arxiv.org/abs/2404.00228"}
    assert page.count('role="img"') >= 5
    assert page == report.render([run.model_copy(deep=True) for run in runs])


def test_no_text_of_a_record_becomes_markup() -> None:
    evil = '<script>alert("1")</script>'
    run = content(name=evil, skipped=[evil], notes=[evil])
    run["source"] = {"name": evil, "kind": "image", "layout": evil, "splits": {}, "classes": {evil: {"train": 1}}}
    run["source"] |= {"left_out": [{"reason": evil, "count": 1, "examples": [evil]}], "notes": [evil]}
    run["classes"][0]["name"] = run["stream"]["tasks"][0]["classes"][0] = evil
    run["lineage"][0]["task"] = run["stream"]["tasks"][0]["name"] = evil
    run["config"]["data"] = {"path": evil}
    run["method"] |= {"link": "javascript:alert(1)", "title": evil, "departures": [evil]}
    made = Record.from_json(run, "made up")
    page = report.render([made, made], title=evil)
    assert "<script" not in page
    assert "javascript:" not in page
    assert evil in parsed(page).text


NOT_NEEDED = ("task_aware", "task_inference_accuracy", "classes", "losses", "cost", "lineage", "skipped", "metrics", "config",
              "backbone", "machine", "code", "created", "notes", "seed")  # fmt: skip


@pytest.mark.parametrize("missing", NOT_NEEDED)
def test_what_is_missing_is_a_dash(missing: str) -> None:
    run = content()
    del run[missing]
    shown = parsed(report.render([Record.from_json(run, "made up"), record("prototype")])).text
    assert "–" in shown
    assert not re.search(r"\b(nan|None|null|Undefined)\b", shown)


@pytest.mark.parametrize(("tasks", "learnt"), [(1, 1), (5, 0), (5, 1), (5, 2), (20, 20), (50, 50)])
def test_streams_of_every_length(tasks: int, learnt: int) -> None:
    run = record(tasks=tasks, learnt=learnt)
    for runs in ([run], [run, record("prototype", tasks=tasks)]):
        shown = parsed(report.render(runs)).text
        assert ("progress" in shown) == (learnt < tasks)
    assert not re.search(r"\bnan\b", shown)


def test_accuracy_measured_ahead_of_learning_is_shown_but_not_counted() -> None:
    matrix = {"correct": [[95, 10, 11, 12], [91, 95, 13, 14]], "total": [[100] * 4] * 2}
    run = record(tasks=4, learnt=2, matrix=matrix)
    shown = parsed(report.render([run])).text
    assert "after 2 of 4 tasks, it classifies 93.0 % of test images correctly" in shown
    assert "task 4 after task 2: 14.0 %" in shown
    assert "186 of 200" in shown


def test_peak_memory_is_shown_where_there_is_any() -> None:
    run = content()
    shown = parsed(report.render([record()])).text
    assert "Peak memory944 MB" in shown
    assert "GPU" not in shown
    run["cost"]["peak_gpu_memory_mb"] = 2**11
    assert "Peak GPU memory2.15 GB" in parsed(report.render([Record.from_json(run, "made up")])).text


def test_kept_examples_are_said_and_counted_apart_from_the_memory() -> None:
    without = parsed(report.render([record()])).text
    assert "Training examples kept" not in without
    assert "trains on them again" not in without
    run = content()
    run["cost"] |= {"kept_examples": 120, "kept_per_class": 10}
    made = Record.from_json(run, "made up")
    assert made.to_json()["cost"]["kept_examples"] == 120
    shown = " ".join(parsed(report.render([made])).text.split())
    assert "It keeps 120 training examples of the tasks it has learnt and trains on them again." in shown
    assert "Training examples kept120 (at most 10 per class and task)" in shown
    assert "Other memory kept between tasks120 kB" in shown


def test_what_a_user_should_know_is_shown(tmp_path: Path) -> None:
    left = {"reason": "hidden folders", "count": 2, "examples": [".git", ".cache"]}
    source = {"name": "photos", "kind": "image", "layout": "folders CLASS", "splits": {"train": 8}, "classes": {}}
    run = record(
        notes=["task 'b' has a single class"], source=source | {"left_out": [left], "notes": ["a and A differ"]}
    )
    shown = parsed(report.render([run])).text
    for part in (
        "task 'b' has a single class",
        "Layoutfolders CLASS",
        "Left outhidden folders: 2 (.git, .cache)",
        "Notea and A differ",
    ):
        assert part in shown


def test_runs_are_compared_sorted_and_the_best_is_marked() -> None:
    better, bad = record("better"), content("worse")
    bad["matrix"]["correct"] = (np.array(bad["matrix"]["correct"]) // 2).tolist()
    worse, ahead = Record.from_json(bad, "made up"), record("unfinished", learnt=1)
    page = report.render([worse, ahead, better])
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    order = re.findall(r'#run-\d">(\w+)<', table)
    assert order == ["better", "worse", "unfinished"]
    rows = table.split("<tr>")[1:]
    assert ['aria-label="best"' in row for row in rows] == [True, True, False]  # worse forgets less
    assert "better has the highest final accuracy, 91.0 %: " in page
    assert "did not learn the same stream" not in page
    bad["stream"]["fingerprint"] = "other"
    assert "did not learn the same stream" in report.render([Record.from_json(bad, "made up"), better])


def test_repeated_names_are_told_apart() -> None:
    runs = [record(seed=s) for s in (1, 2, 2)] + [record("prototype")]
    page = report.render(runs)
    for label in ("inflora (seed 1)", "inflora (seed 2) #1", "inflora (seed 2) #2", "prototype"):
        assert f">{label}</a>" in page


def test_size_and_folding() -> None:
    page = report.render([record(name, tasks=10) for name in ("a", "b", "c")])
    assert len(page.encode()) < 150_000
    long = record(losses=[[s, 1.0] for s in range(10_000)])
    assert len(report.render([long])) < 50_000
    classes = page[page.index("Each class, worst first") :]
    assert classes.index("31 of 50") < classes.index("40 of 50")


def test_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "report.html"
    assert report.write([record()], out, title="A title") == out
    before = out.read_text(encoding="utf-8")
    assert "<h1>A title</h1>" in before

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lamina.report.page.os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        report.write([record("other")], out)
    assert out.read_text(encoding="utf-8") == before
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    for folder in (out.parent, Path()):
        with pytest.raises(RunError, match=r"is a directory. Give the name of a file, for example .*report.html"):
            report.write([record()], folder)


def test_a_report_needs_a_run() -> None:
    with pytest.raises(RunError, match="no run to report on"):
        report.render([])


def test_spread_keeps_order_and_distance() -> None:
    wanted = [10.0, 10.0, 11.0, 90.0, 100.0]
    placed = charts.spread(wanted, 12, 0, 100)
    assert all(b - a >= 12 - 1e-9 for a, b in pairwise(sorted(placed)))
    assert placed == sorted(placed)
    assert placed[-1] == 100


@pytest.mark.parametrize(("low", "high"), [(0, 1), (80, 100), (0.3, 2.31), (-3, 12), (0, 1e-4), (1, 50), (5, 5)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)


@given(st.lists(st.tuples(st.floats(10, 1000), st.floats(50, 100)), min_size=1, max_size=3, unique=True))
def test_names_of_points_cover_no_other_name(points: list[tuple[float, float]]) -> None:
    spots = [charts.Spot(name=f"row {k}", x=x, y=y, style=k, labelled=True) for k, (x, y) in enumerate(points)]
    drawn = str(charts.scatter("", "", spots, y_range=(50, 100), x_name="", y_name="", front=()))
    labels = re.findall(r'<text class="label( e)?" x="([\d.]+)" y="([\d.]+)">(row \d)</text>', drawn)
    assert [name for *_, name in labels] == [spot.name for spot in spots]
    boxes = []
    for end, x, y, name in labels:
        start = float(x) - charts.LETTER * len(name) * bool(end)
        boxes.append((start, float(y) - 11, start + charts.LETTER * len(name), float(y) + 3))
        assert 0 <= start <= charts.WIDTH - charts.LETTER * len(name) + 0.1
    assert not any(charts.overlap(one, other) for k, one in enumerate(boxes) for other in boxes[:k])


def test_lines_differ_by_more_than_colour() -> None:
    looks = {str(charts.key(i)) for i in range(charts.COLOURS**2)}
    assert len(looks) == charts.COLOURS**2


def test_numbers_as_text() -> None:
    assert text.percent(0.9123) == "91.2 %"
    assert text.percent(-0.0001) == "0.0 %"
    assert text.points(-0.031) == "−3.1 points"
    assert [text.scaled(v) for v in (0, 999, 70_000, 4_050_000, 85_800_000)] == [
        "0",
        "999",
        "70.0 k",
        "4.05 M",
        "85.8 M",
    ]
    assert text.scaled(120_000, "B") == "120 kB"
    assert [text.seconds(v) for v in (28.12, 600, 9000)] == ["28.1 s", "10.0 min", "2.5 h"]
    assert {f(None) for f in (text.percent, text.points, text.scaled, text.seconds, text.number, text.plain)} == {"–"}
    assert text.count(1, "class") == "1 class"
    assert text.count(2, "class") == "2 classes"


def luminance(colour: str) -> float:
    digits = colour.strip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_text_contrasts_with_what_is_behind_it_in_both_themes() -> None:
    page = report.render([record()])
    themes = re.findall(r":root \{(.*?)\}", page, re.S)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{3,6})", theme))
        pairs = [(c, "paper") for c in ("ink", "soft", "link", "s0", "s1", "s2", "s3", "s4", "s5")]
        for front, back in [*pairs, ("ink", "heat"), ("ink", "wash")]:
            dark, light = sorted(luminance(colours[c]) for c in (front, back))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)
