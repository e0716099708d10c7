"""`lamina.speed` can be left out: every method learns and predicts the same with it and without it, to rounding.

And a run that it makes faster has the same bits every time, also when it is stopped and resumed. Runs use SGD without momentum:
Adam would make much of the last bits of gradients that are nearly zero.
"""

import ast
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.cases import HOME, TRAINING, World, make_loop, newest, run_in_pieces, state
from torch import Tensor

import lamina
from lamina.config import ConsolidationConfig, RehearsalConfig
from lamina.engine import checkpoint
from lamina.engine.consolidate import update_of
from lamina.engine.loop import Loop
from lamina.methods import METHODS
from lamina.speed import accelerate, fused_block, split_batch

TRAINED = sorted(name for name, method in METHODS.items() if method.trains)
TEXT, FUSED_QKV = World("bert", "domain"), World("fused_vit", "mixed")
EVERY = [
    *((name, HOME) for name in sorted(METHODS)),
    *((name, TEXT) for name in ("duallora", "ewc", "inflora", "taskarithmetic")),
    *((name, FUSED_QKV) for name in ("color", "inflora", "sdlora")),
]
AROUND: dict[str, dict[str, Any]] = {
    "merging": {"merging": "weighted", "drift": "linear", "classifier": "lda", "layers": 2},
    "aligned": {"init": "merged", "merging": "ema", "classifier": "aligned", "class_covariance_rank": 2},
}
SGD = TRAINING.model_copy(update={"optimizer": "sgd", "momentum": 0.0})
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
both_precisions = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checkpoint, "fsync", lambda _: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many batches were split (from here on all of two examples and more), and how many blocks were fused."""
    counts = {"split": 0, "fused": 0}
    graphs, block = split_batch.Workers.both, fused_block.forward

    def both(self: split_batch.Workers, *given: Any) -> Any:
        counts["split"] += given[0] is not int  # which starts the threads
        return graphs(self, *given)

    def forward(*given: Any) -> Any:
        counts["fused"] += 1
        return block(*given)

    monkeypatch.setattr(split_batch, "SMALLEST", 2)
    monkeypatch.setattr(split_batch.Workers, "both", both)
    monkeypatch.setattr(fused_block, "forward", forward)
    return counts


STEADY = {"ewc": {"fisher": "empirical"}}
"""Settings with which rounding cannot change a choice, such as that of a drawn label."""


ALWAYS_ROUTED = ("moram",)
"""Methods whose every forward has routed adapters, which are neither split nor fused."""


def check_used(name: str, used: dict[str, int], world: World) -> None:
    """Batches are split in fp32, and blocks of transformers' vision models fused in bf16."""
    plain = name not in ALWAYS_ROUTED
    assert (used["split"] > 0) == (world.dtype == torch.float32 and plain)
    assert (used["fused"] > 0) == (world.dtype == torch.bfloat16 and world.backbone == "vit" and plain)


def outcome(loop: Loop) -> dict[str, Tensor]:
    """Losses, the scores of all test examples by task, and the update of every site."""
    with loop.learner.folded():
        scores = {
            task.name: torch.cat([loop.consolidation.predict(loop.learner, batch) for batch in _batches(loop, number)])
            for number, task in enumerate(loop.stream)
        }
    updates = {name: update_of(site)[None] for name, site in loop.learner.sites.items()}
    return {"losses": torch.tensor([[loss.value for loss in loop.state.losses]])} | scores | updates


def _batches(loop: Loop, number: int) -> Iterator[Any]:
    test = loop.stream[number].test
    return (test.batch(range(start, min(start + 8, len(test)))) for start in range(0, len(test), 8))


def run(
    name: str, world: World, folder: Path, *, faster: bool, settings: Mapping[str, Any] | None = None, **how: Any
) -> tuple[Loop, dict[str, Tensor]]:
    loop = make_loop(name, world, folder, training=SGD, **how)
    loop.method.config = loop.method.config.model_copy(update=settings)
    if not faster:
        loop.run()
        return loop, outcome(loop)
    with closing(accelerate(loop.learner)) as loop.steps:
        loop.run()
        return loop, outcome(loop)


