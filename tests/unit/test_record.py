"""A record says what was written into it, and what is no record is refused with a sentence."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_report import content

from lamina import record
from lamina.errors import RunError
from lamina.maths import metrics
from lamina.record import Record

BAD: dict[str, object] = {
    "name": 3,
    "method": {},
    "stream": "digits",
    "matrix": {"correct": [[3]], "total": [[2]]},
    "task_aware": {"correct": [[1, 2], [1]], "total": [[1, 2], [3, 4]]},
    "task_inference_accuracy": [["x"]],
    "cost": {"seconds": {"train": "long"}},
    "lineage": [{"task": "t", "stepps": 3}],
    "losses": [[1]],
    "classes": [{"name": "c", "correct": 1.5, "total": 2}],
    "unknown": 1,
}


def test_it_is_what_was_written() -> None:
    run = Record.from_json(content(), "made up")
    again = Record.from_json(json.loads(json.dumps(run.to_json())), "again")
    assert again == run
    assert again.to_json() == run.to_json()
    assert (
        run.metrics.final_accuracy == metrics.final_accuracy(run.matrix) == run.to_json()["metrics"]["final_accuracy"]
    )
    assert run.metrics.task_aware_accuracy == metrics.final_accuracy(run.task_aware)
    assert run.metrics.task_inference_accuracy == 0.9
    assert math.isnan(run.metrics.forward_transfer)
    assert "forward_transfer" not in run.to_json()["metrics"]


def test_forward_transfer_needs_unseen_tasks_to_be_measured() -> None:
    run = content(tasks=2, per_task=2)
    run["matrix"] = {"correct": [[90, 35], [80, 95]], "total": [[100, 100], [100, 100]]}
    assert Record.from_json(run, "made up").metrics.forward_transfer == pytest.approx(0.35 - 1 / 4)


def test_metrics_are_those_of_the_counts_whatever_is_written_beside_them() -> None:
    run = Record.from_json(content() | {"metrics": {"final_accuracy": 1.0}}, "made up")
    assert run.metrics.final_accuracy == pytest.approx(0.91)


def test_a_table_needs_a_part_of_it() -> None:
    whole = Record.from_json(content(), "made up")
    part = whole.for_table()
    assert part.metrics == whole.metrics or math.isnan(whole.metrics.forward_transfer)
    assert part.metrics.known() == whole.metrics.known()
    assert (part.cost, part.machine, part.split, part.seed) == (whole.cost, whole.machine, "test", 0)
    assert Record.from_json(part.to_json(), "again").for_table() == part
    assert part.to_json().keys().isdisjoint({"config", "lineage", "losses", "source"})
    assert "tasks" not in part.to_json()["stream"]


def test_it_cannot_be_changed() -> None:
    run = Record.from_json(content(), "made up")
    with pytest.raises(ValueError, match="frozen"):
        run.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("key", BAD)
def test_what_is_damaged_is_named(key: str) -> None:
    with pytest.raises(RunError, match=rf"^here is damaged: {key}"):
        Record.from_json(content() | {key: BAD[key]}, "here")


@pytest.mark.parametrize("needed", ["name", "method", "stream", "matrix"])
def test_what_is_missing_is_named(needed: str) -> None:
    run = content()
    del run[needed]
    with pytest.raises(RunError, match=f"^here is damaged: {needed}: Field required"):
        Record.from_json(run, "here")


@pytest.mark.parametrize("foreign", [None, [], {}, "text", {"a": 1}])
def test_what_is_no_record_is_refused(foreign: Any) -> None:
    with pytest.raises(RunError, match=r"^here is damaged: it must hold a record"):
        Record.from_json(foreign, "here")


def test_a_run_directory_gives_its_record_or_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run directory .*nowhere"):
        record.read(tmp_path / "nowhere")
    with pytest.raises(RunError, match=re.escape(f"`lamina resume {tmp_path}`")):
        record.read(tmp_path)
    path = tmp_path / "results.json"
    for damaged in ('{"format": 2,', "[]", "\xff", "[" * 100_000):
        path.write_bytes(damaged.encode("latin-1"))
        with pytest.raises(RunError, match=r"results\.json is damaged.* `lamina resume .*` writes it anew"):
            record.read(tmp_path)
    path.write_text('{"format": 2}', encoding="utf-8")
    with pytest.raises(RunError, match=r"results\.json has no sha256.* `lamina resume .*` writes it anew"):
        record.read(tmp_path)
    record.write(Record.from_json(content(), "made up"), tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace('"created": "2', '"created": "1'), encoding="utf-8")
    with pytest.raises(RunError, match=r"does not fit its sha256.* `lamina resume .*` writes it anew"):
        record.read(tmp_path)
    for other in (1, 9):
        path.write_text(json.dumps(content() | {"format": other}), encoding="utf-8")
        with pytest.raises(
            RunError, match=f"has format {other}, and this version of lamina reads format 2. Use the version"
        ):
            record.read(tmp_path)
    record.write(Record.from_json(content(), "made up"), tmp_path)
    assert record.read(tmp_path) == Record.from_json(content(), "made up")
