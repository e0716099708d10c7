"""Training steps at the sizes papers use: ViT-S/16 and ViT-B/16 at 224 px, lamina against PEFT, on a GPU or a CPU.

    python benchmarks/shapes.py                      on a GPU if there is one
    python benchmarks/shapes.py --device cpu --shapes ViT-S/16 --batches 16

Weights are random: only time and memory are measured. All contenders have the same model, adapted layers (k and v, rank 10),
head (ten outputs), Adam, and a batch that is ready. They alternate in rounds. lamina's steps are those of its engine. The
fraction of the peak counts the operations of the floor only (forward and input gradients of the bare backbone), relative to a
large bf16 matrix product measured here. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from bench import machine
from floor import Floor, quartiles
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lamina import backbones
from lamina.config import TrainingConfig
from lamina.engine import device, optim
from lamina.engine.steps import backward
from lamina.learner import Learner
from lamina.methods import METHODS
from lamina.methods.base import Step
from lamina.speed import accelerate
from lamina.speed.cuda_graph import GraphedGradients
from lamina.types import Batch, Task

RANK, TARGETS, CLASSES, PIXELS = 10, ("k", "v"), 10, 224
SHAPES = {
    "ViT-S/16": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "ViT-B/16": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
Work = Callable[[], None]
LEARNING = ExitStack()
"""Closes what accelerates lamina's learners."""


def save(shape: str, folder: str) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(image_size=PIXELS, patch_size=16, num_hidden_layers=12, **SHAPES[shape])
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)


def floor(folder: str, batch: Batch) -> Work:
    backbone = backbones.load(folder)
    backbone.module.to(batch.labels_b.device)
    bare = Floor(backbone, TARGETS, torch.bfloat16)
    return partial(bare.step, batch.inputs["pixel_values"])


def lamina(
    folder: str, batch: Batch, *, method: str, dtype: torch.dtype = torch.bfloat16, graphed: bool = False
) -> Work:
    learner = Learner(backbones.load(folder), TARGETS, dtype=dtype, device=batch.labels_b.device)
    task = Task(name="now", classes=tuple(range(CLASSES)), train=None, val=None, test=None)  # type: ignore[arg-type]
    taught = METHODS[method](METHODS[method].config_type.model_validate({"rank": RANK}), 20)
    taught.begin(learner, task, lambda *, augmented: iter([batch]))  # noqa: ARG005
    parameters = learner.trainable()
    optimizer = optim.make_optimizer(parameters, TrainingConfig(optimizer="adam"))
    LEARNING.enter_context(closing(accelerate(learner)))
    trained = list(parameters.values())

    def loss(batch: Batch) -> Tensor:
        return taught.loss(learner, batch, task)

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    gradients = GraphedGradients(loss, trained, len(batch), note) if graphed else partial(backward, loss, trained)

    def step() -> None:
        gradients(batch).item()
        taught.after_backward(learner)
        optimizer.step()
        taught.after_step(learner, Step(0, 10**6, 1e-3))

    return step


def peft(
    folder: str, batch: Batch, *, kind: Literal["fp32", "tf32", "autocast", "bf16"], compiled: bool = False
) -> Work:
    from peft import LoraConfig, get_peft_model

    backbone = backbones.load(folder)
    for module in backbone.module.modules():  # transformers' model as it is, without lamina's shortcut
        module._forward_pre_hooks.clear()
    where, dtype = batch.labels_b.device, torch.bfloat16 if kind == "bf16" else torch.float32
    backbone.module.to(where, dtype)
    paths = [site.path for site in backbone.sites if site.role in TARGETS]
    model: Any = get_peft_model(backbone.module, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths))
    head = nn.Linear(backbone.width, CLASSES).to(where)
    optimizer = torch.optim.Adam([*(p for p in model.parameters() if p.requires_grad), *head.parameters()], lr=1e-3)
    pixels_bchw = batch.inputs["pixel_values"].to(dtype)
    if compiled:
        model.compile(dynamic=False)

    def step() -> None:
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        with torch.autocast(where.type, torch.bfloat16) if kind == "autocast" else nullcontext():
            features_bd: Tensor = model(pixel_values=pixels_bchw).last_hidden_state[:, 0].float()
        loss = F.cross_entropy(head(features_bd), batch.labels_b)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        torch.backends.cuda.matmul.allow_tf32 = False

    return step


