"""Speed and memory of lamina against Hugging Face PEFT and against the bare frozen backbone, on one machine.

    python benchmarks/speed.py            everything; writes docs/results/speed.md
    python benchmarks/speed.py --quick    a minute: few repeats, no whole run; prints the page instead of writing it

Backbone: the embedded `nano`, low-rank adapters of rank 10 on k and v of every block, batches of 64 prepared beforehand,
Adam at lamina's defaults, cross-entropy over ten classes. A training step is forward, reading the loss, backward and the
optimiser's step. PEFT adapts the very same transformers module and has the same head, loss and optimiser.

Every figure of speed comes from one process that takes the variants in turn, round by round, so that whatever else the
machine does hits all of them alike. A ratio is taken within a round; the page gives the median over the rounds and the
quartiles. Peak memory is measured apart, each variant in a process of its own.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina import __version__, backbones, data, run, streams
from lamina.adapters import LowRank
from lamina.backbones import Backbone
from lamina.config import TrainingConfig
from lamina.engine import optim, precision
from lamina.learner import Learner
from lamina.methods import METHODS
from lamina.methods.base import Step
from lamina.types import Augment, Batch, Task

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "speed.md"
RANK, BATCH, CLASSES, TASKS = 10, 64, 10, 10
TARGETS = ("k", "v")
IMAGES = 2048
"""Random 32 px images the batches are made of; what is in them does not change the time."""
EVALUATION_BATCHES = 6
"""Batches in one timed evaluation, with folding or merging before it and undoing it after."""
REFERENCE = "peft-fp32"
RUN_SETTINGS = {
    "method.name": "inflora",
    "method.rank": RANK,
    "stream.tasks": TASKS,
    "data.per_class": 100,
    "training.epochs": 10,
    "training.batch_size": BATCH,
}
"""The whole run whose time is taken apart: Split CIFAR-100 with 100 training images per class where
../shared/data/cifar100 is, else scikit-learn's digits; all else as lamina's defaults."""


# ---------------------------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """One way to learn and to answer. step: one training step on one batch. evaluate: scores of some batches."""

    step: Callable[[Batch], None]
    evaluate: Callable[[Sequence[Batch]], None]


Maker = Callable[[int, Task, Batch], Variant]
"""From the size of the images, the task and a batch of it."""


def lamina_variant(method_name: str, precision: str, finished: int = 0) -> Maker:
    """lamina as its engine drives it. finished: how many earlier tasks have a folded adapter and rows in the head."""

    def make(pixels: int, task: Task, batch: Batch) -> Variant:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        learner = Learner(backbones.load("nano", image_size=pixels), TARGETS, dtype=dtype)
        add_finished(learner, finished)
        method = METHODS[method_name](METHODS[method_name].config_type(rank=RANK), TASKS)
        method.begin(learner, task, lambda *, augmented: iter([batch]))  # noqa: ARG005
        optimizer = optim.make_optimizer(learner.trainable(), TrainingConfig())

        def step(batch: Batch) -> None:
            loss = method.loss(learner, batch, task)
            descend(loss, optimizer, lambda: method.after_backward(learner))
            method.after_step(learner, Step(0, 1, 1e-3))

        def evaluate(batches: Sequence[Batch]) -> None:
            with learner.folded():
                for batch in batches:
                    method.predict(learner, batch)

        return Variant(step, evaluate)

    return make


def add_finished(learner: Learner, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        learner.head.add(f"before-{number}", range(CLASSES))
        for slot in learner.slots.values():
            branch = LowRank.fresh(slot.d_out, slot.d_in, RANK, generator)
            nn.init.normal_(branch.up, std=0.01, generator=generator)
            slot.add(f"before-{number}", branch)
        learner.finish(f"before-{number}")


def peft_variant(precision: str, adapters: int = 1, *, merged: bool = False, attention: str = "sdpa") -> Maker:
    """PEFT on the same module. precision: fp32; autocast (fp32 weights under torch.autocast to bf16); bf16 (weights held
    in bf16, adapters in fp32 as PEFT does by itself). adapters: all active, the last one trained. merged: in evaluation.
    attention: sdpa, which is transformers' default, or eager."""

    def make(pixels: int, task: Task, batch: Batch) -> Variant:  # noqa: ARG001
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        backbone = backbones.load("nano", image_size=pixels, dtype=dtype)
        backbone.module.set_attn_implementation(attention)
        model = adapted_by_peft(backbone, adapters)
        head = nn.Linear(backbone.width, CLASSES)
        trained = {f"adapter/{n}": p for n, p in model.named_parameters() if p.requires_grad}
        trained |= {f"head/{n}": p for n, p in head.named_parameters()}
        optimizer = optim.make_optimizer(trained, TrainingConfig())

        def logits(batch: Batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
                features_bd = backbone.features({"pixel_values": batch.inputs["pixel_values"].to(dtype)})
            return head(features_bd.float())

        def step(batch: Batch) -> None:
            descend(F.cross_entropy(logits(batch), batch.labels_b), optimizer)

        def evaluate(batches: Sequence[Batch]) -> None:
            with merged_adapters(model) if merged else nullcontext(), torch.no_grad():
                for batch in batches:
                    logits(batch)

        return Variant(step, evaluate)

    return make


def adapted_by_peft(backbone: Backbone, adapters: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    paths = [site.path for site in backbone.sites if site.role in TARGETS]
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths)
    names = [f"task{number}" for number in range(adapters)]
    model = get_peft_model(backbone.module, settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{names[-1]}." in name)
    return model.eval()


@contextmanager
def merged_adapters(model: nn.Module):
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def head_variant(pixels: int, task: Task, batch: Batch) -> Variant:  # noqa: ARG001
    """The bare frozen backbone, and a head trained on its features."""
    backbone = backbones.load("nano", image_size=pixels)
    head = nn.Linear(backbone.width, CLASSES)
    optimizer = optim.make_optimizer({f"head/{n}": p for n, p in head.named_parameters()}, TrainingConfig())

    def features(batch: Batch) -> Tensor:
        with torch.no_grad():
            return backbone.features(batch.inputs)

    def evaluate(batches: Sequence[Batch]) -> None:
        with torch.no_grad():
            for batch in batches:
                head(features(batch))

    return Variant(lambda batch: descend(F.cross_entropy(head(features(batch)), batch.labels_b), optimizer), evaluate)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, after_backward: Callable[[], None] = lambda: None) -> None:
    """What follows the loss in a training step, in the order of lamina's engine."""
    loss.item()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    after_backward()
    optimizer.step()


VARIANTS: dict[str, tuple[str, Maker]] = {
    "lamina-fp32": ("lamina `finetune`, fp32", lamina_variant("finetune", "fp32")),
    "lamina-bf16": ("lamina `finetune`, bf16 weights", lamina_variant("finetune", "bf16")),
    "inflora-fp32": ("lamina `inflora`, fp32 (trains half as much)", lamina_variant("inflora", "fp32")),
    "inflora-bf16": ("lamina `inflora`, bf16 weights", lamina_variant("inflora", "bf16")),
    "peft-fp32": ("PEFT, fp32", peft_variant("fp32")),
    "peft-autocast": ("PEFT, fp32 weights, autocast to bf16", peft_variant("autocast")),
    "peft-bf16": ("PEFT, bf16 weights", peft_variant("bf16")),
    "peft-bf16-eager": ("PEFT, bf16 weights, eager attention", peft_variant("bf16", attention="eager")),
    "peft-merged": ("PEFT, fp32, merged to evaluate", peft_variant("fp32", merged=True)),
    "peft-bf16-merged": ("PEFT, bf16 weights, merged to evaluate", peft_variant("bf16", merged=True)),
    "head": ("frozen backbone and a head, fp32", head_variant),
    "lamina-task10": (
        "lamina `finetune`, fp32, after nine finished tasks",
        lamina_variant("finetune", "fp32", TASKS - 1),
    ),
    "inflora-task10": (
        "lamina `inflora`, fp32, after nine finished tasks",
        lamina_variant("inflora", "fp32", TASKS - 1),
    ),
    "peft-task10": ("PEFT, fp32, ten active adapters, one trained", peft_variant("fp32", TASKS)),
}
QUICK_VARIANTS = ("lamina-fp32", "lamina-bf16", "inflora-fp32", "peft-fp32", "peft-autocast", "peft-bf16-eager", "head")
QUICK_MEMORY = ("lamina-fp32", "peft-fp32")
LIKE_FOR_LIKE = {  # how many times as fast the first is as the second, in this phase
    "train_fp32": ("lamina-fp32", "peft-fp32", "train"),
    "train_bf16_over_peft_fp32": ("lamina-bf16", "peft-fp32", "train"),
    "train_bf16_over_peft_autocast": ("lamina-bf16", "peft-autocast", "train"),
    "train_bf16_over_peft_bf16": ("lamina-bf16", "peft-bf16", "train"),
    "train_bf16_over_peft_bf16_eager": ("lamina-bf16", "peft-bf16-eager", "train"),
    "train_fp32_inflora": ("inflora-fp32", "peft-fp32", "train"),
    "train_fp32_over_head_only": ("lamina-fp32", "head", "train"),
    "evaluate_fp32": ("lamina-fp32", "peft-fp32", "evaluate"),
    "evaluate_fp32_over_peft_merged": ("lamina-fp32", "peft-merged", "evaluate"),
    "evaluate_fp32_over_bare_backbone": ("lamina-fp32", "head", "evaluate"),
    "evaluate_bf16_over_peft_bf16_merged": ("lamina-bf16", "peft-bf16-merged", "evaluate"),
    "evaluate_bf16_over_peft_fp32": ("lamina-bf16", "peft-fp32", "evaluate"),
    "train_task10_over_task1_lamina": ("lamina-task10", "lamina-fp32", "train"),
    "train_task10_over_task1_inflora": ("inflora-task10", "inflora-fp32", "train"),
    "train_task10_over_task1_peft": ("peft-task10", "peft-fp32", "train"),
}


# ---------------------------------------------------------------------------------------------- measuring


def make_task(pixels: int, cache: Path) -> Task:
    """One task of random images, through lamina's own data path."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    source = data.from_arrays(images, np.arange(IMAGES) % CLASSES, test_fraction=0.1)
    transform = data.ImageTransform(size=pixels, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    labelled = data.load_images(source, transform, cache=cache)
    return streams.make_stream(labelled, streams.class_plan(labelled, 1), "class")[0]


def make_batches(task: Task) -> list[Batch]:
    starts = range(0, EVALUATION_BATCHES * BATCH, BATCH)
    return [task.train.batch(np.arange(start, start + BATCH), Augment(0, 0)) for start in starts]


def measure_speed(
    names: Sequence[str], pixels: int, rounds: int, steps: int, cache: Path
) -> dict[str, dict[str, list]]:
    """Seconds per image of every variant, phase and round. The order of the variants turns from round to round."""
    task = make_task(pixels, cache)
    batches = make_batches(task)
    variants = {name: VARIANTS[name][1](pixels, task, batches[0]) for name in names}
    for variant in variants.values():
        variant.step(batches[0])
        variant.evaluate(batches[:1])
    seconds: dict[str, dict[str, list]] = {name: {"train": [], "evaluate": []} for name in names}
    for number in range(-1, rounds):  # the round before the first one warms up
        for name in np.roll(names, -number).tolist():
            found = {
                "train": timed(lambda v=variants[name]: [v.step(batches[i % len(batches)]) for i in range(steps)]),
                "evaluate": timed(lambda v=variants[name]: v.evaluate(batches)),
            }
            if number >= 0:
                seconds[name]["train"].append(found["train"] / (steps * BATCH))
                seconds[name]["evaluate"].append(found["evaluate"] / (len(batches) * BATCH))
        say(f"speed: round {number + 1} of {rounds}")
    return seconds


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(seconds: Mapping[str, Mapping[str, list]], fast: str, slow: str, phase: str) -> list[float]:
    """How many times as fast the first is as the second: lower quartile, median and upper quartile over the rounds."""
    of_round = np.array(seconds[slow][phase]) / np.array(seconds[fast][phase])
    return [round(float(q), 3) for q in np.quantile(of_round, (0.25, 0.5, 0.75))]


def measure_pipeline(pixels: int, rounds: int, cache: Path) -> float:
    """Images per second of the training transform, from decoded 32 px images to a normalised batch."""
    task = make_task(pixels, cache)
    found = []
    for epoch in range(rounds):
        order = np.random.default_rng(epoch).permutation(len(task.train))
        starts = range(0, len(order) - BATCH + 1, BATCH)
        passed = timed(lambda: [task.train.batch(order[s : s + BATCH], Augment(0, epoch)) for s in starts])  # noqa: B023
        found.append(len(starts) * BATCH / passed)
    return float(np.median(found))


def measure_memory(name: str, pixels: int) -> float:
    """Peak memory in MB of a process of its own that makes a variant, trains three steps and evaluates."""
    command = [sys.executable, __file__, "--memory-of", name, "--pixels", str(pixels)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    say(f"memory: {name}")
    return float(found.stdout.split()[-1])


def memory_of(name: str, pixels: int) -> None:
    """The inner side of `measure_memory`. `idle` loads the libraries and the backbone, and computes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        batches = make_batches(task := make_task(pixels, Path(folder)))
        if name == "idle":
            backbones.load("nano", image_size=pixels)
        else:
            variant = VARIANTS[name][1](pixels, task, batches[0])
            for batch in batches[:3]:
                variant.step(batch)
            variant.evaluate(batches)
    print(peak_memory_mb())


def peak_memory_mb() -> float:
    """Of this process alone. On Linux, ru_maxrss would begin at the peak of the process that started this one."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def measure_run(folder: Path, pixels: int) -> dict[str, Any]:
    """Where the time of a whole run goes, from its own record. Images are decoded before, which a run does only once."""
    shared = ROOT.parent / "shared" / "data" / "cifar100"
    settings = dict(RUN_SETTINGS) | {
        "backbone.image_size": pixels,
        "data.source": str(shared) if shared.is_dir() else "digits",
    }
    if not shared.is_dir():
        settings |= {"stream.tasks": 5, "data.augment": "crop"}
    config = run.load_config(None, [*settings.items(), ("data.cache", str(folder / "cache"))])
    decoding = timed(lambda: run.load_data(config, backbones.load("nano", image_size=pixels)))
    say("run: images decoded")
    record = run.create(config, folder / "run", lambda stream, event: say_task(len(stream), event))
    return {
        "data": "cifar100" if shared.is_dir() else "digits",
        "settings": {key: value for key, value in settings.items() if key != "data.source"},
        "precision": record["machine"]["precision"],
        "decoding_seconds": round(decoding, 1),
        **{
            key: record["cost"][key]
            for key in ("seconds", "steps", "train_examples_per_second", "outside_training_share")
        },
    }


def say_task(tasks: int, event: Any) -> None:
    if event.accuracy is not None:
        say(f"run: task {event.task + 1} of {tasks} done")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- reporting


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
    } | versions()


def versions() -> dict[str, str]:
    import peft
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "lamina": __version__,
    }


def page(found: Mapping[str, Any]) -> str:
    """The results as a document."""
    return (
        "\n\n".join(part for part in (head_part(found), speed_part(found), task_part(found), rest_part(found)) if part)
        + "\n"
    )


def head_part(found: Mapping[str, Any]) -> str:
    about = found["machine"]
    return "# Speed and memory\n\n" + paragraphs(
        f"Made by `{found['command']}` on {found['date']}; do not edit. Machine: {about['processor']}, {about['cores']} "
        f"cores, {about['threads']} threads, {about['memory_gb']} GB, {about['system']}, no GPU used; bf16 instructions: "
        f"{', '.join(about['bf16_instructions']) or 'none'}. Python {about['python']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, PEFT {about['peft']}, lamina {about['lamina']}.",
        f"Backbone `nano` (ViT, width 192, 9 blocks, patches of 8 px) at {found['pixels']} px, batch {BATCH}, rank {RANK} on "
        "k and v of every block. A training step is forward, reading the loss, backward and Adam's step, on a batch that is "
        f"ready. Evaluation is forward without gradients over {EVALUATION_BATCHES} batches of {BATCH}; folding (lamina) or "
        "merging (PEFT) before it, and undoing that after it, count.",
        f"A frozen layer of this width runs {about['bf16_speedup']} times as fast in bf16 as in fp32 here, so "
        f"`precision: auto` is {'bf16' if about['bf16_speedup'] >= precision.WORTH_IT else 'fp32'}."
        + ("" if about["bf16_speedup"] >= 1 else " The variants in bf16 are left out: nobody would use them here."),
    )


def speed_part(found: Mapping[str, Any]) -> str:
    rows = [
        "| variant | training images/s | against PEFT fp32 | evaluation images/s | against PEFT fp32 | peak memory MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, entry in found["variants"].items():
        if not name.endswith("-task10"):
            train, evaluate = entry["train"], entry["evaluate"]
            memory = f"{entry['peak_memory_mb']:.0f}" if entry["peak_memory_mb"] else "-"
            rows.append(
                f"| {VARIANTS[name][0]} | {train['images_per_second']:.0f} | {spread(train['ratio'])} "
                f"| {evaluate['images_per_second']:.0f} | {spread(evaluate['ratio'])} | {memory} |"
            )
    explanation = paragraphs(
        f"A ratio above 1 means faster than PEFT in fp32; in brackets the quartiles over {found['rounds']} rounds. All "
        "variants run the same transformers model. lamina's `finetune` trains both factors, as PEFT does, and is the "
        "one to compare; `inflora` trains one of the two. Of the two bf16 rivals, autocast keeps the weights in fp32 and "
        "casts them as they are used; the other holds them in bf16, as lamina does. The merged variants of PEFT train like "
        "the unmerged ones. On processors, torch's default attention is slow backwards in bf16, so lamina takes eager "
        "attention there; the row of PEFT with eager attention shows what is left without that choice. What bf16 does to "
        "accuracy is not measured "
        "here. Memory is the peak of a whole process; libraries and the loaded backbone take "
        f"{found['idle_memory_mb']:.0f} MB of it before anything is computed."
    )
    ratios = [
        "| like for like: how many times as fast | ratio |",
        "|---|---:|",
        *(
            f"| {describe(*LIKE_FOR_LIKE[key])} | {spread(value)} |"
            for key, value in found["ratios"].items()
            if "task10" not in key
        ),
    ]
    return "\n".join(rows) + "\n\n" + explanation + "\n\n" + "\n".join(ratios)


def describe(fast: str, slow: str, phase: str) -> str:
    doing = {"train": "training", "evaluate": "evaluation"}[phase]
    return f"{doing}: {VARIANTS[fast][0]}, over {VARIANTS[slow][0]}"


def paragraphs(*texts: str) -> str:
    return "\n\n".join(textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) for text in texts)


def spread(quartiles: Sequence[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def task_part(found: Mapping[str, Any]) -> str:
    ratios = found["ratios"]
    lines = [
        ("lamina `finetune`, fp32, nine folded adapters", "train_task10_over_task1_lamina"),
        ("lamina `inflora`, fp32, nine folded adapters", "train_task10_over_task1_inflora"),
        ("PEFT, fp32, ten active adapters, one trained", "train_task10_over_task1_peft"),
    ]
    if not all(key in ratios for _, key in lines):
        return ""
    rows = [f"| {what} | {spread([1 / r for r in reversed(ratios[key])])} |" for what, key in lines]
    table = "\n".join(["| variant | time of a training step in task 10, over that in task 1 |", "|---|---:|", *rows])
    explanation = paragraphs(
        "lamina folds the adapter of a finished task into the frozen weight. PEFT is used as it is without merging, all ten "
        "adapters active; merging each one by hand before the next task would avoid the cost there too."
    )
    return f"## The tenth task\n\n{table}\n\n{explanation}"


def rest_part(found: Mapping[str, Any]) -> str:
    texts = [
        f"Input pipeline: {found['pipeline_images_per_second']:.0f} images/s from decoded 32 px images to normalised "
        f"{found['pixels']} px batches with random resized crop and flip, in the process that trains."
    ]
    if whole := found["run"]:
        seconds = whole["seconds"]
        phases = ", ".join(f"{phase} {value:.0f} s" for phase, value in seconds.items() if phase != "total")
        settings = ", ".join(f"{key} = {value}" for key, value in whole["settings"].items())
        texts.append(
            f"A whole run on {whole['data']} ({settings}; otherwise the defaults; precision {whole['precision']}): "
            f"{seconds['total']:.0f} s for {whole['steps']} steps, of which {100 * whole['outside_training_share']:.1f} % "
            f"outside training ({phases}). Training includes making the batches: {whole['train_examples_per_second']:.0f} "
            "images/s. Evaluation is on the test images of all tasks learnt so far, after every task. The images had been "
            f"decoded before, which took {whole['decoding_seconds']:.0f} s and happens once for a dataset."
        )
    return "## Around the steps\n\n" + paragraphs(*texts)


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    quick, pixels = arguments.quick, arguments.pixels
    bf16 = precision.bf16_speedup(width=192)
    names = [
        name
        for name in (QUICK_VARIANTS if quick else VARIANTS)
        if bf16 >= 1 or not ("bf16" in name or "autocast" in name)
    ]
    measured_for_memory = QUICK_MEMORY if quick else names
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        memory = {name: measure_memory(name, pixels) for name in ("idle", *measured_for_memory)}
        seconds = measure_speed(names, pixels, arguments.rounds, arguments.steps, cache)
        pipeline = measure_pipeline(pixels, arguments.rounds, cache)
        whole = None if quick or arguments.no_run else measure_run(Path(folder), pixels)
    return {
        "benchmark": "speed",
        "command": " ".join(["python benchmarks/speed.py", *(["--quick"] if quick else []), *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine() | {"bf16_speedup": round(bf16, 2)},
        "pixels": pixels,
        "rounds": arguments.rounds,
        "variants": {
            name: {
                phase: {
                    "images_per_second": round(1 / float(np.median(seconds[name][phase])), 1),
                    "ratio": ratio(seconds, name, REFERENCE, phase),
                }
                for phase in ("train", "evaluate")
            }
            | {"peak_memory_mb": memory.get(name)}
            for name in names
        },
        "ratios": {key: ratio(seconds, *which) for key, which in LIKE_FOR_LIKE.items() if set(which[:2]) <= set(names)},
        "idle_memory_mb": memory["idle"],
        "pipeline_images_per_second": round(pipeline, 1),
        "run": whole,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory of lamina against PEFT and the bare backbone.")
    quick = os.environ.get("QUICK", "") not in ("", "0")
    parser.add_argument("--quick", action="store_true", default=quick, help="a minute: few repeats, no whole run")
    parser.add_argument("--pixels", type=int, default=32, help="side of the images (32)")
    parser.add_argument("--rounds", type=int, help="interleaved repeats (15; 5 in quick)")
    parser.add_argument("--steps", type=int, default=3, help="training steps in one repeat")
    parser.add_argument("--no-run", action="store_true", help="leave out the whole run")
    parser.add_argument("--page", type=Path, help=f"file to write ({PAGE.relative_to(ROOT)}; in quick, none: printed)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (5 if arguments.quick else 15)
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.memory_of:
        memory_of(arguments.memory_of, arguments.pixels)
        return
    found = collect(arguments)
    target = arguments.page or (None if arguments.quick else PAGE)
    if target is None:
        print(page(found))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(found), encoding="utf-8")
        say(f"wrote {target}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
