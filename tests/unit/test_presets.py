"""The papers' protocols: every setting has its source, data is checked, a scaled one is a valid grid, and the ledger takes only
runs that followed one."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.conftest import paint
from tests.grids import record_of, write_grid

from lamina import record
from lamina.compare import ledger, preset
from lamina.compare.grid import Grid
from lamina.compare.preset import Expected, Preset
from lamina.errors import ConfigError, LaminaError, RunError

OF_ROWS = {"method.name", "stream.joint", "consolidation.classifier"}
"""Settings that say what a row is; they need no source."""
EVERY = pytest.mark.parametrize("name", preset.names())


@EVERY
def test_every_setting_has_a_source(name: str):
    one = preset.load(name)
    assert set(one.settings) - OF_ROWS == set(one.file.sources) - OF_ROWS
    assert all(len(source) > 4 for source in one.file.sources.values())
    rows = set(one.file.grid["methods"])
    streams = set(one.file.grid.get("streams", [])) or {None}
    for value in one.file.reported:
        assert value.row in rows
        assert value.stream in streams


@EVERY
def test_every_preset_is_a_valid_grid(name: str, tmp_path: Path):
    one = preset.load(name)
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps(one.grid("digits")))
    grid = Grid(file)
    frozen = "joint + LDA" if "joint + LDA" in grid.methods else "joint"
    assert frozen in grid.methods, "joint training beside every method"
    assert len(grid.settings.runs) >= 3


def record_like(expected: Expected) -> dict[str, Any]:
    """What a run records of data as a protocol expects it."""
    train = expected.train if expected.train is not None else (expected.total or 10) - 3
    test = expected.test if expected.test is not None else 3
    names = {r"n\d{8}": "n{:08d}", r"\d{3}\..+": "{:03d}.Bird", None: "class {}"}[expected.names]
    count = expected.classes or 2
    return {
        "classes": {names.format(k): {} for k in range(count)},
        "splits": {"train": train, "val": 0, "test": test},
        "domains": {key: {} for key in expected.domains or ["all"]},
    }


@EVERY
def test_data_is_checked(name: str):
    one = preset.load(name)
    good = record_like(one.file.data)
    assert list(one.problems(good)) == []
    checked = one.file.data.model_dump(exclude={"what"}, exclude_none=True)
    found: set[str] = set()
    for changes in (
        {"classes": {"odd": {}, "other": {}, "third": {}}},
        {"splits": {"train": 7, "val": 0, "test": 1}},
        {"domains": {"elsewhere": {}}},
    ):
        found |= set(one.problems(good | changes))
    assert len(found) == len(checked), (found, checked)


def small(**expected: Any) -> Preset:
    """A protocol of two tasks of digits."""
    grid = {
        "base": {
            "stream": {"scenario": "class", "tasks": 2},
            "backbone": {"name": "timm/some_vit", "image_size": 224},
            "training": {"epochs": 50, "batch_size": 128},
        },
        "methods": {"inflora": {"method.epsilon": 0.9}, "finetune": {}},
        "streams": {"two": {}, "forty": {"stream.tasks": 40}},
        "seeds": [0, 1, 2],
    }
    reported = [{"row": "inflora", "stream": "two", "figure": "final_accuracy", "value": 80.5, "source": "paper"}]
    content = {"title": "Digits", "paper": "nobody", "data": {"what": "digits"} | expected, "grid": grid}
    return Preset(
        "small", preset.PresetFile.model_validate(content | {"sources": {"seeds": "us"}, "reported": reported})
    )


def test_good_and_bad_folders(tmp_path: Path):
    for split, images in (("train", 6), ("test", 2)):
        paint(tmp_path / "good" / split, 3, images)
    one = small(classes=3, train=18, test=6, names=r"class\d")
    preset.write_grid(one, tmp_path / "out", str(tmp_path / "good"), None, 1.0)
    (tmp_path / "good" / "train" / "class2" / "0.png").unlink()
    with pytest.raises(ConfigError) as refused:
        preset.write_grid(one, tmp_path / "other", str(tmp_path / "good"), None, 1.0)
    assert "17 training examples, where the protocol has 18" in str(refused.value)
    assert "Preset small expects: digits." in str(refused.value)
    assert not (tmp_path / "other").exists()


def test_a_scaled_preset_fits_the_data_there_is(tmp_path: Path):
    file = preset.write_grid(small(classes=100, train=50_000), tmp_path, "digits", "nano", 0.02)
    grid = Grid(file)
    assert grid.settings.note is not None
    assert grid.settings.note.startswith(
        "This is not Digits, but a trial of its protocol: data digits, backbone nano, 0.02 of"
    )
    configs = {row: grid.cells(row, {}) for row in grid.rows}
    assert {len(cells) for cells in configs.values()} == {1}, "one seed"
    for row, (cell,) in configs.items():
        assert cell.config.backbone.name == "nano"
        assert cell.config.backbone.image_size is None
        assert (cell.config.training.epochs, cell.config.training.batch_size) == (1, 8)
        assert (cell.config.data.per_class, cell.config.evaluation.per_class) == (10, 10)
        assert cell.config.stream.tasks == (2 if row.stream == "two" else 10)
    for scale in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="must be above 0 and at most 1"):
            small().grid("digits", None, scale)


# ---------------------------------------------------------------------------------------------- the ledger


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Preset:
    made = small(train=5)
    monkeypatch.setattr(preset, "load", lambda name: made)
    monkeypatch.setattr(preset, "names", lambda: ["small"])
    return made


def finished_run(
    folder: Path, one: Preset, seed: int = 0, splits: dict[str, int] | None = None, **changes: Any
) -> Path:
    """A run of the row inflora, with other settings where `changes` says so."""
    text = json.dumps(one.grid("elsewhere/data") | {"seeds": [seed]})
    grid = Grid(write_grid(folder, text, f"{seed}.yaml"))
    (cell,) = grid.cells(grid.rows[0], {})
    config = cell.config
    for section, values in changes.items():
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
    made = record_of(config, 0.7 + 0.01 * seed)
    source = {
        "name": "d",
        "kind": "image",
        "layout": "x",
        "classes": {"a": {}},
        "splits": splits or {"train": 5, "test": 1},
    }
    source = record.SourceRecord.model_validate(source)
    out = folder / f"run{seed}"
    out.mkdir(parents=True)
    record.write(made.model_copy(update={"source": source, "config": config.model_dump(mode="json")}), out)
    return out


def test_the_ledger_takes_runs_that_followed_a_preset(tmp_path: Path, one: Preset):
    file = tmp_path / "ledger.jsonl"
    assert "None of the 1 presets has been run yet" in ledger.page(ledger.read(file))
    assert "| two | `inflora` | final accuracy | 80.50 | paper | not run yet | – |" in ledger.page([])
    for seed in (0, 1):
        entry = ledger.entry_of(one, finished_run(tmp_path, one, seed, backbone={"name": "/models/some_vit"}))
        assert (entry.stream, entry.row, entry.seed) == ("two", "inflora", seed)
        assert ledger.add(file, entry)
        assert not ledger.add(file, entry), "only once"
    page = ledger.page(ledger.read(file))
    assert "| two | `inflora` | final accuracy | 80.50 | paper | 70.50 ± 0.71 | seeds 0, 1; abacus, lamina 0" in page
    assert "1 of 1 presets have runs." in page


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"training": {"epochs": 49}}, "training.epochs = 49 in place of 50"),
        ({"stream": {"order_seed": 3}}, "stream.order_seed = 3 in place of None"),
        ({"backbone": {"name": "nano"}}, "backbone.name = 'nano' in place of 'some_vit'"),
        ({"splits": {"train": 6}}, "6 training examples, where the protocol has 5"),
    ],
)
def test_other_runs_do_not_enter(tmp_path: Path, one: Preset, changes: dict[str, Any], why: str):
    run = finished_run(tmp_path, one, **changes)
    with pytest.raises(LaminaError) as refused:
        ledger.entry_of(one, run)
    assert why in str(refused.value)


def test_what_is_no_ledger_is_refused(tmp_path: Path):
    (tmp_path / "x").write_text("{}\n")
    with pytest.raises(RunError, match="not a ledger"):
        ledger.read(tmp_path / "x")


def test_the_page_is_up_to_date():
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / "ledger.md").read_text() == ledger.page(ledger.read(docs / "ledger.jsonl"))
