"""Causal language models: every family computes what transformers' own model does, in all layouts, masks and paddings.

Shape letters: b batch, t tokens, n positions, d width, o outputs, i inputs.
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.conformance import cases
from tests.tiny import noise
from tests.unit.backbones.folders import change, configure
from tests.unit.backbones.languages import LANGUAGES
from torch import Tensor, nn

from lamina.adapters import LowRank
from lamina.backbones import Backbone, LanguageHead, from_module, load, make_site, positions_of
from lamina.backbones.families import FAMILIES
from lamina.backbones.layouts import StoredLayer, interleave, separate
from lamina.errors import BackboneError
from lamina.learner import Learner
from lamina.speed.attention import use_plain_attention

IDS = torch.tensor([[1, 5, 9, 7, 8, 20, 33, 41], [1, 4, 6, 11, 12, 60, 2, 3]])
SMOLLM2 = Path(__file__).parents[3] / "runs" / "smollm2"

every_family = pytest.mark.parametrize("name", LANGUAGES)
smollm2 = pytest.mark.skipif(not SMOLLM2.exists(), reason="runs/smollm2 is absent: run `make runs/smollm2`")


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    LANGUAGES[name].raw().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    LANGUAGES["llama"].raw().save_pretrained(tmp_path)
    return tmp_path


def ones(ids_bt: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids_bt, "attention_mask": torch.ones_like(ids_bt)}


def logits(backbone: Backbone, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        hidden_btd = backbone.hidden(inputs)
        return backbone.token_logits(hidden_btd.flatten(0, 1)).unflatten(0, hidden_btd.shape[:2])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- every family


def test_every_family_has_a_row():
    families = {name for name, family in FAMILIES.items() if family.kind == "language"}
    assert {name.split(",")[0] for name in LANGUAGES} == families


@every_family
def test_scores_and_features_are_those_of_transformers(name: str, folder: Path):
    row, backbone = LANGUAGES[name], load(str(folder))
    with torch.no_grad():
        expected = row.raw()(input_ids=IDS, output_hidden_states=True)
        close(logits(backbone, ones(IDS)), expected.logits)
        close(backbone.module(input_ids=IDS).logits, expected.logits)
        close(backbone.features(ones(IDS)), expected.hidden_states[-1].mean(1))
        layers_bd = torch.cat([state.mean(1) for state in expected.hidden_states[1:]], 1)
        close(backbone.layered(ones(IDS), 2), layers_bd)
    assert (backbone.kind, backbone.width, backbone.blocks, backbone.heads) == ("language", 32, 2, 4)
    assert (backbone.vocabulary, backbone.positions, backbone.pooling) == (64, 40, "mean")
    assert (backbone.image, backbone.tokenizer, backbone.relative, backbone.ignored) == (None, None, True, ())
    assert backbone.language is not None
    assert backbone.language.window == row.window
    assert backbone.module.get_submodule(backbone.stages[0]) is backbone.module.get_input_embeddings()
    assert {parameter.dtype for parameter in backbone.module.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())


@every_family
def test_every_role_of_every_block_is_found(name: str, folder: Path):
    row, backbone = LANGUAGES[name], load(str(folder))
    groups = dict.fromkeys("qkv", "attention") | {"gate": "mlp", "up": "mlp"}
    for block in range(2):
        sites = [site for site in backbone.sites if site.block == block]
        assert tuple(site.role for site in sites) == row.roles
        assert [site.name for site in sites] == [f"block{block}.{role}" for role in row.roles]
        assert [site.group for site in sites] == [f"block{block}.{groups.get(role, role)}" for role in row.roles]
        for site in sites:
            layer = backbone.module.get_submodule(site.path)
            assert isinstance(layer, nn.Linear)
            outputs = layer.out_features if site.outputs is None else site.outputs[1] - site.outputs[0]
            if site.role in "kv":
                assert outputs == row.key_outputs
    if row.roles[4] == "up":
        assert [site.outputs for site in backbone.sites[:3]] == [(0, 32), (32, 64), (64, 96)]


@every_family
def test_a_group_reads_the_same_input_once(name: str, folder: Path):
    backbone = load(str(folder))
    seen: dict[str, list[Tensor]] = {site.path: [] for site in backbone.sites}
    for path, found in seen.items():
        layer = backbone.module.get_submodule(path)
        layer.register_forward_pre_hook(lambda _, given, found=found: found.append(given[0]))
    backbone.features(ones(IDS))
    groups: dict[str, Tensor] = {}
    for site in backbone.sites:
        (read_bti,) = seen[site.path]
        assert torch.equal(groups.setdefault(site.group, read_bti), read_bti), site.name


@every_family
def test_v_is_what_the_output_of_attention_is_linear_in_and_q_and_k_are_not(name: str, folder: Path):
    backbone = load(str(folder))
    sites = {site.role: site for site in backbone.sites if site.block == 0}
    seen: list[Tensor] = []
    backbone.module.get_submodule(sites["out"].path).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        backbone.features(ones(IDS))
        for role in "qkv":
            rows = slice(*(sites[role].outputs or (None,)))
            parameters = list(backbone.module.get_submodule(sites[role].path).parameters())
            kept = [parameter.clone() for parameter in parameters]
            for parameter in parameters:
                parameter[rows] *= 2
            backbone.features(ones(IDS))
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)
    before, q, k, v = seen
    close(v, 2 * before)
    assert torch.equal(q[:, 0], before[:, 0]), "the first token sees itself alone"
    assert torch.equal(k[:, 0], before[:, 0])
    if "qwen3" not in name and "gemma3" not in name:  # they normalise queries and keys
        assert not torch.allclose(q[:, 1:], before[:, 1:])
        assert not torch.allclose(k[:, 1:], before[:, 1:])


@every_family
def test_generation_with_a_cache_is_greedy_as_in_transformers(name: str, folder: Path):
    backbone = load(str(folder))
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 9.0, "top_k": 3, "eos_token_id": [2, 3]}'
    )
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    expected = LANGUAGES[name].raw().generate(IDS, **options)
    assert torch.equal(backbone.module.generate(IDS, **options), expected)
    again = load(str(folder)).module
    assert again.generation_config.eos_token_id == [2, 3]
    assert not again.generation_config.do_sample
    assert again.config.use_cache


@every_family
def test_generation_gives_the_head_what_pytorch_multiplies_without_copies(name: str, folder: Path):
    """For inputs (b, 1, d) with gaps PyTorch copies the weight of the head b times."""
    backbone = load(str(folder))
    given: list[bool] = []
    head = backbone.module.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: given.append(args[0].is_contiguous()))
    found = backbone.generate(IDS, torch.ones_like(IDS), most=3, stop=[backbone.vocabulary - 1], pad=0)
    assert given == [True] * (found.shape[1] - IDS.shape[1])
    assert len(given) > 1
    assert len(head._forward_pre_hooks) == 0


@every_family
def test_no_dropout_in_training_mode(name: str, folder: Path):
    backbone = load(str(folder))
    expected = logits(backbone, ones(IDS))
    backbone.module.train()
    assert torch.equal(logits(backbone, ones(IDS)), expected)


# ---------------------------------------------------------------------------------------------- masks and positions


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_other_examples_change_nothing(name: str, side: str, folder: Path):
    backbone = load(str(folder))
    short, padding = IDS[1:, :5], torch.zeros(1, 3, dtype=torch.int64)
    parts = [padding, short] if side == "left" else [short, padding]
    mask_bt = torch.ones(2, 8, dtype=torch.int64)
    kept = slice(3, None) if side == "left" else slice(5)
    mask_bt[1] = 0
    mask_bt[1, kept] = 1
    inputs = {"input_ids": torch.cat([IDS[:1], torch.cat(parts, 1)]), "attention_mask": mask_bt}
    with torch.no_grad():
        hidden_btd, features_bd = backbone.hidden(inputs), backbone.features(inputs)
        close(hidden_btd[:1], backbone.hidden(ones(IDS[:1])))
        close(hidden_btd[1:, kept], backbone.hidden(ones(short)))
        close(features_bd, torch.cat([backbone.features(ones(IDS[:1])), backbone.features(ones(short))]))


PROMPT, FIRST, SECOND = [1, 5, 9, 7, 30, 31], [8, 20, 33], [12, 60, 2, 3]


def packed(padding: int = 0) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A prompt with two continuations in one sequence, and the two plain sequences."""
    p, n, m = len(PROMPT), len(FIRST), len(SECOND)
    ids_bt = torch.tensor([[0] * padding + PROMPT + FIRST + SECOND])
    mask_tt = torch.ones(p + n + m, p + n + m, dtype=torch.bool).tril()
    mask_tt[p + n :, p : p + n] = False
    all_tt = torch.zeros(ids_bt.shape[1], ids_bt.shape[1], dtype=torch.bool)
    all_tt[padding:, padding:] = mask_tt
    plain = [torch.tensor([PROMPT + part]) for part in (FIRST, SECOND)]
    return {"input_ids": ids_bt, "attention_mask": all_tt[None, None]}, plain


