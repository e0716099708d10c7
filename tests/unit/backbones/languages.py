"""Tiny causal language models, one of every family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from tests.tiny import scatter
from torch import nn

LANGUAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
GATED = ("q", "k", "v", "out", "gate", "up", "down")
UNGATED = ("q", "k", "v", "out", "up", "down")


@dataclass(frozen=True, kw_only=True)
class LanguageRow:
    """A tiny model of a family."""

    model: str
    """Class in transformers."""
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    roles: tuple[str, ...] = GATED
    key_outputs: int = 32
    """Outputs of the keys, and of the values."""
    window: int | None = None

    @cache
    def raw(self) -> nn.Module:
        """Returns transformers' own model."""
        config = getattr(transformers, self.config)(**LANGUAGE | dict(self.settings))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return scatter(getattr(transformers, self.model)(config), 0.7).eval()

    def __hash__(self) -> int:
        return id(self)


DROPOUTS = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
NEOX_DROPOUTS = {"attention_dropout": 0.5, "hidden_dropout": 0.5}
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
GEMMA = GROUPED | {"head_dim": 16, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}

LANGUAGES = {
    "llama": LanguageRow(
        model="LlamaForCausalLM",
        config="LlamaConfig",
        settings=GROUPED | {"tie_word_embeddings": True, "attention_dropout": 0.5},
        key_outputs=16,
    ),
    "llama, untied": LanguageRow(
        model="LlamaForCausalLM", config="LlamaConfig", settings={"attention_bias": True, "mlp_bias": True}
    ),
    "mistral": LanguageRow(
        model="MistralForCausalLM",
        config="MistralConfig",
        settings=GROUPED | {"sliding_window": 3},
        key_outputs=16,
        window=3,
    ),
    "mistral, no window": LanguageRow(
        model="MistralForCausalLM",
        config="MistralConfig",
        settings=GROUPED | {"sliding_window": None},
        key_outputs=16,
    ),
    "qwen2": LanguageRow(model="Qwen2ForCausalLM", config="Qwen2Config", settings=GROUPED, key_outputs=16),
    "qwen2, window": LanguageRow(
        model="Qwen2ForCausalLM", config="Qwen2Config", settings=GROUPED | SLIDING, key_outputs=16, window=3
    ),
    "qwen3": LanguageRow(
        model="Qwen3ForCausalLM", config="Qwen3Config", settings=GROUPED | {"head_dim": 16}, key_outputs=32
    ),
    "qwen3, window": LanguageRow(
        model="Qwen3ForCausalLM",
        config="Qwen3Config",
        settings=GROUPED | SLIDING | {"head_dim": 8},
        key_outputs=16,
        window=3,
    ),
    "gemma3_text": LanguageRow(
        model="Gemma3ForCausalLM", config="Gemma3TextConfig", settings=GEMMA, key_outputs=32, window=3
    ),
    "gemma3_text, softcap": LanguageRow(
        model="Gemma3ForCausalLM",
        config="Gemma3TextConfig",
        settings=GEMMA | {"final_logit_softcapping": 0.5},
        key_outputs=32,
        window=3,
    ),
    "gpt2": LanguageRow(
        model="GPT2LMHeadModel", config="GPT2Config", settings=DROPOUTS | {"n_inner": 48}, roles=UNGATED
    ),
    "gpt_neox": LanguageRow(model="GPTNeoXForCausalLM", config="GPTNeoXConfig", settings=NEOX_DROPOUTS, roles=UNGATED),
    "gpt_neox, serial": LanguageRow(
        model="GPTNeoXForCausalLM",
        config="GPTNeoXConfig",
        settings={"use_parallel_residual": False, "attention_bias": False},
        roles=UNGATED,
    ),
}
