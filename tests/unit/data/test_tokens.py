"""Tokens: what a tokenizer says, cut, padded and masked."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lamina.data import from_arrays
from lamina.data.tokens import tokenise_once
from lamina.errors import ConfigError, DataError
from lamina.types import Augment

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
SOURCE = from_arrays(["a b", "c", "a " * 20, "", "b z"], [0, 1, 0, 1, 0], name="texts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    tokenizer.save_pretrained(path)
    return path


def test_ids_are_the_tokenizers(folder: Path) -> None:
    table = tokenise_once(SOURCE, folder, max_length=16)
    assert len(table) == 5
    inputs = table.inputs(np.array([4, 1, 3, 0]), None)
    assert inputs["input_ids"].tolist() == [
        [2, 5, 1, 3, 0, 0, 0, 0],
        [2, 6, 3, 0, 0, 0, 0, 0],
        [2, 3, 0, 0, 0, 0, 0, 0],
        [2, 4, 5, 3, 0, 0, 0, 0],
    ]
    assert inputs["attention_mask"].sum(1).tolist() == [4, 3, 2, 4]
    assert {str(value.dtype) for value in inputs.values()} == {"torch.int64"}


def test_cut_and_padded_no_further_than_allowed(folder: Path) -> None:
    table = tokenise_once(SOURCE, folder, max_length=12)
    inputs = table.inputs(np.array([0, 2]), Augment(0, 0))
    assert inputs["input_ids"].shape == (2, 12)
    assert inputs["input_ids"][1].tolist() == [2] + [4] * 10 + [3]
    assert table.inputs(np.array([], np.int64), None)["input_ids"].shape == (0, 8)


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.max_length is 17; the tokenizer .* allows 1 to 16"):
        tokenise_once(SOURCE, folder, max_length=17)
    with pytest.raises(DataError, match=r"no tokenizer can be loaded from .*Point at a folder with tokenizer.json"):
        tokenise_once(SOURCE, tmp_path)
