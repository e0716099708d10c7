"""The table of supported families: a family is data."""

from dataclasses import dataclass

from lamina.backbones.roles import Kind, Triple

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_VIT = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
_BERT = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
_DISTILBERT = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")


@dataclass(frozen=True)
class Family:
    """What differs between model types."""

    kind: Kind
    model: str
    """Class in transformers."""
    block: str
    """Path of block {} in that module, as transformers 5 names it; checked against the module that was built."""
    parts: tuple[str, ...]
    """Paths inside a block, in the order of ROLES."""
    middle: str = "layernorm_after"
    """Path inside a block of what its MLP's input goes through; for images."""
    fusible: bool = False
    """Whether a block is made as transformers' `ViTLayer` is."""
    pooler: bool = True
    """Whether the class takes `add_pooling_layer`, which is always declined."""
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)


FAMILIES = {  # by the model_type in config.json
    "vit": Family("image", "ViTModel", "layers.{}", _VIT, fusible=True),
    "deit": Family("image", "DeiTModel", "layers.{}", _VIT, fusible=True, mean=IMAGENET[0], std=IMAGENET[1]),
    "dinov2": Family("image", "Dinov2Model", "encoder.layer.{}", _VIT, "norm2", False, False, *IMAGENET),
    "bert": Family("text", "BertModel", "encoder.layer.{}", _BERT),
    "roberta": Family("text", "RobertaModel", "encoder.layer.{}", _BERT),
    "distilbert": Family("text", "DistilBertModel", "transformer.layer.{}", _DISTILBERT, pooler=False),
}
