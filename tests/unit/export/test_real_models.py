"""The real `nano` and MiniLM: what docs/export.md says of them holds within a factor of ten."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models import CLASSES, images
from tests.unit.export.worlds import texts

from lamina.export import export_merged, export_onnx, export_peft
from lamina.model import Model

MINILM = Path(__file__).resolve().parents[3] / "runs" / "minilm"
pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {
    "training.epochs": 1,
    "probes.per_class": 4,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
}


@pytest.mark.parametrize("export", [export_peft, export_merged, export_onnx])
def test_nano(export: Any, tmp_path: Path):
    model = Model.create(tmp_path / "m", settings=QUICK)
    model.learn(images(tmp_path / "a.parquet", CLASSES[:3], train=12), name="first")
    model.learn(images(tmp_path / "b.parquet", CLASSES[2:], train=12), name="second", force=True)
    one = export(tmp_path / "m", tmp_path / "out").differences[0]
    assert one.agreement == 1
    assert one.largest < 1e-4 * one.spread


@pytest.mark.shared
@pytest.mark.skipif(not MINILM.is_dir(), reason="all-MiniLM-L6-v2 is not in runs/minilm")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_minilm(pooling: str, tmp_path: Path):
    model = Model.create(tmp_path / "m", backbone=str(MINILM), settings=QUICK | {"backbone.pooling": pooling})
    model.learn(texts(tmp_path / "a.csv", CLASSES[:2]), name="first")
    model.learn(texts(tmp_path / "b.csv", CLASSES[2:4]), name="second", force=True)
    for export in (export_peft, export_merged, export_onnx):
        one = export(tmp_path / "m", tmp_path / export.__name__).differences[0]
        assert one.agreement == 1
        assert one.largest < 1e-3 * one.spread
    assert np.isfinite(one.spread)
