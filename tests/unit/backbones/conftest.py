"""Folders of tiny checkpoints."""

from pathlib import Path

import pytest
from tests.tiny import raw_bert, raw_vit


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    raw_vit().save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    raw_bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"
