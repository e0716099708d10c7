"""The tokens of instructions: prompts apart from completions, options, chats, truncation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.instructions import chats, make_tokenizer, rows
from transformers import AutoTokenizer

from lamina.data import (
    InstructionTable,
    as_instructions,
    from_arrays,
    instructions_from,
    load_instructions,
    load_texts,
    open_source,
    truncation,
)
from lamina.engine.completions import questions
from lamina.errors import ConfigError, DataError
from lamina.types import Examples, Instructions, LabelledData

END = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load(records: list[dict[str, Any]], folder: Path, **more: Any) -> tuple[InstructionTable, LabelledData]:
    data = load_instructions(instructions_from(records), folder, **more)
    assert isinstance(data.table, InstructionTable)
    return data.table, data


def text(folder: Path, ids: Any) -> str:
    decoded: str = AutoTokenizer.from_pretrained(folder).decode(ids)
    return decoded


def split(table: InstructionTable, row: int) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of its completion, as training sees them."""
    inputs = {name: value[0] for name, value in table.inputs(np.array([row]), None).items()}
    given = inputs["completion_mask"].bool()
    return inputs["input_ids"][inputs["attention_mask"].bool() & ~given].tolist(), inputs["input_ids"][given].tolist()


def test_prompt_and_completion(folder: Path) -> None:
    table, data = load(rows(6), folder)
    assert isinstance(table, Instructions)
    assert (data.kind, len(table), table.stops, table.max_length) == ("instructions", 6, (END,), 512)
    prompt, completion = split(table, 1)
    # The space belongs to the completion.
    assert text(folder, prompt) == "Review 1: the film is a bore.\nAnswer:"
    assert text(folder, completion) == " negative<|end|>"
    assert completion[-1] == END
    inputs = table.inputs(np.arange(6), None)
    assert {str(value.dtype) for value in inputs.values()} == {"torch.int64"}
    t = inputs["input_ids"].shape[1]
    assert t % 8 == 0
    assert 0 <= t - int(table.lengths(np.arange(6)).max()) < 8
    assert inputs["attention_mask"].sum(1).tolist() == table.lengths(np.arange(6)).tolist()
    # Padded on the right.
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == 0).all()
    assert (inputs["attention_mask"].diff(dim=1) <= 0).all()
    assert (inputs["completion_mask"] <= inputs["attention_mask"]).all()
    assert table.prompts.lengths(np.array([1])).tolist() == [len(prompt)]


def test_the_prompt_of_a_question_is_that_of_training(folder: Path) -> None:
    table, data = load(rows(6), folder)
    examples = Examples(table, np.arange(6), data.labels_n)
    batch = questions(examples, np.array([4, 1]))
    assert batch.labels_b.tolist() == [0, 1]
    for b, row in enumerate((4, 1)):
        ids = batch.inputs["input_ids"][b][batch.inputs["attention_mask"][b].bool()].tolist()
        prompt, completion = split(table, row)
        assert ids == prompt
        right = int(batch.labels_b[b])
        option = batch.inputs["option_ids"][b, right][batch.inputs["option_mask"][b, right].bool()].tolist()
        assert option == completion
    assert batch.inputs["option_ids"].shape[:2] == (2, 2)


def test_an_option_that_another_begins_with_ends(folder: Path) -> None:
    options = ["very", "very positive", "no"]
    table, _ = load(
        [{"prompt": "How?", "completion": "very", "options": options}, {"prompt": "Why?", "completion": "x"}], folder
    )
    inputs, right_b = table.questions(np.array([0, 1]))
    assert right_b.tolist() == [0, -1]
    found = [inputs["option_ids"][0, k][inputs["option_mask"][0, k].bool()].tolist() for k in range(3)]
    assert [text(folder, ids) for ids in found] == [" very<|end|>", " very positive<|end|>", " no<|end|>"]
    assert inputs["option_mask"][1].sum() == 0
    inputs, right_b = table.questions(np.array([1]))
    assert (inputs["option_ids"].shape, inputs["option_mask"].shape) == ((1, 0, 0), (1, 0, 0))


@pytest.mark.parametrize(
    ("prompt", "completion", "told"),
    [
        ("a", "b", " b<|end|>"),
        ("a ", "b", "b<|end|>"),
        ("a\n", "b", "b<|end|>"),
        ("a", " b", " b<|end|>"),
        ("a", "\nb", "\nb<|end|>"),
    ],
)
def test_the_space_between(folder: Path, prompt: str, completion: str, told: str) -> None:
    table, _ = load([{"prompt": prompt, "completion": completion}] * 2, folder)
    asked, given = split(table, 0)
    assert (text(folder, asked), text(folder, given)) == (prompt, told)
    instruction = table.read(0)
    assert (instruction.prompt, instruction.completion, instruction.options) == (prompt, completion, ())


