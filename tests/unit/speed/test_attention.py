"""Plain attention is that of PyTorch: in value, with and without a mask, and only where and as long as it is asked for."""

import pytest
import torch
from tests.tiny import noise, raw_bert, raw_vit, timm_vit, tiny_bert, tiny_texts
from torch import nn

from lamina.learner import Learner
from lamina.speed import accelerate
from lamina.speed.attention import softmax, use_plain_attention
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
    torch.testing.assert_close(learner.features(batch), plain.features(batch), rtol=0.05, atol=0.05)
    accelerated.close()
    assert learner.backbone.module.config._attn_implementation == "sdpa"
