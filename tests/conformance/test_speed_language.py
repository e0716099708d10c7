"""`lamina.speed` can be left out of a language model too: losses, updates and scores of options stay the same, to rounding."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.conformance.test_speed import distance
from tests.tiny import scatter
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lamina import backbones
from lamina.engine.steps import backward
from lamina.learner import LanguageLearner
from lamina.speed import accelerate, attention, rms_norm
from lamina.types import Batch, Task

VOCABULARY, STEPS = 40, 4
TASK = Task(name="now", classes=(0,), train=None, val=None, test=None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = scatter(LlamaForCausalLM(settings), 0.5)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def training_batch(t: int) -> Batch:
    """Four sequences of up to t tokens, padded on the right."""
    ids_bt = torch.randint(1, VOCABULARY, (4, t), generator=torch.Generator().manual_seed(t))
    length_b1 = torch.tensor([[t], [t - 3], [t // 2], [t]])
    mask_bt = (torch.arange(t) < length_b1).long()
    inputs = {
        "input_ids": ids_bt,
        "attention_mask": mask_bt,
        "completion_mask": mask_bt * (torch.arange(t) >= length_b1 - 3),
    }
    return Batch(inputs=inputs, labels_b=torch.zeros(4).long())


def questions() -> Batch:
    generator = torch.Generator().manual_seed(2)
    mask_bt = (torch.arange(9) < torch.tensor([[9], [4], [7]])).long()
    own_bms = (torch.arange(3) < torch.tensor([[[3], [1]], [[2], [3]], [[2], [0]]])).long()
    inputs = {
        "input_ids": torch.randint(1, VOCABULARY, (3, 9), generator=generator),
        "attention_mask": mask_bt,
        "option_ids": torch.randint(1, VOCABULARY, (3, 2, 3), generator=generator),
        "option_mask": own_bms,
    }
    return Batch(inputs=inputs, labels_b=torch.zeros(3).long())


def outcome(folder: Path, dtype: torch.dtype, *, faster: bool, t: int) -> dict[str, Tensor]:
    """Losses of a few steps, the updates of all sites, the scores of options, and generated tokens."""
    learner = LanguageLearner(backbones.load(str(folder), dtype=dtype), ("q", "v", "out", "gate"), dtype=dtype)
    learner.add_lora(TASK, 2, "speed")
    parameters, batch = [*learner.trainable().values()], training_batch(t)
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    before = {name: sorted(vars(module)) for name, module in learner.backbone.module.named_modules()}
    steps = accelerate(learner) if faster else None
    losses = []
    for _ in range(STEPS):
        losses.append(backward(lambda batch: learner.loss(batch, TASK), parameters, batch).item())
        optimizer.step()
    with learner.folded():
        found = {"scores": learner.option_scores(questions()).nan_to_num(neginf=0.0), "losses": torch.tensor([losses])}
    for name, site in learner.sites.items():
        up_or, down_ri = site.live()[TASK.name].factors()
        found[name] = (up_or @ down_ri).detach()[None]
    if steps is not None:
        steps.close()
        steps.close()
    assert {name: sorted(vars(module)) for name, module in learner.backbone.module.named_modules()} == before
    assert learner.backbone.module.config._attn_implementation == "sdpa"
    return found


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often own attention and own norms computed."""
    counts = {"attention": 0, "norms": 0}

    def count(name: str, kind: type[torch.autograd.Function]) -> None:
        plain = kind.apply

        def apply(*given: object) -> object:
            counts[name] += 1
            return plain(*given)

        monkeypatch.setattr(kind, "apply", apply)

    count("attention", attention._Attention)
    count("norms", rms_norm._RmsNorm)
    return counts


@pytest.mark.parametrize("t", [12, 40, 64])
def test_a_language_model_is_the_same_without_it(t: int, folder: Path, used: dict[str, int]) -> None:
    exact = outcome(folder, torch.float32, faster=False, t=t)
    near = outcome(folder, torch.float32, faster=True, t=t)
    assert {part for part in exact if distance(near[part], exact[part]) > 1e-4} == set()
    plain = outcome(folder, torch.bfloat16, faster=False, t=t)
    assert used == {"attention": 0, "norms": 0}
    found = outcome(folder, torch.bfloat16, faster=True, t=t)
    assert used == {"attention": 3 * STEPS, "norms": 7 * (STEPS + 1)}  # without gradients attention is PyTorch's
    for part in exact:
        assert distance(found[part], exact[part]) <= 2 * distance(plain[part], exact[part]) + 0.005, part
    assert exact["losses"][0, 0] > exact["losses"][0, -1]


def test_it_has_the_same_bits_every_time(folder: Path) -> None:
    one, two = (outcome(folder, torch.bfloat16, faster=True, t=40) for _ in range(2))
    assert all(torch.equal(one[part], two[part]) for part in one)