@every_family
@pytest.mark.parametrize("given", [True, False], ids=["positions given", "positions counted"])
def test_continuations_of_one_prompt_in_one_sequence(name: str, given: bool, folder: Path):
    """Sequences are longer than the sliding windows, of three tokens."""
    backbone, (inputs, plain) = load(str(folder)), packed(padding=2)
    p, n, m = len(PROMPT), len(FIRST), len(SECOND)
    if given:
        positions = [0, 0, *range(p), *range(p, p + n), *range(p, p + m)]
        inputs["position_ids"] = torch.tensor([positions])
    with torch.no_grad():
        hidden_btd = backbone.hidden(inputs)[:, 2:]
        first_btd, second_btd = (backbone.hidden(ones(ids_bt)) for ids_bt in plain)
        raw = LANGUAGES[name].raw()
        theirs = [raw(input_ids=ids_bt, output_hidden_states=True).hidden_states[-1] for ids_bt in plain]
    assert hidden_btd.isfinite().all()
    close(first_btd, theirs[0])
    close(second_btd, theirs[1])
    close(hidden_btd[:, : p + n], first_btd)
    close(torch.cat([hidden_btd[:, :p], hidden_btd[:, p + n :]], 1), second_btd)


@every_family
def test_padding_sees_itself_in_every_layer(name: str, folder: Path):
    """A softmax over nothing is not finite on every device."""
    backbone, (inputs, _) = load(str(folder)), packed(padding=2)
    seen: list[Tensor] = []

    def note(_: nn.Module, __: object, given: dict[str, Any]) -> None:
        seen.append(given["attention_mask"])

    for layer in backbone.module.modules():
        if type(layer).__name__.endswith("Attention"):
            layer.register_forward_pre_hook(note, with_kwargs=True)
    backbone.hidden(inputs)
    assert len(seen) == 2
    assert all(mask_b1tt.any(-1).all() and mask_b1tt[0, 0, 0].sum() == 1 for mask_b1tt in seen)