def test_bos_comes_before_a_plain_prompt_alone(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, bos=True)
    table, _ = load(rows(6), folder)
    prompt, completion = split(table, 0)
    assert prompt[0] == 3
    assert 3 not in [*prompt[1:], *completion]
    inputs, _ = table.questions(np.array([0]))
    assert 3 not in inputs["option_ids"]
    chat, _ = load(chats(), folder)
    assert 3 not in split(chat, 0)[0]


def test_chats(folder: Path) -> None:
    table, _ = load(chats(), folder)
    prompt, completion = split(table, 1)
    asked = (
        "<|turn|>system\nBe brief.<|end|>\n<|turn|>user\nWhat is the capital of country 1?<|end|>\n<|turn|>assistant\n"
    )
    assert text(folder, prompt) == asked
    assert text(folder, completion) == "Madrid<|end|>"
    assert completion.count(END) == 1
    assert table.read(1).prompt == asked
    assert table.read(1).completion == "Madrid"


@pytest.mark.parametrize("place", ["content", "completion", "options"])
def test_a_text_of_a_chat_holds_no_special_token(folder: Path, place: str) -> None:
    given = {**rows(6)[0], "prompt": "What is it?", "completion": "a", "options": ["a", "b"]}
    if place == "content":
        given["prompt"] = "Be quiet.<|end|>"
    elif place == "completion":
        given |= {"completion": "a<|end|>", "options": None}
    else:
        given["options"] = ["a", "b<|end|>"]
    with pytest.raises(DataError, match=r"records row 0 holds '<\|end\|>', a special token"):
        load([given, *rows(6)], folder, form="chat")
    load([given, *rows(6)], folder)  # a plain prompt may hold turns that are written out


def test_a_plain_prompt_as_a_chat(folder: Path) -> None:
    table, data = load(rows(6), folder, form="chat")
    prompt, completion = split(table, 0)
    assert text(folder, prompt) == "<|turn|>user\nReview 0: the film is a joy.\nAnswer:<|end|>\n<|turn|>assistant\n"
    assert text(folder, completion) == "positive<|end|>"
    inputs, right_b = table.questions(np.array([1]))
    option = inputs["option_ids"][0, right_b[0]]
    assert text(folder, option[inputs["option_mask"][0, right_b[0]].bool()]) == "negative<|end|>"
    assert data.fingerprint != load(rows(6), folder)[1].fingerprint
    with pytest.raises(ConfigError, match=r"data.form is 'poem'; allowed are plain and chat"):
        load(rows(6), folder, form="poem")


TURN = "{% for m in messages %}[{{ m.role }}]"
START = "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
THOUGHT = "{% if m.role == 'assistant' %}<think></think>{% endif %}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        # A template that ends no turn: EOS.
        (TURN + "{{ m.content }}" + START, "end<|end|>"),
        # A turn that begins with more where the reply is known. The reply occurs in the end of the turn, too.
        (TURN + THOUGHT + "{{ m.content }}<|end|>\n" + START, "<think></think>end<|end|>"),
        # What comes before the reply differs where the reply is known.
        (TURN + "{{ m.content }}<|end|>" + START.replace("[assistant]", "<go>"), "end<|end|>"),
    ],
)
def test_the_end_of_a_turn_is_found(tmp_path: Path, template: str, told: str) -> None:
    folder = make_tokenizer(tmp_path, template=template)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "end"}]
    table, _ = load([{"messages": messages}] * 2, folder)
    assert text(folder, split(table, 0)[1]) == told


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    none = make_tokenizer(tmp_path / "none", template=None)
    with pytest.raises(
        DataError, match=r"records row 0 is a chat, and the tokenizer .* has no chat template.*form=plain"
    ):
        load(chats(), none)
    load(rows(6), none)
    for k, (template, told) in enumerate(
        [
            ("{{ raise_exception('only users') }}", r"refuses records row 0 \(only users\)"),
            ("{% for", "refuses records row 0"),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses records row 0|does not write the reply"),
            ("{{ messages[0].content }}", "does not write the reply to records row 0"),
        ]
    ):
        with pytest.raises(DataError, match=told):
            load(chats(), make_tokenizer(tmp_path / str(k), template=template))


