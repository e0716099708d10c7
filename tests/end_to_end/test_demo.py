"""The first thing anyone runs: three methods on digits, compared, and InfLoRA visibly worth it."""

import json
from pathlib import Path

from tests.end_to_end.conftest import Command


def test_demo(lamina: Command, tmp_path: Path) -> None:
    said = lamina("demo", "--out", tmp_path / "demo")
    assert said.code == 0, said.err
    page = tmp_path / "demo" / "report.html"
    assert page.is_file()
    assert f"Open the report: {page}" in said.out
    for title in ("method", "final accuracy", "forgetting"):
        assert title in said.out
    measured = {}
    for method in ("finetune", "prototype", "inflora"):
        record = json.loads((tmp_path / "demo" / method / "results.json").read_text())
        measured[method] = record["metrics"]
        assert f"{measured[method]['final_accuracy']:.1%}" in said.out
        assert method in page.read_text(encoding="utf-8")
    assert measured["inflora"]["final_accuracy"] >= measured["finetune"]["final_accuracy"] + 0.05
    assert measured["inflora"]["forgetting"] < measured["finetune"]["forgetting"]
    again = lamina("demo", "--out", tmp_path / "demo")
    assert again.out == said.out, "a finished demo is shown again"