Contender = Callable[[str, Batch], Work]
EVERYWHERE: dict[str, Contender] = {
    "floor, bf16": floor,
    "lamina finetune, bf16": partial(lamina, method="finetune"),
    "lamina inflora, bf16": partial(lamina, method="inflora"),
    "PEFT, fp32": partial(peft, kind="fp32"),
    "PEFT, autocast to bf16": partial(peft, kind="autocast"),
    "PEFT, bf16 weights": partial(peft, kind="bf16"),
}
ON_A_GPU: dict[str, Contender] = {
    "lamina finetune, bf16, CUDA graph": partial(lamina, method="finetune", graphed=True),
    "lamina inflora, bf16, CUDA graph": partial(lamina, method="inflora", graphed=True),
    "PEFT, TF32": partial(peft, kind="tf32"),
    "PEFT, bf16 weights, torch.compile": partial(peft, kind="bf16", compiled=True),
}


def measure(
    shape: str, size: int, names: Sequence[str], where: torch.device, rounds: int, steps: int
) -> dict[str, Any]:
    on_gpu = where.type == "cuda"
    wait: Work = torch.cuda.synchronize if on_gpu else lambda: None
    pixels_bchw = torch.randn(size, 3, PIXELS, PIXELS).to(where)
    batch = Batch(inputs={"pixel_values": pixels_bchw}, labels_b=torch.arange(size, device=where) % CLASSES)
    works: dict[str, Work] = {}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save(shape, folder)
        for name in names:
            before = torch.cuda.memory_allocated() if on_gpu else 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            works[name] = (EVERYWHERE | ON_A_GPU)[name](folder, batch)
            for _ in range(3):
                works[name]()
            wait()
            found[name] = {"warm_up_seconds": round(time.perf_counter() - started, 2)}
            if on_gpu:
                found[name]["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6)
            print(f"{shape}, batch {size}: {name} is ready", file=sys.stderr, flush=True)
    with FlopCounterMode(display=False) as counter:
        works["floor, bf16"]()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            wait()
            started = time.perf_counter()
            for _ in range(steps):
                work()
            wait()
            seconds[name].append((time.perf_counter() - started) / steps)
    for name, values in seconds.items():
        found[name]["step_ms"] = [round(1000 * value, 3) for value in quartiles(values)]
        found[name]["images_per_second"] = round(size / statistics.median(values), 1)
    whole = {"shape": shape, "batch": size, "operations_per_step": counter.get_total_flops(), "steps": found}
    print(json.dumps(whole), file=sys.stderr, flush=True)
    return whole


def peak_rate(where: torch.device, width: int) -> float:
    """Returns the operations per second of a (width, width) bf16 matrix product: the median of ten."""
    a, b = (torch.randn(width, width, device=where).to(torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        started = time.perf_counter()
        torch.mm(a, b)
        if where.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * width**3 / statistics.median(seconds[3:])


def bench(
    where: torch.device, names: Sequence[str], shapes: Sequence[str], batches: Sequence[int], rounds: int, steps: int
) -> dict[str, Any]:
    device.prepare("cuda" if where.type == "cuda" else "cpu")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "device": where.type,
        "gpu": torch.cuda.get_device_name() if where.type == "cuda" else None,
        "peak_tflops": round(peak_rate(where, 8192 if where.type == "cuda" else 2048) / 1e12, 2),
        "sizes": [measure(shape, size, names, where, rounds, steps) for shape in shapes for size in batches],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="steps in one round")
    parser.add_argument("--without", nargs="+", default=[], help="contenders to leave out")
    options = parser.parse_args()
    where = torch.device(options.device)
    names = [name for name in EVERYWHERE | (ON_A_GPU if where.type == "cuda" else {}) if name not in options.without]
    with LEARNING:
        found = bench(where, names, options.shapes, options.batches, options.rounds, options.steps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
