"""The table of methods, and the small worlds that their laws are checked in.

A method is in the library when it has a row here. A row says which settings make it small, what training may move, and how
its storage grows. `test_methods.py` and `test_growth.py` hold every law against every row.

Shape letters: d width, r rank.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tests.languages import language_stream, text, tiny_language
from tests.tiny import tiny_bert, tiny_fused_vit, tiny_images, tiny_texts, tiny_vit

from lamina.backbones import Backbone
from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import PlannedTask, Scenario, Stream, class_plan, domain_plan, make_stream
from lamina.engine import checkpoint
from lamina.engine.loop import Interrupted, Loop
from lamina.learner import Learner, learner_of
from lamina.methods import METHODS
from lamina.methods.base import Method

Growth = Literal["none", "constant", "linear", "bounded"]
"""How a quantity grows with the number of tasks. "bounded": it stays within `memory_bound`, which is constant."""
OUTPUTS = ("head/TASK/weight", "head/TASK/bias")
LORA = ("live/.*/TASK/up", "live/.*/TASK/down", *OUTPUTS)
SHARED_LORA = ("live/.*/shared/up", "live/.*/shared/down", *OUTPUTS)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a method declares of itself, as the laws need it."""

    settings: dict[str, Any] = field(default_factory=dict)
    moves: tuple[str, ...] = LORA
    """Patterns (whole names) of the learner's tensors that training moves; `TASK` stands for the current task. All of
    them must move, and nothing else may."""
    idle: tuple[str, ...] = ()
    """Patterns of tensors among them that cannot move, because their frozen factor is zero, where that is so."""
    revises: tuple[str, ...] = ()
    """Patterns of tensors that a later task may change although their own task is finished."""
    random: bool = True
    """Whether the seed of a run changes what is learnt."""
    of_data: tuple[str, ...] = (".*/down",)
    """Patterns of frozen tensors, which may be a function of the data alone, whatever the seed."""
    targets: tuple[str, ...] | None = None
    """The only roles the method can adapt, if it cannot take any."""
    stored: Callable[[Learner, int], int]
    """Numbers stored beside the backbone after so many tasks."""
    more_to_train: Callable[[Learner], int] = lambda _: 0
    """How many more numbers each task trains than the one before it."""

    # Growth with the number of tasks, without the outputs of the head. That of a step and a prediction is in `needs`.
    branches: Growth
    """Numbers stored in the learner."""
    memory: Growth = "none"
    """Bytes of the method's memory."""
    fold: Growth = "none"
    """Operations of folding what is still live before predictions, and undoing it after them."""
    consolidation: Growth = "none"
    """Bytes stored for its default consolidation."""
    full: dict[str, Any] = field(default_factory=dict)
    """Settings with which a quantity that has a limit has reached it after two tasks."""


def head_numbers(learner: Learner) -> int:
    return len(learner.outputs) * (learner.backbone.width + 1)


def merged_numbers(learner: Learner, rank: int) -> int:
    """An update of this rank in every adapted layer, or of full rank where that is less."""
    return sum(min(rank, site.d_in, site.d_out) * (site.d_in + site.d_out) for site in learner.sites.values())


def adapter_numbers(learner: Learner, rank: int) -> int:
    return sum(rank * (site.d_in + site.d_out) for site in learner.sites.values())


def finished_numbers(learner: Learner) -> int:
    return sum(f.up_or.numel() + f.down_ri.numel() for site in learner.sites.values() for f in site.finished().values())


def one_adapter(learner: Learner, _: int) -> int:
    return adapter_numbers(learner, 3) + head_numbers(learner)


def one_per_task(learner: Learner, tasks: int) -> int:
    return tasks * adapter_numbers(learner, 3) + head_numbers(learner)


