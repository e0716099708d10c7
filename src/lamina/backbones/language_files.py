"""What the files of a causal language model say beside its layers: its head, the type of its weights, its special tokens."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.backbones.families import Family
from lamina.backbones.files import Header, read_json
from lamina.backbones.language import LanguageHead
from lamina.errors import BackboneError

_BATCH_DEPENDENT = ("dynamic", "longrope")
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OLD_HEADS = ("embed_out.weight",)
"""Names that older files have for `lm_head.weight` (GPT-NeoX)."""
_BUFFER = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.inv_freq$")


def is_buffer(name: str) -> bool:
    """Returns whether a stored tensor is a mask or a table of frequencies: older files have them, and no model needs them."""
    return _BUFFER.search(name) is not None


def check_language(config: Any, headers: Iterable[str], family: Family, name: str) -> None:
    """Raises BackboneError for a model without LM head, or with attention that is not causal or not supported.

    headers: names of the stored tensors.
    """
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise BackboneError(
            f"{name}: config.json turns causal attention off; only causal language models are supported"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise BackboneError(
            f"{name}: attn_logit_softcapping {config.attn_logit_softcapping!r} in config.json is not supported; only null is"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in _BATCH_DEPENDENT:
            raise BackboneError(
                f"{name}: rope_type {part['rope_type']!r} in config.json is not supported: with it a result depends on the "
                "longest sequence of the batch. Take the scaling out, and keep to the lengths that the model was trained with"
            )
    softcap = language_head(config, family).softcap
    if softcap is not None and not (isinstance(softcap, int | float) and softcap > 0):
        raise BackboneError(
            f"{name}: final_logit_softcapping in config.json must be null or a number above 0, not {softcap!r}"
        )
    names = (f"{family.head}.weight", *_OLD_HEADS)
    if not config.tie_word_embeddings and not any(key.endswith(names) for key in headers):
        raise BackboneError(
            f"{name} is a model without LM head: the weights have no {names[0]}, and tie_word_embeddings in config.json is "
            "false. Give the checkpoint of the language model, not that of its body or of a classifier"
        )


def language_head(config: Any, family: Family) -> LanguageHead:
    """Returns where the body and the head are, with the sliding window and the softcap that config.json says.

    Settings that the family does not have are passed over, as transformers does.
    """

    def own(key: str) -> Any:
        return getattr(config, key) if hasattr(type(config), key) else None

    types = set(own("layer_types") or ())
    return LanguageHead(
        family.body,
        family.head,
        window=None if types == {"full_attention"} else own("sliding_window"),
        mixed=bool(types),
        softcap=own("final_logit_softcapping"),
    )


def tie(tensors: dict[str, Tensor], config: Any, family: Family, name: str) -> None:
    """Leaves one of the two tied tensors, under the name of the embeddings, if the configuration ties them.

    Raises BackboneError if both are stored and differ.
    """
    if not config.tie_word_embeddings:
        return
    embeddings = f"{family.body}.{family.embeddings}.weight"
    found = [key for key in (embeddings, f"{family.embeddings}.weight") if key in tensors]
    for head in [key for key in tensors if key.endswith((f"{family.head}.weight", *_OLD_HEADS))]:
        tensor = tensors.pop(head)
        if found and not torch.equal(tensors[found[0]], tensor):
            raise BackboneError(
                f"{name}: {head} and {found[0]} differ, and tie_word_embeddings in config.json is true. Set it to false to "
                "use both, or take the wrong one out of the weights"
            )
        if not found:
            tensors[embeddings] = tensor


def stored_dtype(headers: Mapping[str, Header], used: Iterable[str]) -> torch.dtype:
    """Returns bfloat16 if all weights are stored in it, otherwise float32.

    float16 becomes float32: values of activations overflow float16, and bfloat16 would drop three bits of every weight.
    """
    types = {headers[key].dtype for key in used} - {"I64", "I32", "BOOL"}
    return torch.bfloat16 if types == {"BF16"} else torch.float32


def special_tokens(folder: Path, vocabulary: int) -> dict[str, Any]:
    """Returns the ids of special tokens in generation_config.json; empty without that file.

    Only these are read: predictions are greedy, whatever sampling the file suggests. Raises BackboneError for ids outside
    the vocabulary.
    """
    said = read_json(folder / "generation_config.json")
    found = {key: said[key] for key in _SPECIAL_TOKENS if said.get(key) is not None}
    for key, value in found.items():
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not ids or not all(type(token) is int and 0 <= token < vocabulary for token in ids):
            raise BackboneError(
                f"{folder / 'generation_config.json'}: {key} must be a token id from 0 to {vocabulary - 1}, not {value!r}"
            )
    return found
