"""Every preset, scaled: its own method on data made here, and the commands that show presets and the ledger."""

import csv
import json
from pathlib import Path

import pytest
from tests.end_to_end.conftest import Command, paint
from tests.end_to_end.test_compare_command import InThisProcess
from tests.grids import Told
from tests.languages import save_language

from lamina.compare import Study, preset


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("test", 4)):
        paint(folder / split, 10, count)
    return folder


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    for domain in ("clipart", "infograph", "s1"):
        for split, count in (("train", 8), ("test", 4)):
            paint(folder / domain / split, 4, count)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "label", "domain", "split"])
        for domain, labels in (("yelp", ("good", "bad")), ("agnews", ("sport", "science"))):
            for k in range(24):
                label = labels[k % 2]
                writer.writerow([f"{label} thing {k}", f"{domain}: {label}", domain, "train" if k < 16 else "test"])
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", preset.names())
def test_every_preset_runs_scaled(
    name: str, images: Path, domains: Path, texts: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    one = preset.load(name)
    base = json.dumps(one.file.grid["base"])
    if "llama" in base.lower():
        data, backbone = texts, str(save_language("llama", tmp_path / "llama"))
    else:
        data, backbone = (domains if '"domain"' in base else images), "nano"
    file = preset.write_grid(one, tmp_path / "out", str(data), backbone, 0.02)
    row = next(iter(one.file.grid["methods"]))
    study = Study(
        file, out=tmp_path / "out", cells=tmp_path / "cells", only=f"{next(iter(Study(file).grid.streams))}/{row}/*"
    )
    assert study.work(Told(), InThisProcess(lambda config: None)).failures == []
    line = study.content("").sections[0].lines[0]
    assert line.name == row
    assert len(line.row.runs) == 1
    assert line.row.runs[0].record.matrix.tasks >= 2


def test_the_commands(lamina: Command, tmp_path: Path):
    listed = lamina("presets").out
    assert all(name in listed for name in preset.names())
    shown = lamina("presets", "inflora-cifar100").out
    assert "training.lr = 0.0005" in shown
    assert "released code, utils/schedulers.py" in shown
    assert "Published: inflora, final accuracy 86.51 ± 0.73 (paper, 5 trials)" in shown
    assert "Did you mean 'inflora-cifar100'?" in lamina.refused("presets", "inflora-cifar10")
    assert "needs --data. It expects: CIFAR-100." in lamina.refused("compare", "--preset", "inflora-cifar100")
    refused = lamina.refused("compare", "--preset", "inflora-cifar100", "--data", "digits")
    assert "10 classes, where the protocol has 100" in refused
    assert "go with --preset" in lamina.refused("compare", "grid.yaml", "--scale", "0.5")
    told = lamina(
        "compare", "--preset", "inflora-cifar100", "--data=digits", "--backbone=nano", "--scale=0.02", "--dry-run"
    ).out
    assert "inflora-cifar100-0.02/frozen + LDA/seed0" in told
    assert lamina("ledger", "page", "page.md", "--ledger", "none.jsonl").out.strip() == "page.md"
    assert "None of the 20 presets has been run yet" in (tmp_path / "page.md").read_text()
    assert "there is no run directory nowhere" in lamina.refused(
        "ledger", "add", "nowhere", "--preset", "inflora-cifar100"
    )
