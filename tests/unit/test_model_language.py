"""Living language models: what the gate compares, and how text is put together from tokens."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import assistants
from tests.assistants import backbone, instructions, small

from lamina.data import Prompt, PromptReader
from lamina.data.prompts import stop_tokens
from lamina.errors import ConfigError, DataError
from lamina.model import Asked, Model, language, learning
from lamina.model.language import Writing

OPEN = {"gate.task_drop": None, "gate.negative_flips": None, "training.epochs": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("wanted", [("yes", "no"), ("blue", "red", "green", "yes")], ids=["known", "new"])
def test_a_probe_may_have_other_completions_than_the_model(base: Path, tmp_path: Path, wanted: tuple[str, ...]) -> None:
    model = small(tmp_path / "m", base, settings=OPEN)
    for word in ("film", "book"):  # one class each, named after the task
        model.learn(instructions(tmp_path / f"{word}.jsonl", word, options=None), name=f"{word}s")
    rows = [
        {"prompt": f"Which {k}?", "completion": one, "options": list(wanted), "split": "test"}
        for k, one in enumerate(wanted * 2)
    ]
    probe = tmp_path / "probe.jsonl"
    probe.write_text("".join(json.dumps(row) + "\n" for row in rows))
    learnt = model.learn(instructions(tmp_path / "songs.jsonl", "song"), name="songs", probe=probe)
    assert learnt.gate is not None
    assert learnt.gate.tasks[-1].examples == len(rows)
    assert {change.name: change.examples for change in learnt.gate.classes} == dict.fromkeys(wanted, 2)


def test_the_gate_measures_both_versions_with_the_settings_of_the_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(tmp_path / "m", base, settings={**OPEN, "probes.per_class": 2})
    model.learn(instructions(tmp_path / "films.jsonl", options=None), name="films")
    seen: list[tuple[int, int]] = []
    original = language.outcomes_of

    def spied(learner: Any, deployed: Any, examples: Any, batch_size: int, longest: int) -> Any:
        seen.append((len(examples), longest))
        return original(learner, deployed, examples, batch_size, longest)

    for module in (language, learning):
        monkeypatch.setattr(module, "outcomes_of", spied)
    books = instructions(tmp_path / "books.jsonl", "book", options=None)
    model.learn(books, name="books", settings={"evaluation.max_new_tokens": 1})
    assert seen == [(2, 6), (4, 1), (2, 6)]  # probes before, the new task, probes after


def test_text_goes_on_where_a_tokenizer_changes_its_mind() -> None:
    """Some tokenizers clean up spaces before a full stop when it comes."""
    texts = ["It is", "It is ", "It is.", "It is. So"]
    prompt = Prompt(ids=np.zeros(3, np.int32))
    writing = Writing(Asked(prompt, 4), lambda tokens: texts[len(tokens) - 1], (99,))
    sent = [writing.add(token) for token in range(4)]
    assert sent == ["It is", " ", ".", " So"]
    assert writing.completion().text == texts[-1]
    assert writing.ended == "length"


def test_settings_of_a_completion_are_checked(base: Path, tmp_path: Path) -> None:
    model = Model(assistants.learnt(tmp_path, base, tasks=1))
    prompts = ["The film", "A book", "Many songs", "1"]
    whole = model.complete(prompts, max_new_tokens=24)
    k = next(k for k, one in enumerate(whole) if len(one.text) > 8)
    stop = whole[k].text[4:6]
    (stopped,) = model.complete(prompts[k], max_new_tokens=24, stop=stop)
    assert stopped.text == whole[k].text.partition(stop)[0]
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        model.complete("The film", max_new_tokens=0)
    with pytest.raises(ConfigError, match="empty text"):
        model.complete("The film", stop=["a", ""])
    wrong: list[Any] = ["5", 0, 10**6, 5]
    for most in wrong[:3]:
        with pytest.raises(ConfigError, match="allowed are 1 to"):
            model.complete("x", max_new_tokens=most)
    with pytest.raises(DataError, match="options is the text 'ab'"):
        model.complete("x", "ab")
    with pytest.raises(DataError, match="options has the option 'a' more than once"):
        model.complete(["x", "y"], ["a", "a"])
    with pytest.raises(DataError, match="prompts are 5"):
        model.complete(wrong[3])
    (blank,) = model.complete(" ")
    assert (blank.text, blank.error) == ("", "the prompt of the request is blank. Give a text")


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_the_model_card_asks_as_the_model_was_taught(base: Path, tmp_path: Path, form: str) -> None:
    model = small(tmp_path / "it's mine", base, settings={"data.form": form})
    card = (model.path / "README.md").read_text()
    assert shlex.quote("it's mine") in card
    assert ("/v1/chat/completions" in card) == ("messages" in card) == ("--chat" in card) == (form == "chat")
    shell = card.split("```sh\n")[1].split("```")[0].replace("\\\n", " ")
    body = shlex.split(shell.splitlines()[2])[2]
    assert json.loads(body)["model"] == "it's mine"


def test_a_reader_stops_where_the_base_says(base: Path) -> None:
    class Module:
        class generation_config:
            eos_token_id = (1, 7)

    assert stop_tokens((1, 2), Module()) == (1, 2, 7)
    assert stop_tokens((1,), None) == (1,)
    reader = PromptReader(base, positions=64, vocabulary=None, module=Module())
    assert {1, 7} <= set(reader.stops)
