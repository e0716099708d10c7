"""lamina, PEFT and transformers compute the same in the benchmark of language models, and its helpers do what they say."""

import importlib
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import scatter
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lamina.types import Batch, Examples

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
VOCABULARY = 40
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("language_rivals")


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # importing it would set that for other tests too
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("language")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = scatter(LlamaForCausalLM(settings))
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def training_batch(seed: int = 1) -> Batch:
    """Four sequences of 5 to 8 tokens, padded on the right, with completions of 1 to 4 tokens."""
    ids_bt = torch.randint(1, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(seed))
    length_b1, own_b1 = torch.tensor([[8], [5], [6], [8]]), torch.tensor([[4], [1], [2], [3]])
    place_t = torch.arange(8)
    mask_bt = (place_t < length_b1).long()
    inputs = {
        "input_ids": ids_bt * mask_bt,
        "attention_mask": mask_bt,
        "completion_mask": mask_bt * (place_t >= length_b1 - own_b1),
    }
    return Batch(inputs=inputs, labels_b=torch.zeros(4).long())


def questions() -> Batch:
    """Three prompts of 2 to 5 tokens with three options of up to 3 tokens; the last prompt has two options only."""
    generator = torch.Generator().manual_seed(2)
    mask_bt = (torch.arange(5) < torch.tensor([[5], [2], [4]])).long()
    own_bms = (torch.arange(3) < torch.tensor([[[3], [1], [2]], [[2], [3], [1]], [[2], [2], [0]]])).long()
    inputs = {
        "input_ids": torch.randint(1, VOCABULARY, (3, 5), generator=generator) * mask_bt,
        "attention_mask": mask_bt,
        "option_ids": torch.randint(1, VOCABULARY, (3, 3, 3), generator=generator) * own_bms,
        "option_mask": own_bms,
    }
    return Batch(inputs=inputs, labels_b=torch.zeros(3).long())


