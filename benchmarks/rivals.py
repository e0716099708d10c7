"""Whole runs of lamina against hand-written loops over Hugging Face PEFT and transformers, on one stream.

    python benchmarks/rivals.py            Split CIFAR-100 in ten tasks, 20 images per class, eight epochs; three seeds (one of
                                           loops that are slow by design)
    python benchmarks/rivals.py --quick    one seed, five images per class, and no loop that is slow by design
    python benchmarks/rivals.py --short    one seed, fifteen images per class, four epochs, and no such loop either

All use the same images, batches, weights, adapted layers, rank, epochs, optimiser and learning rates, and are evaluated after
every task on the test images of all tasks so far. The loops are written as a competent user would: transformers' own model with
its default attention, adapters merged before every evaluation and unmerged after it, no gradients and large batches there.
Where lamina chooses bf16, PEFT runs in each of the three ways its users have. Every run is a process of its own. The runs of
one seed take turns of a second, and each is stopped while another computes, so that all see the same changes in the speed of
a shared machine. The time of a run is the sum of its own turns, from loading to the last prediction, without imports and
decoding. A clock that stands still while the run is stopped times its steps and evaluations.
The last line is JSON. Needs ../shared/data/cifar100.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from floor import quartiles
from run import PIXELS, RANK, TARGETS, configuration, decode, say
from torch import Tensor, nn

from lamina import backbones, runs
from lamina.backbones import Backbone
from lamina.config import RunConfig
from lamina.engine import optim
from lamina.engine.order import in_order, positions_of_step, steps_per_epoch
from lamina.speed import precision
from lamina.types import Augment, Task

FULL_LR = 1e-4
"""Of every weight, where all are trained; at the adapters' rate that diverges."""
Adapters = Literal["one", "one per task", "none, all weights"]


@dataclass
class Result:
    """Of one whole run."""

    seconds: float = 0.0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    """Mean of every task."""
    accuracy: float = 0.0
    peak_mb: float = 0.0


def lamina_run(config: RunConfig, out: Path, *, method: str, wanted: Literal["fp32", "bf16"]) -> Result:
    settings = {"name": method, "rank": RANK}
    started = time.perf_counter()
    record = runs.create(config.model_copy(update={"method": settings, "precision": wanted}), out)
    total = time.perf_counter() - started
    seconds = record.cost.seconds
    return Result(
        seconds=total,
        train_seconds=seconds["train"] or 0.0,
        evaluate_seconds=seconds["evaluate"] or 0.0,
        step_ms=[1000 * (entry.seconds or 0.0) / (entry.steps or 1) for entry in record.lineage],
        accuracy=record.metrics.final_accuracy,
    )


# ---------------------------------------------------------------------------------------------- the loops by hand


