"""A whole run of lamina by phase, relative to the floor of this machine, which is measured between its steps.

    python benchmarks/run.py            Split CIFAR-100 in ten tasks, InfLoRA, every fifth image, twenty epochs
    python benchmarks/run.py --quick    every fiftieth image
    LARGE=1 python benchmarks/run.py    adapters of rank 32 on all six linear layers of a block, in place of rank 10 on k and v

Training and test images are reduced by the same factor, so that phases have the same shares as on the whole stream. Images are
decoded before the run, which happens once per dataset. Then steps of task 20 and of task 1 are timed in alternating rounds.
The last line is JSON. Needs ../shared/data/cifar100.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, redirect_stdout
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from floor import Floor, quartiles
from torch import nn

from lamina import backbones, runs
from lamina.adapters import LowRank
from lamina.config import RunConfig, TrainingConfig
from lamina.engine import optim
from lamina.learner import Learner
from lamina.methods import METHODS
from lamina.methods.base import Step
from lamina.speed import accelerate, precision
from lamina.types import Batch, Task

CIFAR = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "cifar100"
REGIMES: dict[str, tuple[int, tuple[str, ...]]] = {
    "rank 10 on k and v": (10, ("k", "v")),
    "rank 32 on all six maps": (32, ("q", "k", "v", "out", "fc1", "fc2")),
}
"""Rank and roles of the adapters: that of the papers, and that of the tables in which training pays."""
REGIME = list(REGIMES)[int(os.environ.get("LARGE", "") not in ("", "0"))]
RANK, TARGETS = REGIMES[REGIME]
BATCH, PIXELS = 64, 32
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data.source": str(CIFAR),
    "data.crop_scale": [0.5, 1.0],
    "stream.tasks": 10,
    "backbone.name": "nano",
    "backbone.image_size": PIXELS,
    "backbone.targets": list(TARGETS),
    "training.optimizer": "adam",
    "training.lr": 1e-3,
    "training.head_lr": 5e-3,
    "training.schedule": "quarter-cosine",
    "training.batch_size": BATCH,
    "training.epochs": 20,
    "evaluation.batch_size": 250,
}
FLOOR_EVERY = 8
"""Training steps per floor step, whole and split in turn. So all see the same changes in the speed of a shared machine."""
ROUNDS, STEPS = 15, 3
QUICK_ROUNDS = 7


def configuration(method: str, per_class: int, cache: Path, **more: Any) -> RunConfig:
    """per_class: training images of each class; a fifth as many test images, as in CIFAR-100."""
    thinned = {"data.per_class": per_class, "evaluation.per_class": max(1, per_class // 5), "data.cache": str(cache)}
    return runs.load_config(None, [*({"method.name": method} | SETTINGS | thinned | more).items()])


def decode(config: RunConfig) -> None:
    runs.load_data(config, backbones.load(config.backbone.name, image_size=PIXELS))


def measure(config: RunConfig, out: Path) -> dict[str, Any]:
    """Returns the seconds of every phase, and the total as a multiple of the floor for the same number of training images. The
    floor is the faster one of whole and split batches. `regime_ratio` is the total as a multiple of the floor and the products
    that the gradients of the adapted weights take."""
    name = precision.resolve(config.precision, backbones.load(config.backbone.name).width)
    floor = Floor(backbones.load(config.backbone.name, image_size=PIXELS), TARGETS, precision.DTYPES[name])
    pixels_bchw = torch.randn(BATCH, 3, PIXELS, PIXELS)
    samples: dict[str, list[list[float]]] = {}
    for way in floor.ways:
        floor.seconds_per_image(pixels_bchw, 2, way)
        samples[way] = [[] for _ in range(config.stream.tasks)]
    ways, aside = cycle(floor.ways), [0.0] * config.stream.tasks
    products: list[float] = []

    def watch(_: Any, event: Any) -> None:
        if event.phase == "train" and not event.seconds and event.done % FLOOR_EVERY == 0:
            started, way = time.perf_counter(), next(ways)
            samples[way][event.task].append(floor.seconds_per_image(pixels_bchw, 1, way))
            products.append(floor.products(BATCH))
            aside[event.task] += time.perf_counter() - started
        if event.phase == "evaluate" and event.seconds:
            say(f"run: {event.task + 1} tasks done")

    started = time.perf_counter()
    record = runs.create(config.model_copy(update={"precision": name}), out, watch)
    total = time.perf_counter() - started - sum(aside)
    seconds = {phase: value or 0.0 for phase, value in record.cost.seconds.items()}
    seconds["train"] = round(seconds["train"] - sum(aside), 3)
    images = [config.training.epochs * (task.train or 0) for task in record.stream.tasks]
    ms = {
        way: [round(1000 * x, 3) for x in quartiles([*chain.from_iterable(of_tasks)])]
        for way, of_tasks in samples.items()
    }
    fastest = min(ms, key=lambda way: ms[way][1])
    floors = [statistics.median(of_task) * count for of_task, count in zip(samples[fastest], images, strict=True)]
    steps = [(task.seconds or 0.0) - own for task, own in zip(record.lineage, aside, strict=True)]
    return {
        "precision": name,
        "seconds": {k: v for k, v in seconds.items() if k != "total"} | {"total": round(total, 2)},
        "images": sum(images),
        "floor_ms_per_image": ms[fastest],
        "floor_ways_ms_per_image": ms,
        "products_ms_per_image": [round(1000 * x, 3) for x in quartiles(products)],
        "floor_ratio": round(total / sum(floors), 3),
        "regime_ratio": round(total / (sum(floors) + statistics.median(products) * sum(images)), 3),
        "training_over_floor": round(sum(steps) / sum(floors), 3),
        "tasks_over_floor": [round(x, 3) for x in quartiles([a / b for a, b in zip(steps, floors, strict=True)])],
        "outside_steps": round(1 - seconds["train"] / total, 4),
        "begin_and_end_share": round((seconds["begin"] + seconds["end"]) / total, 4),
        "accuracy": record.metrics.final_accuracy,
        "threads": record.machine.threads,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------ the step of a late task


def stepper(method_name: str, dtype: torch.dtype, finished: int, batch: Batch, stack: ExitStack) -> Any:
    """Returns a training step as the engine does it, after so many finished tasks, for as long as the stack is open."""
    learner = Learner(backbones.load("nano", image_size=PIXELS), TARGETS, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for number in range(finished):
        learner.head.add(f"before-{number}", range(5))
        for site in learner.sites.values():
            branch = LowRank.fresh(site.d_out, site.d_in, RANK, generator)
            nn.init.normal_(branch.up, std=0.01, generator=generator)
            site.add(f"before-{number}", branch)
        learner.finish(f"before-{number}")
    task = Task(name="now", classes=tuple(range(5)), train=None, val=None, test=None)  # type: ignore[arg-type]
    method = METHODS[method_name](METHODS[method_name].config_type.model_validate({"rank": RANK}), 20)
    method.begin(learner, task, lambda *, augmented: iter([batch]))  # noqa: ARG005
    optimizer = optim.make_optimizer(learner.trainable(), TrainingConfig())
    stack.enter_context(closing(accelerate(learner)))

    def step(done: int) -> None:
        loss = method.loss(learner, batch, task)
        loss.item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        method.after_backward(learner)
        optimizer.step()
        method.after_step(learner, Step(done, 10**6, 1e-3))

    return step


def late_over_early(
    method: str, precision_name: str, tasks: Sequence[int] = (1, 20), rounds: int = ROUNDS
) -> list[float]:
    """Returns the quartiles over the rounds of the time of a step in the later task relative to the earlier one."""
    generator = np.random.default_rng(0)
    pixels_bchw = torch.from_numpy(generator.standard_normal((BATCH, 3, PIXELS, PIXELS), dtype=np.float32))
    batch = Batch(inputs={"pixel_values": pixels_bchw}, labels_b=torch.from_numpy(generator.integers(0, 5, BATCH)))
    found: list[list[float]] = [[], []]
    with ExitStack() as stack:
        steps = [stepper(method, precision.DTYPES[precision_name], task - 1, batch, stack) for task in tasks]
        for number in range(rounds + 1):
            for which in (0, 1) if number % 2 else (1, 0):
                started = time.perf_counter()
                for done in range(STEPS):
                    steps[which](done)
                if number:  # the first round warms up
                    found[which].append(time.perf_counter() - started)
    return [round(x, 3) for x in quartiles([late / early for early, late in zip(*found, strict=True)])]


def bench(method: str, per_class: int, seed: int = 0, rounds: int = ROUNDS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        config = configuration(method, per_class, Path(folder) / "cache", seed=seed)
        decode(config)
        say("run: images decoded")
        found = measure(config, Path(folder) / "run")
    return {
        "method": method,
        "per_class": per_class,
        "seed": seed,
        **found,
        "task20_over_task1": late_over_early(method, found["precision"], rounds=rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="inflora", choices=list(METHODS))
    parser.add_argument("--per-class", type=int, default=100, help="training images of each class, of 500")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    per_class, rounds = (10, QUICK_ROUNDS) if options.quick else (options.per_class, ROUNDS)
    print(json.dumps(bench(options.method, per_class, options.seed, rounds)))


if __name__ == "__main__":
    main()