HOW: list[dict[str, Any]] = [{}, {"logits": "needed"}, {"logits": "needed", "attention": "eager"}]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_losses_and_gradients_agree(rivals: ModuleType, folder: Path, how: dict[str, Any]) -> None:
    with closing(rivals.Lamina(folder, torch.float32, 2)) as ours:
        given = [training_batch(), training_batch(2)]
        found = rivals.agreement(ours, rivals.Peft(folder, torch.float32, 2, **how), given)
        losses = [ours.loss(batch).item() for batch in given]
    assert losses[0] != losses[1]
    assert found["lamina"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert found["lamina"] == pytest.approx(found["peft"], rel=1e-5)
    assert found["gradients"] < 1e-3


def test_steps_agree_and_the_floor_learns_nothing(rivals: ModuleType, folder: Path) -> None:
    batch = training_batch()
    with closing(rivals.Lamina(folder, torch.float32, 2, accelerated=False)) as ours:
        theirs = rivals.Peft(folder, torch.float32, 2, logits="needed")
        theirs.take(ours.learner)
        for settings in (*ours.optimizer.param_groups, *theirs.optimizer.param_groups):
            settings["weight_decay"] = 0.0
        losses = [(ours.step(batch), theirs.step(batch)) for _ in range(4)]
    assert losses[0][0] > losses[-1][0]
    for own, other in losses:
        assert own == pytest.approx(other, rel=1e-4)
    with closing(rivals.Floor(folder, torch.float32)) as floor:
        assert floor.step(batch) == floor.step(batch)
        assert floor.learner.trainable() == {}


def test_all_ways_of_ranking_agree(rivals: ModuleType, folder: Path) -> None:
    batch = questions()
    with closing(rivals.Lamina(folder, torch.float32, 2)) as ours, rivals.folded(ours):
        theirs = rivals.Peft(folder, torch.float32, 2)
        theirs.take(ours.learner)
        model, wanted = theirs.merged(), rivals.ranked_by_lamina(ours, batch)
    assert wanted.isinf().tolist() == [[False] * 3, [False] * 3, [False, False, True]]
    for way in (rivals.ranked_apart, rivals.ranked_by_cache):
        torch.testing.assert_close(way(model, batch.inputs), wanted, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_followed_by_each_of_its_options(rivals: ModuleType) -> None:
    inputs = {
        "input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "option_ids": torch.tensor([[[1, 2], [3, 0]], [[4, 0], [0, 0]]]),
        "option_mask": torch.tensor([[[1, 1], [1, 0]], [[1, 0], [0, 0]]]),
    }
    ids_nt, mask_nt, completion_nt = rivals.sequences(inputs)
    assert ids_nt.tolist() == [[5, 6, 1, 2, 0], [5, 6, 3, 0, 0], [7, 8, 9, 4, 0], [7, 8, 9, 0, 0]]
    assert mask_nt.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert completion_nt.tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]


def test_generated_tokens_are_the_same(rivals: ModuleType, folder: Path) -> None:
    batch = questions()
    with closing(rivals.Lamina(folder, torch.float32, 2)) as ours, rivals.folded(ours):
        theirs = rivals.Peft(folder, torch.float32, 2)
        theirs.take(ours.learner)
        theirs.model.eval()
        wanted = rivals.generated_by_lamina(ours, batch, 4, 0)
    assert rivals.generated(theirs.model, batch, 4, 0) == wanted
    assert rivals.generated(theirs.merged(), batch, 4, 0) == wanted
    assert [len(row) for row in wanted] == [4, 4, 4]


def test_a_long_batch_ends_in_its_completion(rivals: ModuleType) -> None:
    batch = rivals.long_batch(2, 6, 4, VOCABULARY)
    assert batch.inputs["completion_mask"].tolist() == [[0, 0, 1, 1, 1, 1]] * 2
    assert int(batch.inputs["input_ids"].max()) < VOCABULARY


class Lengths:
    """A table of rows with these numbers of tokens."""

    augments = False

    def inputs(self, rows: Any, augment: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def lengths(self, rows: Any) -> Any:
        return np.array([9, 2, 7, 4, 5, 6, 3, 8])[rows]


def test_batches_have_similar_lengths(language: ModuleType) -> None:
    examples = Examples(Lengths(), np.arange(8), np.zeros(8, np.int64))
    lengths = [sorted(Lengths().lengths(p).tolist()) for p in language.by_length(examples, 2, 2)]
    assert lengths == [[4, 5], [6, 7]]


def test_everything_takes_turns_on_every_batch(language: ModuleType) -> None:
    done: list[tuple[str, int]] = []
    works = {name: lambda batch, name=name: done.append((name, batch)) for name in "ab"}
    times = language.turns(works, [1, 2], 2)
    warm = [("a", 1), ("b", 1)]
    assert done == [*warm, ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("b", 1), ("a", 1), ("b", 2), ("a", 2)]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4}


def test_a_summary_is_relative_to_the_baseline(language: ModuleType) -> None:
    found = language.summary({"ours": [1.0, 2.0, 1.0, 2.0], "theirs": [2.0, 6.0, 2.0, 4.0]}, [10, 20], "ours")
    assert found["ours"] == {"per_second": 10.0, "median_ms": 1500.0, "relative": 1.0, "low": 1.0, "high": 1.0}
    assert (found["theirs"]["per_second"], found["theirs"]["relative"]) == (4.29, 2.0)


def test_a_record_keeps_other_precisions_of_the_same_machine(
    language: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "RECORD", tmp_path / "speed.json")
    new = {"machine": {"cpu": "a"}, "commit": "1", "precisions": {"fp32": {"date": "2026-01-02"}}}
    assert language.with_others(new) == new
    first = {"bf16": {"date": "2026-01-01"}, "fp32": {"date": "2026-01-01"}}
    old = {"machine": {"cpu": "a"}, "commit": "1", "precisions": first}
    language.RECORD.write_text(json.dumps(old))
    assert language.with_others(new)["precisions"] == {"bf16": {"date": "2026-01-01"}, "fp32": {"date": "2026-01-02"}}
    for change in ({"machine": {"cpu": "b"}}, {"commit": "2"}):
        assert language.with_others(new | change) == new | change


def test_a_disagreement_is_found(language: ModuleType) -> None:
    language.check_agreement({"lamina": 2.0, "peft": 2.0001, "gradients": 0.001}, "PEFT", "fp32", 6)
    one = {"lamina": 2.0, "peft": 2.04, "gradients": 0.1}
    language.check_agreement(one, "PEFT", "bf16", 1)
    with pytest.raises(AssertionError, match="PEFT, bf16: losses differ"):
        language.check_agreement(one, "PEFT", "bf16", 6)
    for wrong in ({"peft": 2.01}, {"gradients": 0.1}):
        with pytest.raises(AssertionError, match=r"PEFT, fp32: (losses|gradients) differ"):
            language.check_agreement({"lamina": 2.0, "peft": 2.0, "gradients": 0.0} | wrong, "PEFT", "fp32", 1)


def test_the_page_shows_every_contender(language: ModuleType) -> None:
    def steps(*names: str) -> dict[str, Any]:
        one = {"per_second": 10.0, "median_ms": 5.0, "relative": 1.5, "low": 1.4, "high": 1.6}
        return {"steps": dict.fromkeys(names, one)}

    peaks = {name: {"peak_mb": 900.0, "seconds": 1.0} for name in language.TRAINING if name != "floor"}
    apart, cached = "transformers, a sequence per option", "transformers, shared past_key_values"
    parts = {
        "date": "2026-01-01",
        "training": steps(*language.TRAINING)
        | {"agreement": {"PEFT": {"lamina": 2.0, "peft": 2.0, "gradients": 0.01}}},
        "training, long completions": steps(*language.TRAINING),
        "ranking": {
            "distances": {apart: 0.1},
            "steps": {domain: steps(language.OURS, apart, cached)["steps"] for domain in language.RANKED},
        },
        "generation": steps(language.OURS, "PEFT, merged", "PEFT, unmerged") | {"same_tokens": {"PEFT, merged": 0.9}},
        "memory": peaks,
        "memory, long completions": peaks,
        "loading": {"lamina": {"seconds": 1.0, "peak_mb": 700.0}, "PEFT": {"seconds": 2.0, "peak_mb": 800.0}},
    }
    record = {
        "machine": language.machine(),
        "commit": "abc1234",
        "batches": [[8, 64, 500]],
        "completion_tokens": [24],
        "precisions": {"bf16": parts},
    }
    text = language.page(json.loads(json.dumps(record)))
    for name in (*language.TRAINING, apart, cached, "PEFT, unmerged"):
        assert f"| {name} | 10.0 | 5 | 1.50 (1.40 to 1.60) |" in text
    assert text.count("| 900 |") == 2 * len(peaks)
    assert text.count(f"| {apart} |") == 3
    assert "| Ranking of 14 options (dbpedia), batch 8 | Examples/s |" in text
    assert "| Ranking of 14 options, a sequence per option | 1.5 |" in text
    assert "| Training, fastest PEFT loop | 1.50 (PEFT) |" in text
    assert "\n\n2026-01-01, " in text
    assert text.startswith("# Language models: speed and memory\n\n**For a training step in bf16, the fastest")
