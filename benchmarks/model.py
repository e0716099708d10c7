"""The cost of a model that keeps learning, relative to its parts. `make bench` runs it.

    python benchmarks/model.py            about three minutes; writes docs/results/records/model.json and the page
    python benchmarks/model.py --quick    smaller counts, records nothing
    python benchmarks/model.py --page     writes the page from the record

Four ratios, each within one process or one pair of processes on the same data:

    merged inference   features of a model with three tasks, relative to the bare backbone
    predict            `Model.predict` on image files, decoding included, and `transformers.pipeline` with the same weights
    first result       seconds from `lamina predict` to its output, imports included, and the share of importing lamina itself
    learn              `Model.learn` of the last task, relative to that task within `runs.create` over the same stream
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import machine
from PIL import Image

from lamina import backbones, runs
from lamina.model import Model
from lamina.types import Batch

ROOT = Path(__file__).resolve().parents[1]
PAGE, RECORD = ROOT / "docs" / "results" / "model.md", ROOT / "docs" / "results" / "records" / "model.json"
CLASSES, TASKS = 9, 3


def images(folder: Path, per_class: int) -> Path:
    """Photographs are large smooth areas and edges: noise at 8 px, enlarged to 200 px and written as JPEG."""
    draws = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        colours = draws.integers(0, 256, (8, 8, 3))
        for number in range(per_class):
            pixels = np.clip(colours + draws.normal(0, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
            image = Image.fromarray(pixels).resize((200, 200), Image.Resampling.BICUBIC)
            image.save(folder / f"class{label}" / f"{number:04d}.jpg", quality=90)
    return folder


def settings(data: Path) -> dict[str, Any]:
    return {"method.name": "finetune", "data.source": str(data), "training.epochs": 5, "precision": "fp32"}


def learnt_in_a_run(folder: Path, data: Path, precision: str) -> tuple[Path, float]:
    """Returns a finished run, and the seconds of its last task: its begin, training, end and evaluation."""
    given = settings(data) | {"stream.tasks": TASKS, "precision": precision}
    out = folder / "run"
    starts: list[float] = []

    def watch(_: object, event: Any) -> None:
        if event.task == TASKS - 1 and not starts:
            starts.append(time.perf_counter())

    runs.create(runs.load_config(None, list(given.items())), out, watch)
    return out, time.perf_counter() - starts[0]


def learnt_alone(folder: Path, data: Path, precision: str) -> tuple[Model, float]:
    """Returns a model, and the seconds of `learn` for its last task."""
    config = settings(data)
    model = Model.create(
        folder / "model",
        method="finetune",
        settings={"training.epochs": config["training.epochs"], "precision": precision},
    )
    names = [f"class{label}" for label in range(CLASSES)]
    seconds = 0.0
    for task in range(TASKS):
        started = time.perf_counter()
        part = names[task * CLASSES // TASKS : (task + 1) * CLASSES // TASKS]
        model.learn(data, name=f"task-{task + 1:02d}", classes=part, force=True)
        seconds = time.perf_counter() - started
    return model, seconds


def merged_inference(model: Model, repeats: int) -> list[float]:
    """Returns ratios of the model's time for a batch to that of the bare backbone, taken in turns."""
    predictor = model.predictor()
    bare = backbones.load("nano")
    bare.cast(predictor.learner.dtype)
    pixels = torch.randn(64, 3, 64, 64)
    batch = Batch(inputs={"pixel_values": pixels}, labels_b=torch.zeros(64, dtype=torch.int64))
    inputs = {"pixel_values": pixels.to(predictor.learner.dtype)}

    def ours() -> None:
        predictor.learner.features(batch)

    def theirs() -> None:
        bare.features(inputs)

    with torch.no_grad():
        return paired(ours, theirs, repeats)


def paired(ours: Callable[[], None], theirs: Callable[[], None], repeats: int) -> list[float]:
    """Returns the ratios of the times of two pieces of work, measured one after the other, after a round of each."""
    ours()
    theirs()
    ratios = []
    for _ in range(repeats):
        started = time.perf_counter()
        ours()
        middle = time.perf_counter()
        theirs()
        ratios.append((middle - started) / (time.perf_counter() - middle))
    return ratios


