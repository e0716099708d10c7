"""A run that kept what its method made of every task stands in for the training of others."""

from pathlib import Path
from typing import Any

import pytest

from lamina import run
from lamina.engine.consolidation import Memo
from lamina.errors import RunError

SHORT: dict[str, Any] = {
    "method.name": "finetune",
    "data.source": "digits",
    "data.per_class": 4,
    "stream.tasks": 2,
    "backbone.image_size": 32,
    "training.epochs": 1,
    "evaluation.per_class": 3,
    "threads": 1,
}
WAY = {"consolidation.merge": "ema", "consolidation.drift": "linear", "consolidation.head": "lda"}


def test_what_happens_around_a_method_and_how_it_is_measured_can_be_tried_without_training(tmp_path: Path) -> None:
    direct = run.create(run.load_config(None, [*(SHORT | WAY).items()]), tmp_path / "direct")
    kept = SHORT | {"keep_chain": True, "evaluation.per_class": 1}
    chain = run.create(run.load_config(None, [*kept.items()]), tmp_path / "chain")
    again = run.replay(tmp_path / "chain", run.load_config(None, [*(SHORT | WAY).items()]), tmp_path / "again")
    assert again["matrix"] == direct["matrix"]
    assert sum(again["matrix"]["total"][-1]) == 30
    assert again["cost"]["seconds"]["train"] == chain["cost"]["seconds"]["train"]
    assert again["cost"]["peak_memory_mb"] is None

    memo: Memo = {}
    for name in ("noting", "noted"):
        record = run.replay(tmp_path / "chain", run.load_config(None, [*(SHORT | WAY).items()]), tmp_path / name, memo)
        assert record["matrix"] == direct["matrix"]
        assert (record["cost"]["seconds"]["evaluate"] > 1000) == (name == "noted")
        memo = {key: (features_bd, 1000.0) for key, (features_bd, _) in memo.items()}

    other = run.load_config(None, [*(SHORT | WAY | {"training.lr": 0.5}).items()])
    with pytest.raises(RunError, match="outside consolidation and evaluation"):
        run.replay(tmp_path / "chain", other, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(RunError, match="keep_chain"):
        run.replay(tmp_path / "direct", other, tmp_path / "other")
    (tmp_path / "chain" / "results.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        run.replay(tmp_path / "chain", run.load_config(None, [*(SHORT | WAY).items()]), tmp_path / "other")
