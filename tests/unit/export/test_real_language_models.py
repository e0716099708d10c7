"""SmolLM2-135M: what docs/export.md says of it holds within a factor of ten."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.export.language_worlds import instructions

from lamina import runs
from lamina.export import export_merged, export_peft, export_tasks

SMOLLM2 = Path(__file__).resolve().parents[3] / "runs" / "smollm2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared,
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2-135M is not in runs/smollm2"),
]


def test_smollm2(tmp_path: Path):
    settings = {
        "backbone.name": str(SMOLLM2),
        "data.source": str(instructions(tmp_path / "data")),
        "data.form": "chat",
        "method": "olora",
        "training.lr": 1e-3,
        "evaluation.per_task": 2,
        "evaluation.max_new_tokens": 4,
        "precision": "bf16",
        "threads": 1,
    }
    runs.create(runs.load_config(None, list(settings.items())), tmp_path / "run")
    for export in (export_peft, export_merged, export_tasks):
        for one in export(tmp_path / "run", tmp_path / export.__name__).differences:
            assert one.agreement == 1
            assert one.largest < 1e-4 * one.spread
    before, after = (load_file(p / "model.safetensors") for p in (SMOLLM2, tmp_path / "export_merged"))
    adapted = json.loads((tmp_path / "export_peft" / "adapter_config.json").read_text())["target_modules"]
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert before.keys() == after.keys()
    assert changed == {f"{path}.weight" for path in adapted}
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