def test_positions_are_counted_from_the_mask():
    assert positions_of(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    inputs, _ = packed(padding=1)
    assert positions_of(inputs["attention_mask"]).tolist() == [[0, *range(6), *range(6, 9), *range(6, 10)]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 7), r"attention_mask has the shape \[2, 7\]; give \[2, 8\], or \[2, 1, 8, 8\]"),
        (torch.ones(2, 8, 8).bool(), r"attention_mask has the shape \[2, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), r"has the type torch.float32; give torch.bool"),
    ],
    ids=["length", "three dimensions", "additive"],
)
def test_other_masks_are_refused(llama: Path, mask: Tensor, message: str):
    with pytest.raises(BackboneError, match=message):
        load(str(llama)).hidden({"input_ids": IDS, "attention_mask": mask})


# ---------------------------------------------------------------------------------------------- adapters


@every_family
def test_adapters_of_every_role_compute_what_merged_weights_do(name: str, folder: Path):
    """Fused and grouped layers too: an update of one role changes that role alone, here and in the plain model."""
    row, backbone = LANGUAGES[name], load(str(folder))
    learner = Learner(backbone, row.roles)
    plain = copy.deepcopy(row.raw())
    for name_of_site, site in learner.sites.items():
        up_or, down_ri = noise((site.d_out, 2), name_of_site), noise((2, site.d_in), f"{name_of_site} down") / 30
        site.add("task", LowRank(trained={"up": up_or, "down": down_ri}))
        whole_oi = torch.zeros(site.layer.d_out, site.d_in)
        whole_oi[site.outputs.start : site.outputs.stop] = up_or @ down_ri
        stored = backbone.stored_layer(site.where.path)
        plain.get_submodule(stored.path).weight.data += stored.to_stored(whole_oi)
    with torch.no_grad():
        found, expected = logits(backbone, ones(IDS)), plain(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(expected, row.raw()(input_ids=IDS).logits, atol=1e-2)


@every_family
@pytest.mark.parametrize("form", ["padding", "continuations"])
def test_the_attention_of_bf16_training_on_a_cpu_sees_the_same_tokens(name: str, form: str, folder: Path):
    backbone, (inputs, _) = load(str(folder)), packed(padding=2)
    if form == "padding":
        inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[0] * 2 + [1] * 6, [1] * 8])}
    seen = inputs["attention_mask"][:, 0].any(1) if form == "continuations" else inputs["attention_mask"].bool()
    with torch.no_grad():
        expected_btd = backbone.hidden(inputs)
    undo = use_plain_attention(backbone.module)
    backbone.module.requires_grad_(True)
    found_btd = backbone.hidden(inputs)
    assert found_btd.requires_grad  # without gradients PyTorch's own attention would be compared with itself
    close(found_btd[seen], expected_btd[seen])
    undo()
    with torch.no_grad():
        assert torch.equal(backbone.hidden(inputs), expected_btd)