def check_same(name: str, world: World, folder: Path, used: dict[str, int], **how: Any) -> None:
    """In fp32 to rounding. In bf16 it is about as near to the fp32 run as plain bf16 is."""
    how["settings"] = STEADY.get(name)
    plain, wanted = run(name, world, folder / "plain", faster=False, **how)
    assert used == {"split": 0, "fused": 0}
    loop, got = run(name, world, folder / "faster", faster=True, **how)
    check_used(name, used, world)
    if world.dtype == torch.float32:
        assert {
            part: distance(got[part], wanted[part]) for part in wanted if distance(got[part], wanted[part]) > 1e-4
        } == {}
        assert loop.matrix.as_dict() == plain.matrix.as_dict()
        return
    _, exact = run(name, replace(world, dtype=torch.float32), folder / "exact", faster=False, **how)
    for part in exact:
        assert distance(got[part], exact[part]) <= 2 * distance(wanted[part], exact[part]) + 0.005, part


def distance(found: Tensor, exact: Tensor) -> float:
    """Returns the relative distance of each row (an example's scores, say), and of these the median."""
    found_nj, exact_nj = (value.nan_to_num(neginf=0.0).flatten(1).double() for value in (found, exact))
    return float(((found_nj - exact_nj).norm(dim=1) / exact_nj.norm(dim=1).clamp_min(1e-12)).median())


@both_precisions
@pytest.mark.parametrize(("name", "world"), EVERY, ids=str)
def test_a_run_is_the_same_without_it(name: str, world: World, precision: str, tmp_path: Path, used: dict[str, int]):
    check_same(name, World(world.backbone, world.scenario, PRECISIONS[precision]), tmp_path, used)


@both_precisions
@pytest.mark.parametrize("way", sorted(AROUND))
def test_consolidation_is_the_same_without_it(way: str, precision: str, tmp_path: Path, used: dict[str, int]):
    world = World("vit", "class", PRECISIONS[precision])
    check_same("finetune", world, tmp_path, used, consolidation=ConsolidationConfig(**AROUND[way]))


@both_precisions
@pytest.mark.parametrize(("name", "world"), [("duallora", HOME), ("finetune", HOME), ("finetune", TEXT)], ids=str)
def test_rehearsal_is_the_same_without_it(
    name: str, world: World, precision: str, tmp_path: Path, used: dict[str, int]
):
    world = World(world.backbone, world.scenario, PRECISIONS[precision])
    check_same(name, world, tmp_path, used, rehearsal=RehearsalConfig(per_class=2))


@both_precisions
@pytest.mark.parametrize(("name", "per_class"), [*((name, 0) for name in TRAINED), ("inflora", 2)], ids=str)
def test_it_ends_in_the_same_bits(name: str, per_class: int, precision: str, tmp_path: Path, used: dict[str, int]):
    world, rehearsal = World("vit", "class", PRECISIONS[precision]), RehearsalConfig(per_class=per_class)
    run(name, world, tmp_path / "one", faster=True, rehearsal=rehearsal)
    opened = []

    def process(number: int) -> Loop:
        allowances = iter([False] * (5 + 2 * number))
        stop = partial(next, allowances, True)
        loop = make_loop(name, world, tmp_path / "pieces", training=SGD, rehearsal=rehearsal, should_stop=stop)
        loop.steps = accelerate(loop.learner)
        opened.append(loop.steps)
        return loop

    _, processes = run_in_pieces(process)
    for steps in opened:
        steps.close()
    assert processes > 1
    check_used(name, used, world)
    assert state(newest(tmp_path / "pieces")) == state(newest(tmp_path / "one"))


ROOT = Path(lamina.__file__).parent
BELOW = ("types", "errors", "rng", "maths", "config", "data", "backbones", "adapters", "learner", "methods", "engine")
FILES = [file for part in BELOW for file in (*ROOT.glob(f"{part}.py"), *ROOT.glob(f"{part}/**/*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_below_knows_of_it(file: Path):
    """No import, and no name in the code. Documentation of the engine may mention it, that of adapters and learner not."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    names = {
        name
        for node in ast.walk(tree)
        for name in (getattr(node, "module", None), getattr(node, "name", None), getattr(node, "id", None))
        if isinstance(name, str)
    }
    assert {name for name in names if name == "speed" or name.startswith("lamina.speed")} == set()
    if file.parent.name in ("adapters", "learner", "methods"):
        assert "speed" not in text
        for part in (ROOT / "speed").glob("[a-z]*.py"):
            assert part.stem not in text or "_" not in part.stem


def test_there_are_files_below_it():
    assert {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES} == set(BELOW)
