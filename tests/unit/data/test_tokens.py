"""Tokens: what a tokenizer says, cut, padded and masked."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lamina.data import from_arrays, load_texts
from lamina.data.tokens import tokenise_once
from lamina.errors import ConfigError, DataError
from lamina.types import Augment

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
SOURCE = from_arrays(["a b", "c", "a " * 20, "", "b z"], [0, 1, 0, 1, 0], name="texts")


def save(path: Path, words: list[str] = WORDS, **limit: int) -> Path:
    inner = bare(path, words)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", **limit).save_pretrained(path)
    return path


def bare(path: Path, words: list[str] = WORDS) -> Tokenizer:
    """A tokenizer that adds no tokens of its own."""
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    return inner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tokenizer"), model_max_length=16)


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


def test_no_more_tokens_than_the_backbone_has_positions_for(folder: Path, tmp_path: Path) -> None:
    assert tokenise_once(SOURCE, folder, max_length=12, positions=12).max_length == 12
    told = r"data.max_length is 14; the tokenizer .* allows 1 to 16 and the backbone has positions for 13. Set it to at most 13"
    with pytest.raises(ConfigError, match=told):
        tokenise_once(SOURCE, folder, max_length=14, positions=13)
    with pytest.raises(ConfigError, match="Set it to at most 16"):
        load_texts(SOURCE, folder, max_length=17, positions=99)
    save(tmp_path)
    told = "the tokenizer .* allows any number and the backbone has positions for 72. Set it to at most 72"
    with pytest.raises(ConfigError, match=told):
        load_texts(SOURCE, tmp_path, max_length=128, positions=72)


def test_no_token_beyond_the_embedding(folder: Path, tmp_path: Path) -> None:
    assert load_texts(SOURCE, folder, max_length=16, vocabulary=7).kind == "text"
    told = (
        r"the tokenizer .* gives the token 'c' the id 6; the backbone's embedding has the ids 0 to 5. Use the tokenizer"
    )
    with pytest.raises(DataError, match=told):
        load_texts(SOURCE, folder, max_length=16, vocabulary=6)
    save(tmp_path, ["a", "[UNK]", "[CLS]", "[SEP]", "b", "[PAD]"])
    with pytest.raises(DataError, match=r"gives the token '\[PAD\]' the id 5; .* 0 to 4"):
        load_texts(from_arrays(["a b", "b"], [0, 1]), tmp_path, vocabulary=5)


def test_of_a_long_text_only_the_beginning_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    texts = [
        *("a " * 3_000_000, "a" * 3_000_000, " " * 400_000 + "a b c", " " * 3_000_000),
        *(" ".join(draw.choice(["a", "b" * 40, "c", "z" * 900, " " * 2000], n)) for n in (100, 1000, 3000)),
    ]
    loaded = AutoTokenizer.from_pretrained(folder)
    expected = loaded([text[: 2**20] for text in texts], truncation=True, max_length=12)["input_ids"]
    read: list[int] = []
    called = type(loaded).__call__

    def watched(self: Any, cut: list[str], **options: Any) -> Any:
        read.extend(map(len, cut))
        return called(self, cut, **options)

    monkeypatch.setattr(type(loaded), "__call__", watched)
    table = tokenise_once(from_arrays(texts, [0, 1] * 3 + [0]), folder, max_length=12)
    assert [table.ids[table.starts[k] : table.starts[k + 1]].tolist() for k in range(7)] == expected
    assert max(read) <= 2**20
    assert read[0] == 4096
    assert sum(read) < 8_000_000


def test_texts_that_cannot_be_tokenised(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"arrays\[1\] is not valid Unicode"):
        tokenise_once(from_arrays(["a", "b\ud83d"], [0, 1]), folder, max_length=8)
    bare(tmp_path)
    with pytest.raises(DataError, match=r"arrays\[1\] comes to no token. Remove the row"):
        tokenise_once(from_arrays(["a", " "], [0, 1]), tmp_path, max_length=8)


def test_a_tokenizer_whose_token_for_unknown_words_is_missing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["unk_token"] = "[NOPE]"
    file.write_text(json.dumps(told))
    with pytest.raises(
        DataError,
        match=r"the tokenizer .*t cannot tokenise the texts from texts\[0\] to texts\[4\] .*WordLevel.*Correct its",
    ):
        tokenise_once(SOURCE, tmp_path / "t", max_length=8)


@pytest.mark.parametrize("said", ['"abc"', "[]", "Infinity", "NaN", "-3", "0", "true"])
def test_a_longest_text_that_is_no_number(folder: Path, tmp_path: Path, said: str) -> None:
    shutil.copytree(folder, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"model_max_length": 16', f'"model_max_length": {said}'))
    with pytest.raises(
        DataError, match=r"the tokenizer .*t has the model_max_length .*; allowed is a number, 1 or more"
    ):
        tokenise_once(SOURCE, tmp_path / "t", max_length=8)


@pytest.mark.parametrize("max_length", [-1, 0, 1, 2])
def test_special_tokens_leave_room_for_the_text(folder: Path, max_length: int) -> None:
    told = rf"data.max_length is {max_length}; the tokenizer .* adds 2 tokens of its own .*Set it to at least 3"
    with pytest.raises(ConfigError, match=told):
        tokenise_once(SOURCE, folder, max_length=max_length)
    assert tokenise_once(SOURCE, folder, max_length=3).inputs(np.arange(5), None)["input_ids"].shape == (5, 3)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "null", '{"version": 3}', '{"auto_map": {"AutoTokenizer": "x.y"}}']
)
def test_damaged_tokenizers(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / name).write_text(content)
    with contextlib.suppress(DataError):
        # What stays usable is used; nothing else than a DataError comes out, and nothing is asked of the user.
        tokenise_once(SOURCE, tmp_path / "t", max_length=8)


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.max_length is 17; the tokenizer .* allows 1 to 16"):
        tokenise_once(SOURCE, folder, max_length=17)
    with pytest.raises(DataError, match=r"no tokenizer can be loaded from .*Point at a folder with tokenizer.json"):
        tokenise_once(SOURCE, tmp_path)
