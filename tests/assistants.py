"""A small language model on disk for tests, instructions for it, and living models of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.instructions import CHAT_TEMPLATE, make_tokenizer
from tests.tiny import scatter

from lamina.model import Model

SMALL: dict[str, Any] = {
    "training.epochs": 2,
    "training.batch_size": 4,
    "training.lr": 0.01,
    "evaluation.batch_size": 4,
    "evaluation.max_new_tokens": 6,
    "precision": "fp32",
    "device": "cpu",
    "threads": 1,
}
"""Settings of a model that learns a task in about a second."""
POSITIONS = 256


def backbone(folder: Path, *, template: str | None = CHAT_TEMPLATE, positions: int = POSITIONS) -> Path:
    """A random Llama of two blocks with a tokenizer of bytes."""
    make_tokenizer(folder, template=template)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=320,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        scatter(transformers.LlamaForCausalLM(config), 0.5).eval().save_pretrained(folder)
    return folder


def instructions(
    file: Path,
    word: str = "film",
    *,
    options: tuple[str, ...] | None = ("yes", "no"),
    train: int = 8,
    test: int = 4,
    **more: Any,
) -> Path:
    """A JSON lines file of instructions about a word. The adjective tells the completion. more: further columns."""
    told = options or ("It is a joy.", "It is a bore.")
    rows = [
        {
            "prompt": f"The {word} {k} is {('a joy', 'a bore')[k % 2]}.\nGood?",
            "completion": told[k % 2],
            **({"options": list(options)} if options else {}),
            "split": "train" if k < train else "test",
            **more,
        }
        for k in range(train + test)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def small(
    path: Path, base: Path, method: str = "olora", settings: Mapping[str, Any] | None = None, **more: Any
) -> Model:
    """A model that has learnt nothing."""
    return Model.create(path, backbone=str(base), method=method, settings={**SMALL, **(settings or {})}, **more)


def learnt(folder: Path, base: Path | None = None, method: str = "olora", tasks: int = 2, **settings: Any) -> Path:
    """A model that has learnt to rank options, and then to write completions, with probes and an open gate."""
    given = {"probes.per_class": 2, "gate.task_drop": None, "gate.negative_flips": None, **settings}
    model = small(folder / "assistant", base or backbone(folder / "llama"), method, given)
    for number in range(tasks):
        word, options = (("film", ("yes", "no")), ("book", None))[number % 2]
        model.learn(instructions(folder / f"{word}{number}.jsonl", word, options=options), name=f"{word}s-{number}")
    return folder / "assistant"
