"""Plain attention is that of PyTorch: in value, with and without a mask, and only where and as long as it is asked for."""

import pytest
import torch
from tests.languages import tiny_language
from tests.tiny import noise, raw_bert, raw_vit, timm_vit, tiny_bert, tiny_texts
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lamina.learner import Learner
from lamina.speed import accelerate
from lamina.speed.attention import attention, softmax, use_plain_attention
from lamina.types import Batch


@pytest.mark.parametrize(("length", "kind"), [(31, torch.float32), (32, torch.bfloat16)])
def test_short_rows_get_a_softmax_in_float32(length: int, kind: torch.dtype):
    logits = torch.randn(3, length, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = softmax(logits)
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), logits.float().softmax(-1), rtol=1e-2, atol=1e-3)


def features(module: nn.Module) -> torch.Tensor:
    if module.config.model_type == "vit":
        made = module(pixel_values=noise((3, 3, 16, 16), "pixels"))
    else:
        mask_bt = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]])
        ids_bt = torch.randint(2, 60, (3, 6), generator=torch.Generator().manual_seed(0))
        made = module(input_ids=ids_bt, attention_mask=mask_bt)
        return made.last_hidden_state[mask_bt.bool()]
    return made.last_hidden_state


@pytest.mark.parametrize("make", [raw_vit, raw_bert])
def test_values_are_those_of_the_fused_attention(make, monkeypatch: pytest.MonkeyPatch):
    module, calls = make(), list[int]()
    plain = features(module)
    monkeypatch.setattr("lamina.speed.attention.softmax", lambda logits: calls.append(1) or softmax(logits))
    undo = use_plain_attention(module)
    torch.testing.assert_close(features(module), plain, rtol=1e-4, atol=1e-5)
    assert len(calls) == module.config.num_hidden_layers
    undo()
    assert torch.equal(features(module), plain)
    assert len(calls) == module.config.num_hidden_layers


def test_an_attention_that_is_not_pytorchs_stays():
    module = raw_vit()
    module.set_attn_implementation("eager")
    undo = use_plain_attention(module)
    assert module.config._attn_implementation == "eager"
    undo()
    assert module.config._attn_implementation == "eager"
    use_plain_attention(timm_vit())()


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "sdpa"), (torch.bfloat16, "lamina")])
def test_text_backbones_get_it_in_bf16_only(dtype: torch.dtype, name: str):
    learner, plain = (Learner(tiny_bert(), dtype=dtype) for _ in range(2))
    accelerated, table = accelerate(learner), tiny_texts(24).table
    assert learner.backbone.module.config._attn_implementation == name
    batch = Batch(inputs=table.inputs(range(8), None), labels_b=torch.zeros(8).long())
    learner.backbone.module.requires_grad_(True)  # without gradients the attention is PyTorch's own
    found_bd = learner.features(batch)
    assert found_bd.requires_grad
    torch.testing.assert_close(found_bd, plain.features(batch), rtol=0.05, atol=0.05)
    accelerated.close()
    assert learner.backbone.module.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("kind", ["padding", "boolean", "none"])
def test_heads_that_share_keys_and_masks_of_what_each_token_sees_are_those_of_the_fused_attention(name: str, kind: str):
    backbone = tiny_language(name)
    ids_bt = torch.randint(4, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 7 + [0] * 2])
    real_bt = mask.bool()
    if kind == "boolean":  # the last three tokens follow the first three, as a second option would
        mask = torch.ones(9, 9).tril().bool() & real_bt[:, None, None] | torch.eye(9, dtype=torch.bool)
        mask[..., 6:, 3:6] = False
    elif kind == "none":
        mask = real_bt = torch.ones_like(ids_bt).bool()
        mask = mask.long()
    inputs = {"input_ids": ids_bt, "attention_mask": mask}
    with torch.no_grad():
        plain_btd = backbone.hidden(inputs)
    undo = use_plain_attention(backbone.module)
    for differentiated in (False, True):
        backbone.module.requires_grad_(differentiated)
        found_btd = backbone.hidden(inputs)
        assert found_btd.requires_grad is differentiated
        torch.testing.assert_close(found_btd[real_bt], plain_btd[real_bt], rtol=1e-4, atol=1e-5)
    undo()
    with torch.no_grad():
        again_btd = backbone.hidden(inputs)
    assert torch.equal(again_btd, plain_btd)


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_queries_of_a_group_attend_to_the_keys_of_their_group(shared: int):
    """Head h of the queries uses head h // shared of the keys and values, with a boolean mask and with an additive one."""
    query, key, value = (
        noise((2, heads, 5, 8), part) for heads, part in ((4, "q"), (4 // shared, "k"), (4 // shared, "v"))
    )
    seen = torch.ones(5, 5).tril().bool()[None, None].expand(2, 1, 5, 5)
    added = torch.zeros(2, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = scaled_dot_product_attention(
        query, key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1), seen, scale=0.3
    ).transpose(1, 2)
    for mask in (seen, added):
        for needed in (False, True):
            query.requires_grad_(needed)
            found, weights = attention(nn.Identity(), query, key, value, mask, scaling=0.3)
            assert weights is None
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_fused_attention_is_used_without_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.speed.attention._Attention", None)  # it is not used
    query, key, value = (noise((1, 2, 9, 8), part) for part in "qkv")
    found, _ = attention(nn.Identity(), query, key, value, None, scaling=0.3)
    expected = scaled_dot_product_attention(query, key, value, scale=0.3)
    assert torch.equal(found, expected.transpose(1, 2))


@pytest.mark.parametrize("kind", ["none", "additive", "boolean"])
def test_long_inputs_have_the_same_attention_without_a_kept_softmax(kind: str, monkeypatch: pytest.MonkeyPatch):
    query, key, value = (noise((2, heads, 12, 8), part) for heads, part in ((6, "q"), (2, "k"), (2, "v")))
    query.requires_grad_()
    sees = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    mask = {"none": None, "boolean": sees, "additive": torch.zeros(1, 1, 12, 12).masked_fill(~sees, -1e9)}[kind]

    def computed() -> tuple[torch.Tensor, torch.Tensor]:
        found, _ = attention(nn.Identity(), query, key, value, mask, scaling=0.3)
        (gradient,) = torch.autograd.grad(found.square().sum(), query)
        return found.detach(), gradient

    short = computed()
    monkeypatch.setattr("lamina.speed.attention.FUSED", 11)
    monkeypatch.setattr("lamina.speed.attention.softmax", None)  # it is not called
    torch.testing.assert_close(computed(), short, atol=1e-5, rtol=1e-5)


def test_the_fused_attention_is_not_differentiated_at_common_lengths(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", None)  # it is not called
    for length in (197, 512):
        query, key, value = (noise((1, 2, length, 8), part) for part in "qkv")
        query.requires_grad_()
        attention(nn.Identity(), query, key, value, None, scaling=0.3)
