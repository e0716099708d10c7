"""The nouns of a backbone: `Site`, `ImageInput` and `Backbone`.

Shape letters: b batch, c channels, h w pixels, t tokens (special tokens first), d width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lamina.backbones.language import Each, LanguageHead, continued, hidden_states, recomputing, token_logits
from lamina.backbones.layouts import StoredLayer, transformers_state
from lamina.errors import BackboneError

Kind = Literal["image", "text", "language"]
"""What a backbone takes: images, texts (an encoder), or instructions (a causal language model)."""
Pooling = Literal["cls", "mean"]
Triple = tuple[float, float, float]
Features = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
Pool = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

ROLES = ("q", "k", "v", "out", "fc1", "fc2")
"""Queries, keys, values and output of the attention; first and second layer of the MLP."""
LANGUAGE_ROLES = ("q", "k", "v", "out", "gate", "up", "down")
"""The same of causal language models, whose MLP is `down(act(gate) * up)`, or `down(act(up))` without a gate."""

_GROUPS = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}


@dataclass(frozen=True)
class Site:
    """One linear layer of the backbone, or a slice of its outputs, with its role."""

    name: str
    """For example "block3.k"."""
    block: int
    role: str
    """One of ROLES, or of LANGUAGE_ROLES in a causal language model."""
    path: str
    """Path of the nn.Linear in `Backbone.module`, for example "layers.3.attention.k_proj"."""
    outputs: tuple[int, int] | None
    """Output units of that nn.Linear, (start, stop), where several roles share it (fused qkv); None means all."""
    group: str
    """Sites of one group read the same input: "block3.attention" for q, k and v; "block3.mlp" for gate and up; otherwise
    "block3.", and the role. The gated MLP of an encoder has two sites with the role fc1: "block3.fc1" and
    "block3.fc1_gate"."""


def make_site(block: int, role: str, path: str, outputs: tuple[int, int] | None = None) -> Site:
    """Returns a Site with the standard name and group. Raises BackboneError for a role that is in neither list of roles."""
    known = tuple(dict.fromkeys((*ROLES, *LANGUAGE_ROLES)))
    if role not in known:
        raise BackboneError(f"unknown role {role!r} for {path!r}; roles are {', '.join(known)}")
    return Site(f"block{block}.{role}", block, role, path, outputs, f"block{block}.{_GROUPS.get(role, role)}")


@dataclass(frozen=True)
class ImageInput:
    """How an image becomes `pixel_values`: `size` x `size` pixels, RGB in [0, 1], minus `mean`, divided by `std`."""

    size: int
    mean: Triple
    std: Triple
    channels: int = 3
    """Input channels of the model. One of 1 channel (grey) also takes RGB, with equal means and stds: `load` makes it
    convert to luma."""


@dataclass
class Backbone:
    """A frozen pre-trained model and the sites that adapters can use."""

    name: str
    kind: Kind
    hash: str
    """sha256 over names, dtypes, shapes and bytes of the stored tensors that were read, however they are sharded."""
    module: nn.Module
    """In eval mode; no parameter requires a gradient."""
    sites: tuple[Site, ...]
    width: int
    blocks: int
    image: ImageInput | None
    tokenizer: Path | None
    """Folder of the tokenizer, for text and language; None if there is none beside the weights."""
    pooling: Pooling
    forward: Features
    """Maps inputs to features for this family; called by `features`."""
    heads: int | None = None
    """Heads of every attention layer; None if unknown."""
    relative: bool = False
    """Whether attention depends on positions too, and not on queries and keys alone: by a bias, by rotation, or because it
    is causal."""
    ignored: tuple[str, ...] = ()
    """Stored tensors that the backbone does not use, such as an old classification head."""
    stages: tuple[str, ...] = ()
    """Paths in `module` of the embeddings, block 0, block 1, ...: each gets hidden states (b, t, d) as its first
    argument. Empty if unknown; `layered` needs them."""
    pool: Pool | None = None
    """Maps hidden states (b, t, d) and inputs to (b, d), as `features` does; None if unknown. `layered` needs it."""
    positions: int | None = None
    """Text and language: longest input in tokens, special tokens included; None means no limit."""
    vocabulary: int | None = None
    """Text and language: number of token ids, the rows of the input embeddings; None if unknown."""
    fusible: bool = False
    """Whether a fused block can compute its blocks: those of transformers' `ViTLayer` with exact GELU."""
    language: LanguageHead | None = None
    """For causal language models only."""
    stored: Mapping[str, StoredLayer] = field(default_factory=dict)
    """How the plain transformers model holds linear layers that loading replaced, by their path in `module`."""

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns features (b, d) of `pixel_values` (b, c, h, w), or of `input_ids` and `attention_mask` (b, t).

        Images: the class token after the last LayerNorm ("cls"), or the mean of the patch tokens ("mean"). Text: the
        first token of the last hidden state, or its mean over the attention mask. Language: that mean.
        docs/backbones.md has the details of each family. Row i depends on example i only.
        Raises BackboneError for images of another size than `image.size`.
        """
        if self.image is not None and inputs["pixel_values"].shape[-2:] != (self.image.size, self.image.size):
            got = "x".join(map(str, inputs["pixel_values"].shape[-2:]))
            raise BackboneError(f"{self.name} takes {self.image.size} px images, got {got}; resize them")
        return self.forward(self.module, inputs)

    def hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the hidden states of a causal language model after its last norm, (b, t, d). No scores are computed.

        input_ids: (b, t). attention_mask: (b, t), zero for padding on any side; or (b, 1, t, t) boolean, true where the
        query (row) sees the key (column), which must include the causal order. Sliding windows are added to it.
        position_ids: (b, t), optional. By default they are counted from the mask (see `positions_of`), so left and right
        padding give the same hidden states. transformers alone would count padding.

        Raises BackboneError for another kind of backbone, and for a mask of another shape or type.
        """
        return hidden_states(self.module, self._language(), inputs)

    def token_logits(self, hidden_nd: Tensor) -> Tensor:
        """Returns the scores of the next token for hidden states (n, d) of `hidden`, (n, vocabulary) float32.

        Raises BackboneError for a backbone that is not a causal language model.
        """
        return token_logits(self.module, self._language(), hidden_nd)

    def generate(
        self,
        ids_bt: Tensor,
        mask_bt: Tensor,
        *,
        most: int,
        stop: Sequence[int],
        pad: int,
        each: Each | None = None,
    ) -> Tensor:
        """Returns prompts (b, t), padded on the left, with the tokens that follow greedily, (b, t + n) with n up to `most`.

        stop: tokens that end a text. pad: id of the padding token. Keys and values of earlier tokens are kept. Tokens beyond
        the last position of the model mean nothing. each: is called with the newest token of every text (b,), padding for
        those that have ended; returns which texts end with it (b,).
        Raises BackboneError for a backbone that is not a causal language model.
        """
        self._language()
        return continued(
            self.module, ids_bt, mask_bt, most=most, stop=stop, pad=pad, positions=self.positions, each=each
        )

    def recomputing(self) -> AbstractContextManager[None]:
        """Within the context a forward of a causal language model keeps little for its backward, which computes it again.

        Raises BackboneError for a backbone that is not a causal language model.
        """
        self._language()
        return recomputing(self.module)

    def _language(self) -> LanguageHead:
        if self.language is None:
            raise BackboneError(f"{self.name} is not a causal language model: it has no scores of a next token")
        return self.language

    def sites_of(self, roles: Sequence[str], blocks: Sequence[int] | None) -> list[Site]:
        """Returns the sites with these roles in these blocks (all if None)."""
        return [site for site in self.sites if site.role in roles and (blocks is None or site.block in blocks)]

    def stored_layer(self, path: str) -> StoredLayer:
        """Returns how the plain transformers model holds the linear layer at this path of `module`."""
        return self.stored.get(path, StoredLayer(path))

    def transformers_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the state dict of the plain transformers model.

        state: names and tensors as in `module`, which is the default; for example with merged weights. Tied tensors have
        both of their names, as in `state_dict`.
        """
        return transformers_state(self.stored, self.module.state_dict() if state is None else state)

    def layered(self, inputs: Mapping[str, Tensor], layers: int) -> Tensor:
        """Returns features of the last `layers` blocks (all, if there are fewer), side by side, (b, layers d).

        The last d columns are `features`. The others are the hidden states between blocks, pooled in the same way and
        not normalised. Raises as `features` and `check_layers` do.
        """
        self.check_layers(layers)
        found: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert self.pool is not None
            found.append(self.pool(args[0], inputs))

        # The input of the next block: some families return tuples, or change the hidden states between blocks.
        later = self.stages[1:][-layers:][1:]
        hooks = [self.module.get_submodule(path).register_forward_pre_hook(note) for path in later]
        try:
            last_bd = self.features(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([*found, last_bd], 1)

    def blocks_of(self, layers: int) -> int:
        """Returns how many blocks the features of the last `layers` blocks are of: all where there are fewer."""
        return min(layers, len(self.stages) - 1) if layers > 1 else 1

    def check_layers(self, layers: int) -> None:
        """Raises BackboneError if features of several blocks are wanted and only those of the last one are available."""
        if layers > 1 and (self.pool is None or not self.stages):
            raise BackboneError(
                f"{self.name} does not say what it computes block by block, so there are features of its last block only; give "
                "`stages` and `pool` to from_module(), or leave `layers` at 1"
            )

    def cast(self, dtype: torch.dtype) -> None:
        """Converts the frozen weights to this precision. Frequencies of rotary positions stay as they are: in bfloat16 they
        would be wrong by whole turns at large positions."""
        kept = [(path, buffer) for path, buffer in self.module.named_buffers() if path.endswith("inv_freq")]
        self.module.to(dtype)
        for path, buffer in kept:
            parent, _, name = path.rpartition(".")
            setattr(self.module.get_submodule(parent), name, buffer)


def class_token(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Returns the class token only: a forward pre-hook for the parts of the last block that follow its attention.

    If the feature is the class token, the last block need not compute the other tokens after its attention. They get
    the class token's update instead, and nothing reads them.
    """
    return (inputs[0][:, :1],)
