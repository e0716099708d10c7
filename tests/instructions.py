"""A tiny tokenizer and instructions for tests, made without a network."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "The film is a joy from the first minute to the last. Positive or negative?",
    "What is the capital of France? Paris. And of Spain? Madrid.",
    "Options: positive, negative, neutral, very positive, very negative, yes, no\nAnswer: yes",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
"""Like ChatML: every turn ends with <|end|> and a new line."""


def make_tokenizer(
    folder: Path,
    *,
    bos: bool = False,
    eos: str | None = "<|end|>",
    template: str | None = CHAT_TEMPLATE,
    vocabulary: int = 320,
    **limit: int,
) -> Path:
    """Saves a byte-level BPE tokenizer and returns its folder. Ids: 0 <|pad|>, 1 <|end|>, 2 <|turn|>, 3 <|start|>.

    bos: whether it puts <|start|> before a text. eos: its token for the end of a text. limit: model_max_length.
    """
    special = ["<|pad|>", "<|end|>", "<|turn|>", "<|start|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", special.index("<|start|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token=eos,
        bos_token="<|start|>" if bos else None,
        additional_special_tokens=["<|turn|>"],
        **limit,
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def rows(
    n: int = 12, *, options: tuple[str, ...] | None = ("positive", "negative"), **more: Any
) -> list[dict[str, Any]]:
    """Returns n records of prompts and completions. The first two thirds are for training, the others for testing."""
    return [
        {
            "prompt": f"Review {k}: the film is {('a joy', 'a bore')[k % 2]}.\nAnswer:",
            "completion": (options or ("It is a joy.", "It is a bore."))[k % 2],
            **({"options": list(options)} if options else {}),
            "split": "train" if 3 * k < 2 * n else "test",
            **more,
        }
        for k in range(n)
    ]


def chats(n: int = 6) -> list[dict[str, Any]]:
    """Returns n chats of a system prompt, a question and a reply."""
    return [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"What is the capital of country {k}?"},
                {"role": "assistant", "content": ("Paris", "Madrid")[k % 2]},
            ]
        }
        for k in range(n)
    ]