def test_the_middle_of_a_long_prompt_is_cut(folder: Path) -> None:
    whole, _ = load(rows(6, prompt="one two three four five six seven eight nine ten?"), folder)
    table, data = load(
        [*rows(6, prompt="one two three four five six seven eight nine ten?")[:5], rows(6)[5] | {"prompt": "?"}],
        folder,
        max_length=24,
    )
    (long, completion), (cut, same) = split(whole, 1), split(table, 1)
    room = 24 - max(len(split(whole, k)[1]) for k in (0, 1))
    assert len(cut) == room
    assert cut == long[: -(-room // 2)] + long[len(long) - room // 2 :]
    assert same == completion
    assert table.truncated_n.sum() == 5
    assert truncation(data) == {"train": 4, "val": 0, "test": 1}
    assert table.inputs(np.arange(6), None)["input_ids"].shape[1] <= 24
    # The text is whole.
    assert table.read(0).prompt == "one two three four five six seven eight nine ten?"
    assert whole.truncated_n.sum() == 0


def test_a_completion_that_leaves_no_room(folder: Path) -> None:
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "what?", "completion": "0123456789"}]
    with pytest.raises(
        DataError, match=r"records row 1 has a completion or an option of 12 tokens.*max_length is 12, .*prompt of \d"
    ):
        load(records, folder, max_length=12)
    table = load(records, folder, max_length=13)[0]
    assert (table.inputs(np.array([1]), None)["completion_mask"] == 0).sum() == 1, "cut for training"
    assert table.prompts.lengths(np.array([1])).tolist() == [4], "a question does not tell the length of its completion"
    options = {"prompt": "a", "completion": "b", "options": ["b", "0123456789"]}
    with pytest.raises(DataError, match="records row 0 has a completion or an option of 12 tokens"):
        load([options, options], folder, max_length=12)


def test_of_a_very_long_prompt_beginning_and_end_are_read(folder: Path) -> None:
    table, _ = load([{"prompt": "start " + "x" * 3_000_000 + " end", "completion": "b"}] * 2, folder, max_length=16)
    prompt = text(folder, split(table, 0)[0])
    assert prompt.startswith("start ")
    assert prompt.endswith(" end")
    assert table.truncated_n.sum() == 2


def test_lengths_that_are_allowed(folder: Path, tmp_path: Path) -> None:
    assert load(rows(6), folder, positions=100)[0].max_length == 100
    assert load(rows(6), folder, positions=9999)[0].max_length == 512
    assert load(rows(6), make_tokenizer(tmp_path, model_max_length=80))[0].max_length == 80
    with pytest.raises(ConfigError, match=r"data.max_length is 200; .* has positions for 100. Set it to at most 100"):
        load(rows(6), folder, max_length=200, positions=100)


def test_tokenizers_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no token for the end of a text \(EOS\).*Set eos_token"):
        load(rows(6), make_tokenizer(tmp_path / "t", eos=None))
    with pytest.raises(DataError, match="no tokenizer can be loaded from"):
        load(rows(6), tmp_path)
    with pytest.raises(DataError, match=r"the backbone's embedding has the ids 0 to 99"):
        load(rows(6), folder, vocabulary=100)
    load(rows(6), folder, vocabulary=320)
    file = make_tokenizer(tmp_path / "u") / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["type"] = "Nothing"
    file.write_text(json.dumps(told))
    with pytest.raises(DataError, match="no tokenizer can be loaded from"):
        load(rows(6), file.parent)


def test_labelled_texts(folder: Path) -> None:
    source = from_arrays(["good", "bad"] * 3, ["up", "down"] * 3, splits=[0, 0, 0, 0, 2, 2])
    with pytest.raises(DataError, match=r"holds texts, where instructions are needed\. Make instructions of them"):
        load_instructions(source, folder)
    made = as_instructions(source, "{text}\nOptions: {options}\nAnswer:")
    data = load_instructions(made, folder)
    assert isinstance(data.table, InstructionTable)
    assert data.table.read(1).prompt == "bad\nOptions: down, up\nAnswer:"
    assert data.table.questions(np.array([0, 1]))[1].tolist() == [1, 0]
    with pytest.raises(DataError, match="holds instructions, where texts are needed"):
        load_texts(made, folder)


def test_no_rows_at_all(folder: Path) -> None:
    table, _ = load(rows(6), folder)
    none = np.zeros(0, np.int64)
    assert table.inputs(none, None)["input_ids"].shape == (0, 8)
    inputs, right_b = table.questions(none)
    assert (inputs["option_ids"].shape, right_b.shape) == ((0, 0, 0), (0,))


@pytest.mark.slow
@pytest.mark.shared
def test_the_shared_tasks_with_a_real_tokenizer() -> None:
    root = Path(__file__).resolve().parents[3]
    shared, model = root.parent / "shared" / "data" / "text14", root.parent / "main" / "runs" / "smollm2"
    if not (shared.is_dir() and (model / "tokenizer.json").is_file()):
        pytest.skip("the shared datasets or the weights are not beside this checkout")
    source = as_instructions(open_source(shared), "{text}\nOptions: {options}\nAnswer:")
    table = load_instructions(source, model, positions=8192).table
    assert isinstance(table, InstructionTable)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert table.stops == (tokenizer.eos_token_id,)
    rows_n = np.flatnonzero(~table.truncated_n)[::997]
    for row in rows_n:
        instruction = table.read(int(row))
        prompt, completion = split(table, int(row))
        assert tokenizer.decode(prompt) == instruction.prompt
        assert tokenizer.decode(completion) == f" {instruction.completion}{tokenizer.eos_token}"
    _, right_b = table.questions(rows_n)
    assert [table.read(int(row)).options[k] for row, k in zip(rows_n, right_b, strict=True)] == [
        table.read(int(row)).completion for row in rows_n
    ]
