"""A language model that learns instructions task by task comes to the same bits as a run over the stream."""

from pathlib import Path

import pytest
import torch
from tests.assistants import SMALL, backbone, instructions, small
from tests.conformance.cases import CASES

from lamina import runs
from lamina.engine import checkpoint
from lamina.methods import METHODS

DOMAINS = ("books", "films", "songs")
LANGUAGE = [name for name, method in METHODS.items() if not method.refuses_language]
REHEARSED = ("finetune", "olora")
"""The other methods differ only in what they add to these, not in how examples are kept."""
QUICK = ("olora", "color")
"""One that keeps an adapter of every task, and one that routes."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains: two with options, one without."""
    folder = tmp_path_factory.mktemp("data")
    texts = []
    for number, domain in enumerate(DOMAINS):
        options = None if number == 1 else ("yes", "no")
        file = instructions(folder / f"{domain}.jsonl", domain[:-1], options=options, test=2, domain=domain)
        texts.append(file.read_text())
    whole = folder / "whole"
    whole.mkdir()
    (whole / "instructions.jsonl").write_text("".join(texts))
    return whole / "instructions.jsonl"


@pytest.mark.parametrize(
    ("method", "per_class"),
    [
        *(pytest.param(method, 0, marks=() if method in QUICK else pytest.mark.slow) for method in LANGUAGE),
        *(pytest.param(method, 3, marks=() if method in QUICK else pytest.mark.slow) for method in REHEARSED),
    ],
    ids=lambda value: str(value),
)
def test_a_language_model_learnt_task_by_task_equals_a_run(
    method: str, per_class: int, base: Path, data: Path, tmp_path: Path
) -> None:
    given = {
        **SMALL,
        **{f"method.{key}": value for key, value in CASES[method].settings.items()},
        "training.epochs": 1,
        "rehearsal.per_class": per_class,
    }
    whole = {**given, "method.name": method, "backbone.name": str(base), "data.source": str(data)}
    out = tmp_path / "run"
    runs.create(runs.load_config(None, sorted(whole.items(), key=lambda item: item[0] != "method.name")), out)
    model = small(tmp_path / "model", base, method, given, task_count=len(DOMAINS))
    for domain in DOMAINS:
        model.learn(data, name=domain, domains=(domain,), force=True)
    ours = model.store.state(str(model.facts.head))[1]
    loaded = checkpoint.load_newest(out / "checkpoints")
    assert loaded is not None
    for group in ("learner", "memory", "consolidation"):
        theirs = loaded.tensors.get(group, {})
        assert ours[group].keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[group][name], theirs[name])] == []