FIRST_SESSION = Case(
    settings={"rank": 3},
    moves=SHARED_LORA,
    of_data=("head/.*/bias",),  # zero: means are compared by their cosine
    stored=one_adapter,
    branches="constant",
    fold="constant",
    consolidation="linear",
)
CASES: dict[str, Case] = {
    "inflora": Case(
        settings={"rank": 3, "epsilon": 0.9},
        moves=("live/.*/TASK/up", *OUTPUTS),
        stored=one_per_task,
        branches="linear",
        memory="bounded",
    ),
    "finetune": Case(settings={"rank": 3}, moves=SHARED_LORA, stored=one_adapter, branches="constant", fold="constant"),
    "lamina": Case(
        settings={"rank": 3, "layers": 1, "random_features": 24},
        stored=one_per_task,
        branches="linear",
        memory="linear",
    ),
    "prototype": Case(moves=(), random=False, stored=lambda learner, _: head_numbers(learner), branches="none"),
    "fsa": FIRST_SESSION,
    "ranpac": FIRST_SESSION,
    "slca": Case(
        moves=("live/.*/shared/up", *OUTPUTS),
        of_data=("live/.*/shared/down",),
        stored=lambda learner, _: (
            sum((site.d_out + site.d_in) * site.d_in for site in learner.sites.values()) + head_numbers(learner)
        ),
        branches="constant",
        fold="constant",
        consolidation="linear",
    ),
    "taskarithmetic": Case(
        settings={"rank": 3, "memory_per_class": 2, "memory_rank": 2, "memory_epochs": 2, "memory_batch": 5},
        revises=("finished/.*/(merged|memory)/.*", "head/.*"),
        stored=lambda learner, tasks: (
            merged_numbers(learner, 3 * tasks) + adapter_numbers(learner, 2) + head_numbers(learner)
        ),
        branches="constant",
        memory="linear",
        full={"rank": 16},  # two tasks fill the 32 dimensions of the merged update
    ),
    "ewc": Case(
        settings={"rank": 3, "fisher_samples": 10},
        moves=SHARED_LORA,
        stored=one_adapter,
        branches="constant",
        memory="constant",
        fold="constant",
    ),
    "color": Case(settings={"rank": 3, "clusters": 2}, stored=one_per_task, branches="linear", memory="linear"),
    "sora": Case(
        settings={"rank": 5, "lam": 30, "warmup": 0.5, "gate_start": "normal"},
        moves=(*LORA, "live/.*/TASK/gate"),
        stored=lambda learner, _: finished_numbers(learner) + head_numbers(learner),
        branches="linear",
        full={"lam": 0},  # no rank is removed: the most that may be stored
    ),
    "sdlora": Case(
        settings={"rank": 3},
        moves=("live/.*/shared/(up|down|scale)", *OUTPUTS),
        stored=lambda learner, tasks: one_per_task(learner, tasks) + tasks * len(learner.sites),
        more_to_train=lambda learner: len(learner.sites),
        branches="linear",
        fold="linear",
    ),
    "clora": Case(
        settings={"rank": 3},
        moves=("live/.*/shared/(a|delta|b)", *OUTPUTS),
        stored=lambda learner, _: one_adapter(learner, 1) + 9 * len(learner.sites),
        branches="constant",
        fold="constant",
    ),
    "olora": Case(settings={"rank": 3, "shrinkage": 0.01, "alpha": 6}, stored=one_per_task, branches="linear"),
    "moram": Case(settings={"rank": 3, "budget": 6}, stored=one_per_task, branches="linear"),
    "duallora": Case(
        settings={"rank": 3, "epsilon": 0.5, "calibration": 2.0},
        moves=(
            "live/.*/orthogonal:TASK/(up|down)",
            "live/.*k/residual:TASK/down",
            "live/.*v/residual:TASK/up",
            *OUTPUTS,
        ),
        idle=("(live|finished)/block0.k/residual:.*/down",),  # the class token's query is the same for all images
        of_data=("finished/.*k/residual:.*/up", "finished/.*v/residual:.*/down"),
        targets=("k", "v"),
        stored=lambda learner, tasks: 2 * tasks * adapter_numbers(learner, 3) + head_numbers(learner),
        branches="linear",
        memory="linear",  # 16 bytes per task and layer beside the bases, which are full after the first task
        full={"epsilon": 1.0},
    ),
}