@pytest.mark.parametrize("name", [name for name in LANGUAGES if "," not in name])
def test_inflora_learns_tasks(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backbone = load(str(folder))
    monkeypatch.setitem(cases.BACKBONES, "family", (lambda: backbone, LANGUAGES[name].roles))
    training = cases.TRAINING.model_copy(update={"epochs": 20})
    loop = cases.make_loop("inflora", cases.World("family", "class"), tmp_path / "run", training=training)
    loop.run()
    by_task: dict[int, list[float]] = {}
    for task, _, loss in loop.state.losses:
        by_task.setdefault(task, []).append(loss)
    assert len(by_task) == 3
    assert sum(losses[-1] for losses in by_task.values()) < 0.5 * sum(losses[0] for losses in by_task.values())


# ---------------------------------------------------------------------------------------------- stored layouts


@every_family
def test_the_way_back_to_the_plain_transformers_model(name: str, folder: Path):
    raw, backbone = LANGUAGES[name].raw(), load(str(folder))
    state, expected = backbone.transformers_state(), raw.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    plain = dict(raw.named_modules())
    for site in backbone.sites:
        stored, layer = backbone.stored_layer(site.path), backbone.module.get_submodule(site.path)
        theirs = plain[stored.path]
        assert torch.equal(stored.to_stored(layer.weight), theirs.weight)
        assert torch.equal(stored.from_stored(theirs.weight), layer.weight)
        assert stored.transposed == (type(theirs).__name__ == "Conv1D")
        if layer.bias is not None:
            assert torch.equal(stored.rows_to_stored(layer.bias), theirs.bias)
            assert torch.equal(stored.rows_from_stored(theirs.bias), layer.bias)


@every_family
def test_a_low_rank_update_goes_back_as_the_merged_weight_does(name: str, folder: Path):
    """lora_B has one row per output, whatever the layout of the weight."""
    backbone = load(str(folder))
    for site in backbone.sites[: len(LANGUAGES[name].roles)]:
        layer, stored = backbone.module.get_submodule(site.path), backbone.stored_layer(site.path)
        up_or, down_ri = noise((layer.out_features, 2), site.name), noise((2, layer.in_features), "down")
        product = stored.rows_to_stored(up_or) @ down_ri
        close(stored.to_stored(up_or @ down_ri), product.T if stored.transposed else product)


def test_rows_of_heads_are_reordered_and_back():
    rows_o = torch.arange(12)  # q of heads 0, 1; k of heads 0, 1; v of heads 0, 1
    assert interleave(rows_o, 2).tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    assert torch.equal(separate(interleave(rows_o, 2), 2), rows_o)
    assert StoredLayer("x").to_stored(rows_o) is rows_o


# ---------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_weights_are_held_as_they_are_stored(name: str, folder: Path, stored: torch.dtype, held: torch.dtype):
    change(folder, lambda tensors: tensors.update({key: tensor.to(stored) for key, tensor in tensors.items()}))
    backbone = load(str(folder))
    assert {parameter.dtype for parameter in backbone.module.parameters()} == {held}
    expected = LANGUAGES[name].raw().state_dict()
    assert all(torch.equal(t, expected[k].to(stored).to(held)) for k, t in backbone.transformers_state().items())
    exact = logits(load(str(folder), dtype=torch.float32), ones(IDS))
    found = logits(load(str(folder), dtype=torch.bfloat16), ones(IDS))
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.05 * exact.norm()


@every_family
def test_in_bf16_frequencies_of_positions_stay_exact(name: str, folder: Path):
    backbone = load(str(folder))
    exact = {path: b.clone() for path, b in backbone.module.named_buffers() if path.endswith("inv_freq")}
    assert bool(exact) == (name != "gpt2")
    backbone.cast(torch.bfloat16)
    assert {p.dtype for p in backbone.module.parameters()} == {torch.bfloat16}
    found = {path: b for path, b in backbone.module.named_buffers() if path.endswith("inv_freq")}
    assert all(torch.equal(found[path], exact[path]) for path in exact)


# ---------------------------------------------------------------------------------------------- checkpoints


def names(change_name: Callable[[str], str]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        renamed = {change_name(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return edit


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("kept", ["embeddings", "head", "both", "body alone"])
def test_tied_embeddings_stay_tied_whichever_is_stored(name: str, kept: str, folder: Path):
    family = FAMILIES[name]
    table = f"{family.body}.{family.embeddings}.weight"
    if kept == "head":
        change(folder, names(lambda key: "lm_head.weight" if key == table else key))
    elif kept == "both":
        change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()}))
    elif kept == "body alone":
        change(folder, names(lambda key: key.removeprefix(f"{family.body}.")))
    backbone = load(str(folder))
    assert backbone.module.lm_head.weight is backbone.module.get_input_embeddings().weight
    with torch.no_grad():
        close(logits(backbone, ones(IDS)), LANGUAGES[name].raw()(input_ids=IDS).logits)


def test_settings_that_the_family_does_not_have_change_nothing(llama: Path):
    expected = logits(load(str(llama)), ones(IDS))
    configure(llama, sliding_window=2, final_logit_softcapping=0.1, layer_types=["sliding_attention"] * 2)
    backbone = load(str(llama))
    assert backbone.language == LanguageHead("model", "lm_head")
    assert torch.equal(logits(backbone, ones(IDS)), expected)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_older_files_have_masks_and_other_names(name: str, folder: Path):
    part = {"gpt2": "transformer.h.0.attn", "gpt_neox": "gpt_neox.layers.0.attention"}[name]
    old = {
        f"{part}.bias": torch.ones(1, 1, 40, 40, dtype=torch.uint8),
        f"{part}.masked_bias": torch.tensor(float("-inf")),
        f"{part}.rotary_emb.inv_freq": torch.ones(4),
    }
    change(folder, lambda tensors: tensors.update(old))
    if name == "gpt_neox":
        change(folder, names(lambda key: key.replace("lm_head.", "embed_out.")))
    backbone = load(str(folder))
    assert backbone.ignored == tuple(sorted(old))
    with torch.no_grad():
        close(logits(backbone, ones(IDS)), LANGUAGES[name].raw()(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["llama, untied", "gpt_neox"])
def test_a_model_without_lm_head_is_refused(name: str, folder: Path):
    change(
        folder,
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key in ("lm_head.weight", "embed_out.weight")],
    )
    with pytest.raises(
        BackboneError, match=r"is a model without LM head: the weights have no lm_head\.weight, and tie"
    ):
        load(str(folder))


def test_tied_tables_that_differ_are_refused(llama: Path):
    change(llama, lambda tensors: tensors.update({"lm_head.weight": torch.ones(64, 32)}))
    with pytest.raises(
        BackboneError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ, and tie_word_emb"
    ):
        load(str(llama))
    configure(llama, tie_word_embeddings=False)
    assert not load(str(llama)).module.lm_head.weight.eq(load(str(llama)).module.model.embed_tokens.weight).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_weights_that_lack_a_tensor_or_have_another_block_are_refused(name: str, folder: Path):
    block = FAMILIES[name].block
    change(folder, lambda tensors: tensors.pop(next(key for key in tensors if block.format(1) in key)))
    with pytest.raises(BackboneError, match=f"the weights lack {block.format(1)}".replace(".", r"\.")):
        load(str(folder))
    LANGUAGES[name].raw().save_pretrained(folder)
    configure(folder, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 1}, layer_types=None)
    with pytest.raises(BackboneError, match=r"the weights have parts that config\.json does not"):
        load(str(folder))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 .* is not a multiple of num_key_value_heads 3"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads in config.json must be a whole number"),
    ("llama", {"head_dim": "wide"}, "head_dim in config.json must be a whole number"),
    ("llama", {"num_hidden_layers": None}, "config.json does not say num_hidden_layers"),
    ("llama", {"vocab_size": 10**12}, "config.json describes a model of"),
    ("llama", {"is_encoder_decoder": True}, "sets is_encoder_decoder; only decoders without an encoder are supported"),
    ("llama", {"quantization_config": {"bits": 4}}, "has a quantization_config; give the weights before"),
    ("llama", {"is_causal": False}, "config.json turns causal attention off"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
    ("gpt2", {"add_cross_attention": True}, "sets add_cross_attention; only decoders without an encoder"),
    ("gpt2", {"activation_function": "swoosh"}, "activation_function 'swoosh' .* is not an activation"),
    ("gpt2", {"n_inner": -1}, "n_inner in config.json must be a whole number"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "config.json turns causal attention off"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 .* is not supported"),
    ("gemma3_text", {"final_logit_softcapping": -1.0}, "final_logit_softcapping .* must be null or a number above 0"),
    ("mistral", {"sliding_window": 0}, "sliding_window in config.json must be a whole number, 1 or more, not 0"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD, ids=lambda value: str(value)[:40])
def test_settings_are_refused_before_weights_are_read(
    folder: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("lamina.backbones.loading.read_tensors", read)
    configure(folder, **settings)
    with pytest.raises(BackboneError, match=message):
        load(str(folder))


def test_options_and_special_tokens_are_checked(llama: Path):
    with pytest.raises(BackboneError, match=r"is a language model .llama.: image_size, mean and std do not apply"):
        load(str(llama), image_size=32)
    with pytest.raises(BackboneError, match="has no class token; choose pooling='mean'"):
        load(str(llama), pooling="cls")
    assert load(str(llama), pooling="mean").pooling == "mean"
    (llama / "generation_config.json").write_text('{"eos_token_id": 64}')
    with pytest.raises(BackboneError, match=r"eos_token_id must be a token id from 0 to 63, not 64"):
        load(str(llama))
    (llama / "generation_config.json").unlink()
    assert load(str(llama)).module.generation_config.eos_token_id == 2


# ---------------------------------------------------------------------------------------------- modules of one's own


def test_a_module_of_ones_own_says_where_its_head_is(llama: Path):
    module = load(str(llama)).module
    site = make_site(0, "gate", "model.layers.0.mlp.gate_proj")
    options: dict[str, Any] = {"kind": "language", "width": 32, "features": lambda m, x: x["input_ids"]}
    backbone = from_module(module, [site], language=LanguageHead("model", "lm_head"), **options)
    with torch.no_grad():
        close(logits(backbone, ones(IDS)), module(input_ids=IDS).logits)
    with pytest.raises(BackboneError, match="there is nothing at head"):
        from_module(module, [site], language=LanguageHead("model", "head"), **options)
    with pytest.raises(BackboneError, match="needs `language` with the paths of its body and its head"):
        from_module(module, [site], **options)


def test_an_encoder_has_no_scores_of_tokens(bert_folder: Path):
    with pytest.raises(BackboneError, match="is not a causal language model: it has no scores of a next token"):
        load(str(bert_folder)).hidden(ones(IDS))


# ---------------------------------------------------------------------------------------------- SmolLM2


@smollm2
def test_smollm2_knows_a_capital_and_does_not_depend_on_padding():
    backbone = load(str(SMOLLM2))
    assert (backbone.width, backbone.blocks, backbone.heads, backbone.vocabulary) == (576, 30, 9, 49152)
    assert (backbone.positions, backbone.tokenizer) == (8192, SMOLLM2)
    assert {parameter.dtype for parameter in backbone.module.parameters()} == {torch.bfloat16}
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    given = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = backbone.module.generate(**given, max_new_tokens=20, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert tokenizer.decode(told, skip_special_tokens=True) == "The capital of France is Paris."
    backbone.cast(torch.float32)
    ids_bt = given["input_ids"]
    left = torch.cat([torch.full((1, 5), 2), ids_bt], 1)
    mask_bt = torch.cat([torch.zeros(1, 5), torch.ones(1, ids_bt.shape[1])], 1).long()
    with torch.no_grad():
        padded_bd = backbone.features({"input_ids": left, "attention_mask": mask_bt})
        torch.testing.assert_close(padded_bd, backbone.features(ones(ids_bt)), atol=1e-3, rtol=1e-3)


MEASURE = """
import sys
from lamina.backbones import load

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

import transformers, transformers.models.llama.modeling_llama, safetensors.torch
before = peak()
load(sys.argv[1])
print(peak() - before)
"""


@smollm2
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_model_is_in_memory_once_while_it_is_loaded():
    told = subprocess.run([sys.executable, "-c", MEASURE, str(SMOLLM2)], capture_output=True, text=True, check=True)
    size = (SMOLLM2 / "model.safetensors").stat().st_size
    assert int(told.stdout) < 1.6 * size