class Loop:
    """Sequential learning by hand: one adapter for all tasks, one per task, or none; a head with an output per class."""

    def __init__(self, config: RunConfig, adapters: Adapters, kind: Literal["fp32", "autocast", "bf16"]) -> None:
        self.config, self.adapters, self.kind = config, adapters, kind
        backbone = backbones.load(config.backbone.name, image_size=PIXELS)
        for module in backbone.module.modules():  # transformers' model as it is, without lamina's shortcut
            module._forward_pre_hooks.clear()
        self.stream = runs.make_stream(config, runs.load_data(config, backbone))
        self.dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        backbone.module.to(self.dtype)
        self.width, self.base = backbone.width, backbone.module
        self.model: Any = backbone.module if adapters == "none, all weights" else adapted(backbone)
        self.heads = nn.ModuleList()

    def begin(self, number: int, task: Task) -> torch.optim.Optimizer:
        self.heads.requires_grad_(False)
        self.heads.append(nn.Linear(self.width, len(task.classes)))
        if self.adapters == "none, all weights":
            self.model.requires_grad_(True)
        elif self.adapters == "one per task" and number:
            self.model.add_adapter(f"task{number}", lora_settings(self.model.peft_config["task0"].target_modules))
            self.model.base_model.set_adapter([f"task{n}" for n in range(number + 1)])
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(f".task{number}." in name)
        body = [p for p in self.model.parameters() if p.requires_grad]
        training = self.config.training
        lr = FULL_LR if self.adapters == "none, all weights" else training.lr
        groups: list[dict[str, Any]] = [
            {"params": body, "lr": lr, "base_lr": lr},
            {"params": [*self.heads[-1].parameters()], "lr": training.head_lr, "base_lr": training.head_lr},
        ]
        return torch.optim.Adam(groups)

    def features(self, pixels_bchw: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.kind == "autocast" else nullcontext():
            tokens_btd: Tensor = self.model(pixel_values=pixels_bchw.to(self.dtype)).last_hidden_state
        return tokens_btd[:, 0].float()

    def train(self, number: int, task: Task) -> int:
        """Number of steps."""
        training, seed, optimizer = self.config.training, self.config.seed, self.begin(number, task)
        outputs = {label: output for output, label in enumerate(task.classes)}
        per_epoch = steps_per_epoch(len(task.train), training.batch_size)
        for step in range(training.epochs * per_epoch):
            epoch = step // per_epoch
            optim.set_rate(optimizer, optim.rate_factor(training, epoch))
            positions = positions_of_step(len(task.train), training.batch_size, step, seed=seed, task=task.name)
            batch = task.train.batch(positions, Augment(seed, epoch))
            wanted_b = torch.tensor([outputs[label] for label in batch.labels_b.tolist()])
            loss = F.cross_entropy(self.heads[-1](self.features(batch.inputs["pixel_values"])), wanted_b)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return training.epochs * per_epoch

    def evaluate(self, learnt: Sequence[Task]) -> float:
        """Mean accuracy of the tasks learnt."""
        labels = torch.tensor([label for task in learnt for label in task.classes])
        if self.adapters != "none, all weights":
            self.model.merge_adapter()
        found = []
        with torch.inference_mode():
            for task in learnt:
                right = 0
                for positions in in_order(len(task.test), self.config.evaluation.batch_size):
                    batch = task.test.batch(positions)
                    features_bd = self.features(batch.inputs["pixel_values"])
                    scores_bj = torch.cat([head(features_bd) for head in self.heads], 1)
                    right += int((labels[scores_bj.argmax(1)] == batch.labels_b).sum())
                found.append(right / len(task.test))
        if self.adapters != "none, all weights":
            self.model.unmerge_adapter()
        return statistics.mean(found)


def adapted(backbone: Backbone) -> Any:
    from peft import get_peft_model

    paths = [site.path for site in backbone.sites if site.role in TARGETS]
    return get_peft_model(backbone.module, lora_settings(paths), adapter_name="task0").eval()


def lora_settings(paths: Sequence[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(paths))


def by_hand(
    config: RunConfig, _: Path, *, adapters: Adapters, kind: Literal["fp32", "autocast", "bf16"] = "fp32"
) -> Result:
    torch.manual_seed(config.seed)
    result, started = Result(), time.perf_counter()
    loop = Loop(config, adapters, kind)
    for number, task in enumerate(loop.stream):
        begun = time.perf_counter()
        steps = loop.train(number, task)
        trained = time.perf_counter()
        result.accuracy = loop.evaluate(loop.stream.tasks[: number + 1])
        result.step_ms.append(1000 * (trained - begun) / steps)
        result.train_seconds += trained - begun
        result.evaluate_seconds += time.perf_counter() - trained
    result.seconds = time.perf_counter() - started
    return result


# ---------------------------------------------------------------------------------------------- taking turns

CONTENDERS: dict[str, Callable[[RunConfig, Path], Result]] = {
    "lamina finetune, bf16": partial(lamina_run, method="finetune", wanted="bf16"),
    "lamina inflora, bf16": partial(lamina_run, method="inflora", wanted="bf16"),
    "lamina finetune, fp32": partial(lamina_run, method="finetune", wanted="fp32"),
    "lamina inflora, fp32": partial(lamina_run, method="inflora", wanted="fp32"),
    "PEFT, fp32": partial(by_hand, adapters="one"),
    "PEFT, autocast to bf16": partial(by_hand, adapters="one", kind="autocast"),
    "PEFT, bf16 weights": partial(by_hand, adapters="one", kind="bf16"),
    "PEFT, an active adapter per task, fp32": partial(by_hand, adapters="one per task"),
    "all weights, fp32": partial(by_hand, adapters="none, all weights"),
}
PEFT_LOOPS = ("PEFT, fp32", "PEFT, autocast to bf16", "PEFT, bf16 weights")
TURN = 1.0
"""Seconds."""
SLOW_BY_DESIGN = ("PEFT, an active adapter per task, fp32", "all weights, fp32")


class Awake:
    """A clock that stands still while the process is stopped. A thread notices this: it slept too long."""

    TICK, STOPPED = 0.01, 0.3

    def __init__(self) -> None:
        self.real, self.stopped, self.lock = time.perf_counter, 0.0, threading.Lock()
        self.last = self.real()
        threading.Thread(target=self.tick, daemon=True).start()

    def tick(self) -> None:
        while True:
            self()
            time.sleep(self.TICK)

    def __call__(self) -> float:
        with self.lock:
            now = self.real()
            if now - self.last > self.STOPPED:
                self.stopped += now - self.last - self.TICK
            self.last = now
            return now - self.stopped


def one(name: str, per_class: int, epochs: int, seed: int, cache: Path, waits: bool) -> None:
    """Do one run in this process, for `bench`. waits: stop after all imports, as `in_turns` expects."""
    more = {"training.epochs": epochs, "seed": seed}
    config = configuration("finetune", per_class, cache, **more)
    # Some modules are imported at their first use.
    Loop(config, "one" if name.startswith("PEFT") else "none, all weights", "fp32")
    if waits:
        time.perf_counter = Awake()
        signal.raise_signal(signal.SIGSTOP)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        result = CONTENDERS[name](config, Path(folder) / "run")
    result.peak_mb = peak_memory_mb()
    print(json.dumps(vars(result)), flush=True)
    if waits:
        os._exit(0)  # the end of the interpreter is no part of a run


def peak_memory_mb() -> float:
    """Returns the peak memory of this process, in 10^6 bytes. On Linux ru_maxrss starts from the peak of the parent process."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return float(psutil.Process().memory_info().rss / 1e6)
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def contenders(half: bool, quick: bool) -> list[str]:
    """half: whether lamina chooses bf16 here. Otherwise bf16 would be slower for all."""
    return [name for name in CONTENDERS if (half or "bf16" not in name) and not (quick and name in SLOW_BY_DESIGN)]


def bench(per_class: int, epochs: int, seeds: int, quick: bool, without: Sequence[str] = ()) -> dict[str, Any]:
    half = precision.resolve("auto", backbones.load("nano").width) == "bf16"
    names = [name for name in contenders(half, quick) if name not in without]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        decode(configuration("finetune", per_class, Path(folder)))
        for seed in range(seeds):
            say(f"rivals: seed {seed}, {', '.join(names)}")
            common = ["--per-class", str(per_class), "--epochs", str(epochs), "--seed", str(seed), "--cache", folder]
            commands = {
                name: [sys.executable, __file__, "--one", name, "--waits", *common]
                for name in np.roll(names, -seed).tolist()
                if not (seed and name in SLOW_BY_DESIGN)
            }
            for name, result in in_turns(commands).items():
                found[name].append(result)
    return {
        "per_class": per_class,
        "epochs": epochs,
        "seeds": seeds,
        "precision": "bf16" if half else "fp32",
        "runs": {
            name: {key: [round_(run[key]) for run in runs] for key in vars(Result())} for name, runs in found.items()
        },
    }


def in_turns(commands: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Returns the results of every run; their `seconds` are those of its own turns."""
    processes = {name: subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for name, c in commands.items()}
    seconds, results = dict.fromkeys(commands, 0.0), dict[str, dict[str, Any]]()
    try:
        for process in processes.values():
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                raise subprocess.CalledProcessError(status, process.args)
        while len(results) < len(processes):
            for name, process in processes.items():
                if name in results:
                    continue
                started = time.perf_counter()
                process.send_signal(signal.SIGCONT)
                try:
                    process.wait(TURN)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGSTOP)
                seconds[name] += time.perf_counter() - started
                if process.returncode is not None:
                    output = process.communicate()[0]
                    if process.returncode:
                        raise subprocess.CalledProcessError(process.returncode, process.args, output)
                    results[name] = json.loads(output.splitlines()[-1]) | {"seconds": seconds[name]}
                    say(f"rivals: {name}: {json.dumps({key: round_(value) for key, value in results[name].items()})}")
    finally:
        for process in processes.values():
            process.kill()
    return {name: results[name] for name in commands}


def round_(value: Any) -> Any:
    return [round(x, 2) for x in value] if isinstance(value, list) else round(value, 4)


def speedup(found: dict[str, Any], ours: str, theirs: Sequence[str]) -> list[float]:
    """Returns the quartiles over the seeds of the time of the fastest of theirs relative to ours, whole runs."""
    runs = found["runs"]
    best = min((name for name in theirs if name in runs), key=lambda name: statistics.median(runs[name]["seconds"]))
    pairs = zip(runs[best]["seconds"], runs[ours]["seconds"], strict=True)
    return [round(x, 3) for x in quartiles([slow / fast for slow, fast in pairs])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, default=20, help="training images of each class, of 500")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--without", nargs="+", choices=CONTENDERS, default=[], help="contenders to leave out")
    parser.add_argument("--one", choices=CONTENDERS, help="one run in this process")
    parser.add_argument("--seed", type=int, default=0, help="of that run")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()), help="decoded images, of that run")
    parser.add_argument("--waits", action="store_true", help="stop before the run begins, until SIGCONT")
    options = parser.parse_args()
    per_class, epochs, seeds = options.per_class, options.epochs, options.seeds
    if options.quick:
        per_class, seeds = 5, 1
    if options.short:
        per_class, epochs, seeds = 15, 4, 1
    if options.one:
        one(options.one, options.per_class, options.epochs, options.seed, options.cache, options.waits)
    else:
        quick = options.quick or options.short
        print(json.dumps(bench(per_class, epochs, seeds, quick, options.without)))


if __name__ == "__main__":
    main()