def may_be_idle(name: str, patterns: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor may stay as it is: because it is declared, and the other factor of its branch is zero."""
    branch, _, part = name.rpartition("/")
    other = tensors[f"{branch}/{'up' if part == 'down' else 'down'}"]
    return any(re.fullmatch(pattern, name) for pattern in patterns) and torch.count_nonzero(other) == 0


@dataclass(frozen=True)
class World:
    """A backbone, its adapted roles, a scenario, and the precision of the frozen weights."""

    backbone: str
    scenario: Scenario
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.backbone}-{self.scenario}" + ("-bf16" if self.dtype == torch.bfloat16 else "")


BACKBONES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "vit": (lambda: tiny_vit(blocks=2), ("k", "v")),
    "fused_vit": (lambda: tiny_fused_vit(blocks=2), ("q", "v", "out")),
    "bert": (lambda: tiny_bert(blocks=1), ("q", "k", "v", "out", "fc1", "fc2")),
    "llama": (lambda: tiny_language("llama"), ("q", "v")),
    "qwen3": (lambda: tiny_language("qwen3"), ("q", "k", "up", "down")),
    "gpt2": (lambda: tiny_language("gpt2"), ("q", "v", "out", "down")),
}
CLASSES, DOMAINS = 6, 3
HOME = World("vit", "class")
"""Where laws are checked that do not depend on the backbone or the scenario."""
WORLDS = (
    HOME,
    World("vit", "domain"),
    World("vit", "task", torch.bfloat16),
    World("fused_vit", "mixed"),
    World("bert", "class"),
    World("bert", "domain"),
)
MIXED = (
    PlannedTask(name="new classes", classes=(0, 1, 2), domains=(0,)),
    PlannedTask(name="more classes", classes=(4, 3), domains=None),
    PlannedTask(name="a known class in a new domain, and a new one", classes=(1, 5), domains=(2,)),
)
TRAINING = TrainingConfig(epochs=2, batch_size=16, lr=0.02, head_lr=0.05, schedule="cosine")
EVALUATION = EvaluationConfig(batch_size=14)
LANGUAGE_TRAINING = TrainingConfig(epochs=2, batch_size=4, lr=0.02, schedule="constant")
LANGUAGE_EVALUATION = EvaluationConfig(batch_size=4, max_new_tokens=6)


@cache
def stream(kind: str, scenario: Scenario) -> Stream:
    """Three tasks of 10 to 48 training examples, so that the last batch of an epoch is smaller than the others."""
    if kind == "language" and scenario == "domain":
        return language_stream()
    data = (tiny_images if kind == "image" else tiny_texts)(CLASSES * DOMAINS * 6, CLASSES, DOMAINS)
    plan: Sequence[PlannedTask] = {
        "domain": lambda: domain_plan(data),
        "mixed": lambda: MIXED,
        "class": lambda: class_plan(data, 3, order_seed=4),
        "task": lambda: class_plan(data, 3),
    }[scenario]()
    return make_stream(data, plan, scenario, per_class=4)


def make_method(name: str, task_count: int | None = 3) -> Method[Any]:
    method = METHODS[name]
    return method(method.config_type(**CASES[name].settings), task_count)


def make_loop(
    name: str,
    world: World,
    folder: Path,
    *,
    seed: int = 0,
    seconds: float = 1e9,
    device: Literal["cpu", "cuda"] = "cpu",
    training: TrainingConfig | None = None,
    prepare: Callable[[Backbone, Sequence[str]], None] = lambda *_: None,
    **watch: Any,
) -> Loop:
    """A loop as a new process would have it; generators are left in a state of no meaning, which must not matter. prepare: is
    called with the backbone before it has adapters, and with the roles that will have some."""
    make, targets = BACKBONES[world.backbone]
    backbone = make()
    prepare(backbone, CASES[name].targets or targets)
    language = backbone.kind == "language" and world.scenario == "domain"  # others are texts to be classified
    make_learner = learner_of if language else Learner
    learner = make_learner(backbone, CASES[name].targets or targets, None, world.dtype, device)
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    return Loop(
        learner=learner,
        method=make_method(name),
        stream=stream(backbone.kind, world.scenario),
        training=training or (LANGUAGE_TRAINING if language else TRAINING),
        seed=seed,
        checkpoints=folder,
        checkpoint_seconds=seconds,
        **{
            "evaluation": LANGUAGE_EVALUATION if language else EVALUATION,
            "text": (text(),) if language else (),
            **watch,
        },
    )


def state(directory: Path) -> dict[str, str]:
    """Hashes of all that a checkpoint holds but the clock: learner, memory, optimiser, predictions, matrix, losses."""
    manifest = checkpoint.read_json(directory / checkpoint.MANIFEST)
    return {name: entry["sha256"] for name, entry in manifest.items() if name != "clock.json"}


def newest(folder: Path) -> Path:
    return max(path for path in folder.iterdir() if not path.name.startswith("."))


@dataclass(frozen=True)
class Trail:
    """One unbroken run, and every state it saved: after every phase and before every step of training."""

    name: str
    world: World
    loop: Loop
    saved: tuple[Path, ...]
    at: tuple[dict[str, Any], ...]
    """Position (task, phase, step) of each saved state."""

    @property
    def stream(self) -> Stream:
        return self.loop.stream

    def tensors(self, index: int) -> dict[str, dict[str, torch.Tensor]]:
        return checkpoint.load(self.saved[index])[1]

    def index(self, **position: Any) -> int:
        """The last saved state at this position."""
        return max(i for i, at in enumerate(self.at) if position.items() <= at.items())

    def resumed(self, index: int, folder: Path, **watch: Any) -> Loop:
        """A new process that finds this state on disk."""
        shutil.copytree(self.saved[index], folder / self.saved[index].name, copy_function=os.link)
        loop = make_loop(self.name, self.world, folder, **watch)
        loop.restore()
        return loop


def walk(name: str, world: World, folder: Path) -> Trail:
    keep, checkpoint.KEEP = checkpoint.KEEP, 10**6
    try:
        loop = make_loop(name, world, folder, seconds=0.0)
        loop.run()
    finally:
        checkpoint.KEEP = keep
    saved = tuple(sorted(path for path in folder.iterdir() if not path.name.startswith(".")))
    at = tuple(checkpoint.read_json(path / "state.json")["position"] for path in saved)
    return Trail(name, world, loop, saved, at)


def run_in_pieces(start: Callable[[int], Loop], most: int = 500) -> tuple[Loop, int]:
    """Start process after process until one comes to the end; that one's loop, and how many there were."""
    for number in range(most):
        loop = start(number)
        loop.restore()
        try:
            loop.run()
        except (Killed, Interrupted):
            continue
        return loop, number + 1
    raise AssertionError(f"{most} processes did not come to the end: no progress is made")


class Killed(BaseException):
    """The process is gone; nothing of ours may catch this."""


def other_labels(batch: Any) -> Any:
    return replace(batch, labels_b=(batch.labels_b + 1) % CLASSES)
