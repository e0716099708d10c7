"""A replay of a kept chain has the result of the direct run."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lamina import runs
from lamina.config import RunConfig
from lamina.errors import MethodError, RunError

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
SHORT: dict[str, Any] = {
    "method.name": "finetune",
    "data.source": "digits",
    "data.per_class": 4,
    "stream.tasks": 2,
    "backbone.image_size": 32,
    "training.epochs": 1,
    "evaluation.per_class": 3,
    "threads": 1,
    "precision": "fp32",
}
WAY = {
    "consolidation.merging": "ema",
    "consolidation.drift": "linear",
    "consolidation.drift_variants": 20,
    "consolidation.classifier": "lda",
}


def config_of(**more: Any) -> RunConfig:
    return runs.load_config(None, [*(SHORT | more).items()])


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("chains")


def test_a_replay_is_the_direct_run(chains: ModuleType, tmp_path: Path) -> None:
    direct = runs.create(config_of(**WAY), tmp_path / "direct")
    chain = chains.create(config_of(**{"evaluation.per_class": 1}), tmp_path / "chain")
    again = chains.replay(tmp_path / "chain", config_of(**WAY), tmp_path / "again")
    assert again.matrix == direct.matrix != chain.matrix
    assert again.task_aware == direct.task_aware
    assert again.matrix.total_ij[-1].sum() == 30
    assert again.cost.seconds["train"] == chain.cost.seconds["train"]
    assert (again.cost.steps, again.cost.trainable_parameters) == (direct.cost.steps, direct.cost.trainable_parameters)
    assert (again.cost.stored_parameters, again.cost.memory_bytes) == (
        direct.cost.stored_parameters,
        direct.cost.memory_bytes,
    )
    assert again.cost.peak_memory_mb is None

    memo: dict[str, Any] = {}
    for name in ("noting", "noted"):
        found = chains.replay(tmp_path / "chain", config_of(**WAY), tmp_path / name, memo)
        assert found.matrix == direct.matrix
        assert (found.cost.seconds["evaluate"] > 1000) == (name == "noted")
        memo = {key: (features_bd, 1000.0) for key, (features_bd, _) in memo.items()}

    own = chains.replay(tmp_path / "chain", config_of(), tmp_path / "own", {})
    assert own.matrix == runs.create(config_of(), tmp_path / "direct own").matrix

    remeasured = WAY | {"consolidation.drift": "remeasured"}
    with pytest.raises(MethodError, match=r"'remeasured' measures old classes on old examples"):
        runs.create(config_of(**remeasured), tmp_path / "other")
    found = chains.replay(tmp_path / "chain", config_of(**remeasured), tmp_path / "remeasured")
    assert found.matrix.total_ij.tolist() == direct.matrix.total_ij.tolist()
    assert chains.create(config_of(), tmp_path / "chain") == chain, "a finished chain is not trained again"


def test_another_run_cannot_be_replayed(chains: ModuleType, tmp_path: Path) -> None:
    runs.create(config_of(), tmp_path / "direct")
    with pytest.raises(RunError, match="kept no chain"):
        chains.replay(tmp_path / "direct", config_of(**WAY), tmp_path / "other")
    for setting in ({"training.lr": 0.5}, {"consolidation.init": "fresh"}):
        with pytest.raises(RunError, match="outside consolidation and evaluation"):
            chains.replay(tmp_path / "direct", config_of(**setting), tmp_path / "other")
    (tmp_path / "direct" / "results.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        chains.replay(tmp_path / "direct", config_of(**WAY), tmp_path / "other")
    with pytest.raises(RunError, match="is not a run"):
        chains.replay(tmp_path / "nowhere", config_of(**WAY), tmp_path / "other")
    assert not (tmp_path / "other").exists()
