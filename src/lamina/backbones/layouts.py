"""Linear layers that transformers holds in another layout: as `nn.Linear` with queries, keys and values one after another.

GPT-2's layers are `Conv1D`, whose weight is (in, out). GPT-NeoX's fused layer has the outputs head by head: queries, keys
and values of head 0, of head 1, and so on. Adapters need `nn.Linear` layers and contiguous outputs, so loading replaces
both. `StoredLayer` says how to go back to the layout of the plain transformers model.

Shape letters: o outputs, i inputs, e width of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class StoredLayer:
    """How the plain transformers model holds a linear layer of `Backbone.module`."""

    path: str
    """Path of the layer in the plain model, for example "gpt_neox.layers.3.attention.query_key_value"."""
    transposed: bool = False
    """Whether its weight is (in, out), as in GPT-2: `fan_in_fan_out` of PEFT."""
    heads: int | None = None
    """Heads whose queries, keys and values alternate in its outputs; None: the outputs have the same order in both."""

    def rows_to_stored(self, rows_o: Tensor) -> Tensor:
        """Returns a tensor with one row per output, (o, ...), with its rows in the order of the plain model.

        This is right for a bias (o), and for the factor (o, rank) of a low-rank update, as PEFT's lora_B.
        """
        return rows_o if self.heads is None else interleave(rows_o, self.heads)

    def rows_from_stored(self, rows_o: Tensor) -> Tensor:
        """Returns rows of the plain model in the order of `Backbone.module`: the inverse of `rows_to_stored`."""
        return rows_o if self.heads is None else separate(rows_o, self.heads)

    def to_stored(self, weight_oi: Tensor) -> Tensor:
        """Returns the weight as the plain model holds it: (o, i), or (i, o) if it is transposed."""
        rows_oi = self.rows_to_stored(weight_oi)
        return rows_oi.T.contiguous() if self.transposed else rows_oi

    def from_stored(self, weight: Tensor) -> Tensor:
        """Returns the weight (o, i) from that of the plain model: the inverse of `to_stored`."""
        return self.rows_from_stored(weight.T.contiguous() if self.transposed else weight)


class Interleave(nn.Module):
    """Reorders the last dimension from queries, keys and values one after another to head by head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, outputs_bto: Tensor) -> Tensor:
        """Returns outputs (b, t, o) in the order of GPT-NeoX."""
        lead = outputs_bto.shape[:-1]
        return outputs_bto.reshape(*lead, 3, self.heads, -1).transpose(-3, -2).reshape(outputs_bto.shape)


def interleave(rows_o: Tensor, heads: int) -> Tensor:
    """Returns rows (o, ...) in the order head, role, e from rows in the order role, head, e."""
    return rows_o.reshape(3, heads, -1, *rows_o.shape[1:]).transpose(0, 1).reshape(rows_o.shape)


def separate(rows_o: Tensor, heads: int) -> Tensor:
    """Returns rows (o, ...) in the order role, head, e from rows in the order head, role, e."""
    return rows_o.reshape(heads, 3, -1, *rows_o.shape[1:]).transpose(0, 1).reshape(rows_o.shape)


def use_linear_layers(module: nn.Module, interleaved: Sequence[str], heads: int) -> dict[str, StoredLayer]:
    """Replaces layers of the module by equal `nn.Linear` layers. Returns how each was stored, by its new path.

    Every Conv1D becomes an nn.Linear. interleaved: paths of fused layers whose outputs are ordered head by head. Each
    becomes a sequence of an nn.Linear with queries, keys and values one after another, and `Interleave`.
    """
    from transformers.pytorch_utils import Conv1D

    stored: dict[str, StoredLayer] = {}
    for path in [path for path, layer in module.named_modules() if isinstance(layer, Conv1D)]:
        stored[path] = StoredLayer(path, transposed=True)
        module.set_submodule(path, _linear(module.get_submodule(path), stored[path]))
    for path in interleaved:
        stored[f"{path}.0"] = StoredLayer(path, heads=heads)
        linear = _linear(module.get_submodule(path), stored[f"{path}.0"])
        module.set_submodule(path, nn.Sequential(linear, Interleave(heads)))
    return stored


def transformers_state(stored: Mapping[str, StoredLayer], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict of the plain transformers model from that of the module.

    stored: how the plain model holds layers that were replaced, by path. Names of other tensors stay as they are.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, end = name.rpartition(".")
        layer = stored.get(path)
        if layer is None:
            plain[name] = tensor
        else:
            plain[f"{layer.path}.{end}"] = layer.to_stored(tensor) if end == "weight" else layer.rows_to_stored(tensor)
    return plain


def _linear(layer: nn.Module, stored: StoredLayer) -> nn.Linear:
    """A frozen nn.Linear with the weights of a stored layer."""
    assert isinstance(layer.weight, Tensor)
    assert layer.bias is None or isinstance(layer.bias, Tensor)
    weight_oi = stored.from_stored(layer.weight.detach())
    linear = nn.Linear(weight_oi.shape[1], weight_oi.shape[0], bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight_oi, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(stored.rows_from_stored(layer.bias.detach()), requires_grad=False)
    return linear.eval()
