"""The supported families: a family is data, one row of FAMILIES. `docs/backbones.md` says how to add one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lamina.backbones.roles import LANGUAGE_ROLES, ROLES, Kind, Triple

Normalisation = tuple[Triple, Triple]
HALF: Normalisation = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Normalisation = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between model types. All paths are those of transformers 5, checked against the module."""

    kind: Kind
    model: str
    """Class in transformers."""
    block: str
    """Path of block {} in the module."""
    layers: tuple[str, ...]
    """Paths in a block of its linear layers, in the order of `roles`. Roles with the same path share the outputs of that
    layer in equal parts."""
    gated: tuple[str, str, str] | None = None
    """Paths in a block of (gate, fc1, fc2), in the variant of the family that has a gated MLP."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the class."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that replace those of config.json."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """The implementation that transformers offers for it."""
    positions: str | None = None
    """Path of the table of absolute positions, if there is one. For images it is resized; the other image families
    adapt to the size of the input by themselves. For text its length bounds the input."""
    relative: bool = False
    """Whether attention depends on positions too: a bias, rotated queries and keys, or the causal order."""
    shared: tuple[str, Mapping[str, str]] | None = None
    """(setting, {layer: copy}): if the setting is true, the linear layer of an attention also projects relative positions.
    Then a frozen copy of it does that instead, so that a site reads hidden states only."""

    middle: str = "layernorm_after"
    """Images: path in a block of the LayerNorm before the MLP."""
    norm: str | None = None
    """Images: path of the last LayerNorm, if `last_hidden_state` comes before it. It is applied after pooling."""
    has_class_token: bool = True
    mean_if: str | None = None
    """Images: setting that says that the features are the mean of the patch tokens, if there is one."""
    antialias: bool = False
    """Images: whether the table of positions is resized with antialiasing."""
    takes_patches: bool = False
    """Images: whether the input is flat patches (SigLIP 2), not pixels."""
    tower: str | None = None
    """Images: prefix of the stored names of the vision tower. Tensors without it are ignored."""
    fusible: bool = False
    """Images: whether its blocks are those of transformers' `ViTLayer`."""
    normalisation: Normalisation = HALF
    """Images: mean and std if no file beside the weights says them."""

    body: str = ""
    """Language: path of the model without its head."""
    head: str = "lm_head"
    """Language: path of the linear layer that gives the scores of tokens."""
    embeddings: str = ""
    """Language: path in `body` of the table of token embeddings."""
    interleaved: str | None = None
    """Language: path in a block of a fused layer whose outputs are ordered head by head. Its nn.Linear is at `.0` of it
    after loading, see `layouts`."""

    @property
    def embeddings_path(self) -> str:
        """Path of the embeddings in the module."""
        return f"{self.body}.{self.embeddings}" if self.kind == "language" else "embeddings"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of `layers`. Language: without gate, if there is one path less."""
        if self.kind != "language":
            return ROLES
        return LANGUAGE_ROLES if len(self.layers) == len(LANGUAGE_ROLES) else _UNGATED


_UNGATED = tuple(role for role in LANGUAGE_ROLES if role != "gate")
_ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_VIT = (*_ATTENTION, "mlp.fc1", "mlp.fc2")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_MLP = ("intermediate.dense", "output.dense")
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", *_MLP)
_DEBERTA = (*(f"attention.self.{role}_proj" for role in ("query", "key", "value")), "attention.output.dense", *_MLP)
_SHARED_BY_DEBERTA = ("share_att_key", {"key_proj": "pos_key_proj", "query_proj": "pos_query_proj"})
_MPNET = ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", *_MLP)
_DISTILBERT = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
_MODERNBERT = ("attn.Wqkv", "attn.Wqkv", "attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")
_LLAMA = (*(f"self_attn.{role}_proj" for role in "qkvo"), *_GATED)
_GPT2 = ("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_QKV = "attention.query_key_value"
_NEOX = (f"{_QKV}.0", f"{_QKV}.0", f"{_QKV}.0", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def _vit(model: str, **more: Any) -> Family:
    plain: dict[str, Any] = {"options": {"add_pooling_layer": False}, "fusible": True}
    return _image(model, block="layers.{}", **(plain | more))


def _beit() -> Family:
    more: dict[str, Any] = {"options": {}, "fusible": False, "positions": None, "relative": True}
    return _vit("BeitModel", norm="pooler.layernorm", mean_if="use_mean_pooling", **more)


def _dino(model: str, **more: Any) -> Family:
    more = {"block": "encoder.layer.{}", "gated": _GATED} | more
    return _image(model, middle="norm2", normalisation=IMAGENET, **more)


def _image(model: str, **more: Any) -> Family:
    more = {"layers": _VIT, "positions": "embeddings.position_embeddings"} | more
    return Family(kind="image", model=model, **more)


def _tower(model: str, **more: Any) -> Family:
    table: dict[str, Any] = {"positions": "embeddings.position_embedding", "tower": "vision_model."}
    return _image(model, block="encoder.layers.{}", layers=_CLIP, middle="layer_norm2", **(table | more))


def _bert(model: str, *, pooler: bool = True, **more: Any) -> Family:
    more = {"block": "encoder.layer.{}", "layers": _BERT, "positions": "embeddings.position_embeddings"} | more
    return Family(kind="text", model=model, options={"add_pooling_layer": False} if pooler else {}, **more)


def _language(model: str, dropouts: tuple[str, ...] = ("attention_dropout",), **more: Any) -> Family:
    """Dropouts are off: gradient checkpointing needs the layers in training mode."""
    more = {"body": "model", "embeddings": "embed_tokens", "block": "model.layers.{}", "layers": _LLAMA} | more
    settings = {"use_cache": True, **dict.fromkeys(dropouts, 0.0)}
    return Family(kind="language", model=model, settings=settings, relative=True, **more)


def _gpt2() -> Family:
    more = {"body": "transformer", "embeddings": "wte", "block": "transformer.h.{}", "layers": _GPT2}
    dropouts = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return _language("GPT2LMHeadModel", dropouts, **more)


def _gpt_neox() -> Family:
    more = {"body": "gpt_neox", "embeddings": "embed_in", "block": "gpt_neox.layers.{}", "layers": _NEOX}
    return _language("GPTNeoXForCausalLM", ("attention_dropout", "hidden_dropout"), interleaved=_QKV, **more)


_CLIP_VISION = _tower("CLIPVisionModel", norm="post_layernorm", normalisation=CLIP)
_NO_HEAD: Any = {"has_class_token": False, "settings": {"vision_use_head": False}}
_SIGLIP_VISION = _tower("SiglipVisionModel", **_NO_HEAD)
_SIGLIP2_VISION = _tower("Siglip2VisionModel", positions=None, takes_patches=True, **_NO_HEAD)

FAMILIES: Mapping[str, Family] = {  # by the model_type in config.json
    "vit": _vit("ViTModel"),
    "deit": _vit("DeiTModel", normalisation=IMAGENET),
    "vit_msn": _vit("ViTMSNModel", options={}, fusible=False, normalisation=IMAGENET),
    "beit": _beit(),
    "dinov2": _dino("Dinov2Model"),
    "dinov2_with_registers": _dino("Dinov2WithRegistersModel", antialias=True),
    "dinov3_vit": _dino(
        "DINOv3ViTModel", block="model.layer.{}", layers=(*_ATTENTION, *_GATED[1:]), positions=None, relative=True
    ),
    "clip": _CLIP_VISION,
    "clip_vision_model": _CLIP_VISION,
    "siglip": _SIGLIP_VISION,
    "siglip_vision_model": _SIGLIP_VISION,
    "siglip2": _SIGLIP2_VISION,
    "siglip2_vision_model": _SIGLIP2_VISION,
    "bert": _bert("BertModel"),
    "roberta": _bert("RobertaModel"),
    "xlm-roberta": _bert("XLMRobertaModel"),
    "camembert": _bert("CamembertModel"),
    "electra": _bert("ElectraModel", pooler=False),
    "distilbert": _bert("DistilBertModel", pooler=False, block="transformer.layer.{}", layers=_DISTILBERT),
    "mpnet": _bert("MPNetModel", layers=_MPNET, attention="eager", relative=True),
    "deberta-v2": _bert(
        "DebertaV2Model", pooler=False, layers=_DEBERTA, attention="eager", relative=True, shared=_SHARED_BY_DEBERTA
    ),
    "modernbert": _bert(
        "ModernBertModel", pooler=False, block="layers.{}", layers=_MODERNBERT, positions=None, relative=True
    ),
    "llama": _language("LlamaForCausalLM"),
    "mistral": _language("MistralForCausalLM"),
    "qwen2": _language("Qwen2ForCausalLM"),
    "qwen3": _language("Qwen3ForCausalLM"),
    "gemma3_text": _language("Gemma3ForCausalLM"),
    "gpt2": _gpt2(),
    "gpt_neox": _gpt_neox(),
}
