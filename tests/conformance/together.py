"""Runs the laws' small worlds with several processes: `torchrun --nproc-per-node 2 together.py OUT`. The first process writes
what each comes to."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.conformance.cases import HOME, LANGUAGE_TRAINING, World, make_loop
from tests.conformance.test_speed import SGD, STEADY, outcome
from tests.languages import tiny_language
from torch import Tensor

from lamina.config import ConsolidationConfig, RehearsalConfig
from lamina.engine import world as processes
from lamina.engine.loop import Loop
from lamina.methods import METHODS
from lamina.speed import accelerate, shard

LLAMA, TEXT = World("llama", "domain"), World("bert", "domain")
OF_LANGUAGE = sorted(name for name, method in METHODS.items() if not method.refuses_language)
LDA = {"consolidation": ConsolidationConfig(classifier="lda", drift="linear", layers=2)}
REHEARSED = {"rehearsal": RehearsalConfig(per_class=2)}
CASES: dict[str, tuple[str, World, dict[str, Any]]] = {
    **{name: (name, HOME, {}) for name in sorted(METHODS)},
    **{f"{name} of language": (name, LLAMA, {}) for name in OF_LANGUAGE},
    "finetune on texts": ("finetune", TEXT, {}),
    "finetune with LDA": ("finetune", HOME, LDA),
    "inflora with rehearsal": ("inflora", HOME, REHEARSED),
    "finetune of language with rehearsal": ("finetune", LLAMA, REHEARSED),
}


SHARDED = " with sharded weights"
CASES |= {name + SHARDED: CASES[name] for name in CASES}


def loop_of(case: str, folder: Path) -> Loop:
    name, world, how = CASES[case]
    training = LANGUAGE_TRAINING.model_copy(update={"optimizer": "sgd", "momentum": 0.0}) if world is LLAMA else SGD
    loop = make_loop(name, world, folder, training=training, **how)
    loop.method.config = loop.method.config.model_copy(update=STEADY.get(name))
    return loop


def end_of(loop: Loop) -> dict[str, Tensor]:
    """What a run comes to. Of a language model, scores are those of its completions, which the matrix counts."""
    counts = {"matrix": torch.from_numpy(loop.matrix.correct_ij)}
    if not loop.learner.generates:
        return {name: value.contiguous() for name, value in outcome(loop).items()} | counts
    updates = {name: value.float()[None] for name, value in loop.learner.tensors().items()}
    losses = torch.tensor([[loss.value for loss in loop.state.losses]])
    return {name: value.clone().contiguous() for name, value in ({"losses": losses} | updates).items()} | counts


def main(out: Path) -> None:
    torch.set_num_threads(1)
    tiny_language("llama")  # transformers lets the first process alone save models, once they have met
    world = processes.join()
    for case in CASES:
        loop = loop_of(case, out / f"rank{world.rank}" / case)
        if case.endswith(SHARDED):
            here, total = shard(loop.learner.backbone, (), world, loop.learner.device)
            assert here < 0.8 * total, (here, total)
        with closing(accelerate(loop.learner, world)) as loop.steps:
            loop.run()
            found = end_of(loop)
        if world.is_first:
            save_file(found, out / f"{case}.safetensors")
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