def predict(model: Model, folder: Path, data: Path, count: int) -> dict[str, float]:
    """Returns images per second of `Model.predict` and of transformers' pipeline on the same files."""
    from transformers import pipeline

    from lamina.export import export_merged

    merged = folder / "merged"
    export_merged(model.path, merged)
    files = sorted(data.rglob("*.jpg"))
    files = [files[k % len(files)] for k in range(count)]
    other = pipeline("image-classification", model=str(merged), batch_size=64, use_fast=True)
    model.predict(files[:64])
    other([str(file) for file in files[:64]])
    started = time.perf_counter()
    model.predict(files)
    middle = time.perf_counter()
    other([str(file) for file in files])
    return {"lamina": count / (middle - started), "transformers": count / (time.perf_counter() - middle)}


def first_result(model: Model, file: Path, repeats: int) -> dict[str, float]:
    """Returns the least seconds of a whole `lamina predict`, and of importing lamina after its dependencies."""
    command = [sys.executable, "-m", "lamina.cli", "predict", str(model.path), str(file)]
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    own = subprocess.run([sys.executable, "-c", OWN], check=True, capture_output=True, text=True).stdout
    return {"seconds": min(times), "lamina_imports": float(own)}


OWN = """
import sys, time
import lamina.model
names = [name for name in sys.modules if name.split(".")[0] == "lamina"]
for name in names:
    del sys.modules[name]
started = time.perf_counter()
import lamina.model
print(time.perf_counter() - started)
"""


def measure(quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        data = images(folder / "data", 30 if quick else 120)
        learnt_alone(folder / "warm", data, "fp32")  # images are decoded, and libraries loaded
        _, within = learnt_in_a_run(folder, data, "fp32")
        model, alone = learnt_alone(folder, data, "fp32")
        return {
            "machine": machine(),
            "merged_inference": statistics.median(merged_inference(model, 5 if quick else 30)),
            "predict": predict(model, folder, data, 100 if quick else 1000),
            "first_result": first_result(model, next(data.rglob("*.jpg")), 2 if quick else 5),
            "learn": {"in a run": within, "alone": alone, "ratio": alone / within},
        }


def page(found: dict[str, Any]) -> str:
    predict, first, learn = found["predict"], found["first_result"], found["learn"]
    rows = [
        (
            f"features of a model with {TASKS} tasks, relative to the bare backbone (median of pairs)",
            f"{found['merged_inference']:.3f}",
        ),
        ("`Model.predict` on image files, decoding included", f"{predict['lamina']:.0f} images/s"),
        (
            "`transformers.pipeline`, exported weights, same files, batches of 64",
            f"{predict['transformers']:.0f} images/s",
        ),
        ("`lamina predict` of one file, the whole process", f"{first['seconds']:.2f} s"),
        ("of it, importing lamina itself", f"{first['lamina_imports']:.2f} s"),
        (
            "`learn` of one task, relative to the same task within a run",
            f"{learn['ratio']:.3f} ({learn['alone']:.1f} s, {learn['in a run']:.1f} s)",
        ),
    ]
    where = f"{found['machine']['cpu']}, {found['machine']['cores']} cores"
    lines = [
        "# A model that keeps learning: its cost",
        "",
        f"`python benchmarks/model.py`, on {where}. Ratios are taken within one run.",
        "",
    ]
    return (
        "\n".join([*lines, "| | measured |", "|---|---:|", *(f"| {what} | {value} |" for what, value in rows)]) + "\n"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quick = os.environ.get("QUICK", "") not in ("", "0")
    arguments.add_argument("--quick", action="store_true", default=quick)
    arguments.add_argument("--page", action="store_true")
    given = arguments.parse_args()
    found = json.loads(RECORD.read_text()) if given.page else measure(given.quick)
    if not given.quick:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(page(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
