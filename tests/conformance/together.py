"""Runs the laws' small worlds with several processes: `torchrun --nproc-per-node 2 together.py OUT`. The first process writes
what each comes to."""

import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.conformance.cases import HOME, LANGUAGE_TRAINING, World, make_loop
from tests.conformance.test_speed import SGD, STEADY, outcome
from tests.languages import tiny_language
from torch import Tensor
from torch.distributed.tensor import DTensor

from lamina.backbones import Backbone
from lamina.config import ConsolidationConfig, RehearsalConfig
from lamina.engine import world as processes
from lamina.engine.loop import Loop
from lamina.methods import METHODS
from lamina.speed import accelerate, held, shard

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
    "finetune of language in bfloat16": ("finetune", World("llama", "domain", torch.bfloat16), {}),
}


SHARDED = " with sharded weights"
CASES |= {name + SHARDED: CASES[name] for name in CASES}


def loop_of(case: str, folder: Path, **more: Any) -> Loop:
    name, world, how = CASES[case]
    how = how | more
    training = (
        LANGUAGE_TRAINING.model_copy(update={"optimizer": "sgd", "momentum": 0.0}) if world.backbone == "llama" else SGD
    )
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


def sharding(world: processes.World, backbone: Backbone, roles: Sequence[str]) -> None:
    shard(backbone, {site.path for site in backbone.sites_of(roles, None)}, world, torch.device("cpu"))


class Shared(processes.World):
    """A world that counts the batches whose gradients were summed over all processes."""

    calls = 0

    def summed(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        Shared.calls += any(tensor is not None for tensor in tensors)
        return super().summed(tensors)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    tiny_language("llama")  # transformers lets the first process alone save models, once they have met
    met = processes.join()
    world = Shared(met.rank, met.size)
    for case in CASES:
        folder, sharded = out / f"rank{world.rank}" / case, case.endswith(SHARDED)
        loop = loop_of(case, folder, **{"prepare": partial(sharding, world)} if sharded else {})
        here, total = held(loop.learner)
        assert (here < total) == sharded, (here, total)
        blocks = map(loop.learner.backbone.module.get_submodule, loop.learner.backbone.stages[1:])
        assert all(isinstance(one, DTensor) == sharded for block in blocks for one in block.parameters())
        calls = Shared.calls
        with closing(accelerate(loop.learner, world)) as loop.steps:
            loop.run()
            found = end_of(loop)
        # moram selects its adapters per input in every forward, and prototype trains nothing.
        if CASES[case][0] not in ("moram", "prototype"):
            assert Shared.calls > calls, f"{case}: no batch was shared"
        if world.is_first:
            save_file(found, out / f"{case}.safetensors")
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
