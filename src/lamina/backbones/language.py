"""What a causal language model computes: hidden states of tokens, and the scores of the next token.

Shape letters: b batch, t tokens, n positions to score, d width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import BackboneError


@dataclass(frozen=True)
class LanguageHead:
    """How a causal language model goes from tokens to scores of the next token."""

    body: str
    """Path in `Backbone.module` of the model without its head. It returns `last_hidden_state` (b, t, d)."""
    head: str
    """Path of the linear layer from hidden states (d) to the scores of all tokens."""
    window: int | None = None
    """Tokens that a layer with a sliding window sees, its own included; None if no layer has one."""
    mixed: bool = False
    """Whether only some layers have a sliding window. The body then takes one mask for each type of layer."""
    softcap: float | None = None
    """Bound c of the scores, which become c tanh(score / c); None if they are not bounded."""


def positions_of(mask: Tensor) -> Tensor:
    """Returns the position of every token, counted from 0 within what it sees, (b, t) int64.

    mask: (b, t), nonzero for tokens and zero for padding on any side; or (b, 1, t, t) boolean, true where the query (row)
    sees the key (column). In the second case a token's position is the number of other tokens it sees. That is right for
    sequences that restart or branch, if each token sees all tokens before it in its own sequence.
    """
    counts_bt = mask.long().cumsum(-1) if mask.ndim == 2 else mask[:, 0].long().sum(-1)
    return (counts_bt - 1).clamp(min=0)


def hidden_states(module: nn.Module, language: LanguageHead, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the last hidden states (b, t, d), after the last norm. `Backbone.hidden` documents the inputs."""
    ids_bt, mask = inputs["input_ids"], inputs["attention_mask"]
    b, t = ids_bt.shape
    if tuple(mask.shape) not in ((b, t), (b, 1, t, t)):
        raise BackboneError(
            f"attention_mask has the shape {list(mask.shape)}; give {[b, t]}, or {[b, 1, t, t]} to say what each token sees"
        )
    if mask.ndim == 4 and mask.dtype != torch.bool:
        raise BackboneError(
            f"attention_mask of shape {list(mask.shape)} has the type {mask.dtype}; give torch.bool, true where a query sees "
            "a key"
        )
    positions_bt = inputs["position_ids"] if "position_ids" in inputs else positions_of(mask)
    given: Any = mask if mask.ndim == 2 else _masks(language, mask, positions_bt)
    body = module.get_submodule(language.body)
    output = body(input_ids=ids_bt, attention_mask=given, position_ids=positions_bt, use_cache=False)
    hidden_btd: Tensor = output.last_hidden_state
    return hidden_btd


def token_logits(module: nn.Module, language: LanguageHead, hidden_nd: Tensor) -> Tensor:
    """Returns the scores of every token of the vocabulary as the next one, (n, vocabulary) float32."""
    logits: Tensor = module.get_submodule(language.head)(hidden_nd).float()
    return logits if language.softcap is None else language.softcap * (logits / language.softcap).tanh()


Each = Callable[[Tensor], Tensor]
"""Is called with the newest token of every text (b,), and returns which texts end with it (b,)."""


def continued(
    module: nn.Module,
    ids_bt: Tensor,
    mask_bt: Tensor,
    *,
    most: int,
    stop: Sequence[int],
    pad: int,
    positions: int | None = None,
    each: Each | None = None,
) -> Tensor:
    """Returns the prompts with the tokens that follow greedily. `Backbone.generate` documents the arguments. positions: of the
    model; later tokens have the last one."""
    from transformers import GenerationConfig, StoppingCriteriaList

    # A configuration of its own: that beside the weights may sample, or punish repetition.
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, use_cache=True, eos_token_id=list(stop), pad_token_id=pad
    )
    model: Any = module
    before, model.generation_config = model.generation_config, settings
    # The newest tokens of several prompts are not contiguous. PyTorch would then copy the weight of the head for each of them.
    hooks = [model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))]
    if positions is not None:  # a table of positions has no entry for a later token
        hooks.append(model.register_forward_pre_hook(_Within(positions), with_kwargs=True))
    ending = StoppingCriteriaList()
    if each is not None:
        ending.append(lambda ids_bk, _, **__: each(ids_bk[:, -1]))
    try:
        found: Tensor = model.generate(
            input_ids=ids_bt, attention_mask=mask_bt, generation_config=settings, stopping_criteria=ending
        )
    finally:
        model.generation_config = before
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def recomputing(module: nn.Module) -> Iterator[None]:
    """Within the context a forward of a transformers model keeps the inputs of its blocks only; the backward computes the
    rest again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    # Early versions of transformers 5 have the older name.
    name = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
    getattr(module, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        for block in blocks:
            block.training = True  # of the block alone: nothing below it changes
        yield
    finally:
        for block in blocks:
            block.training = False
        getattr(module, f"{name}_checkpointing_disable")()


@dataclass(frozen=True)
class _Within:
    """A hook that lets no position be beyond the last of a model."""

    positions: int

    def __call__(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if given.get("position_ids") is not None:
            given = {**given, "position_ids": given["position_ids"].clamp(max=self.positions - 1)}
        return args, given


def _masks(language: LanguageHead, mask_b1tt: Tensor, positions_bt: Tensor) -> Tensor | dict[str, Tensor]:
    """What the body takes as its mask. transformers uses a 4-d mask in all layers as it is, so windows are added here."""
    seen_b1tt = _never_empty(mask_b1tt)
    if language.window is None:
        return seen_b1tt
    distances_b1tt = (positions_bt[:, :, None] - positions_bt[:, None, :])[:, None]
    near_b1tt = _never_empty(mask_b1tt & (distances_b1tt < language.window))
    return {"full_attention": seen_b1tt, "sliding_attention": near_b1tt} if language.mixed else near_b1tt


def _never_empty(mask_b1tt: Tensor) -> Tensor:
    """The mask in which padding sees itself: a softmax over nothing would not be finite."""
    itself_tt = torch.eye(mask_b1tt.shape[-1], dtype=torch.bool, device=mask_b1tt.device)
    return mask_b1tt | (itself_tt & ~mask_b1tt.any(-1, keepdim=True))
