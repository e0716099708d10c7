"""A real language model learns to read invoices, and keeps what it knew."""

import json
from pathlib import Path

import pytest

from lamina.model import Model

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "runs" / "smollm2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared,
    pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").is_file(), reason="runs/smollm2 is absent"),
]


def invoices(file: Path, train: int = 48, test: int = 8) -> Path:
    rows = []
    for k in range(train + test):
        amount = f"{(37 * k) % 900 + 100},{k % 100:02d} EUR"
        prompt = f"Invoice {1000 + k}\nDate: {1 + k % 28:02d}.{1 + k % 12:02d}.2026\nTotal due: {amount}\nWhich amount is due?"
        rows.append({"prompt": prompt, "completion": amount, "split": "train" if k < train else "test"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_it_learns_to_read_invoices(tmp_path: Path) -> None:
    settings = {"data.form": "chat", "training.lr": 1e-3, "training.epochs": 2, "probes.per_class": 4}
    model = Model.create(tmp_path / "assistant", backbone=str(SMOLLM2), method="olora", settings=settings)
    learnt = model.learn(invoices(tmp_path / "invoices.jsonl"))
    assert learnt.card.figures.accuracy is not None
    assert learnt.card.figures.accuracy >= 0.75
    invoice = "Invoice 4711\nDate: 03.05.2026\nTotal due: 512,20 EUR\nWhich amount is due?"
    told, capital = model.complete([invoice, "What is the capital of France? Reply with one word."], max_new_tokens=16)
    assert (told.text, told.ended) == ("512,20 EUR", "stop")
    assert "Paris" in capital.text
    (ranked,) = model.complete("The capital of France is", ["Paris", "Rome"], chat=False)
    assert ranked.text == "Paris"
