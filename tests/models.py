"""Small models on disk for tests: a random ViT, images in Parquet, and what is in a model's directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tests.tiny import raw_vit

from lamina.model import Model

SMALL: dict[str, Any] = {
    "backbone.image_size": 16,
    "training.epochs": 2,
    "training.batch_size": 8,
    "training.lr": 0.02,
    "evaluation.batch_size": 8,
    "precision": "fp32",
    "device": "cpu",
    "threads": 1,
}
"""Settings of a model that learns a task in a fraction of a second."""
FEW: dict[str, dict[str, Any]] = {
    "ranpac": {"consolidation.random_features": 64},
    "lamina": {"method.random_features": 64},
}
"""The same for methods that solve linear systems in thousands of random features."""
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")


def backbone(folder: Path) -> Path:
    """A random ViT of 16 px."""
    raw_vit(blocks=2).save_pretrained(folder)
    return folder


def images(
    file: Path,
    classes: tuple[str, ...] = CLASSES,
    *,
    train: int = 8,
    test: int = 4,
    seed: int = 0,
    noise: float = 25,
    swapped: bool = False,
) -> Path:
    """A Parquet file of images whose colours tell their class. swapped: every label is that of the next class."""
    draws = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"image": [], "label": [], "split": []}
    for label in classes:
        colour = np.random.default_rng(CLASSES.index(label)).integers(0, 256, (4, 4, 3))
        for number in range(train + test):
            pixels = np.kron(colour, np.ones((5, 5, 1))) + draws.normal(0, noise, (20, 20, 3))
            shown = classes[(classes.index(label) + 1) % len(classes)] if swapped else label
            rows["image"].append(png(np.clip(pixels, 0, 255).astype(np.uint8)))
            rows["label"].append(shown)
            rows["split"].append("train" if number < train else "test")
    pq.write_table(pa.table(rows), file)
    return file


def png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def small(
    path: Path, base: Path, method: str = "finetune", settings: Mapping[str, Any] | None = None, **more: Any
) -> Model:
    """A model that has learnt nothing."""
    return Model.create(
        path, backbone=str(base), method=method, settings={**SMALL, **FEW.get(method, {}), **(settings or {})}, **more
    )


def content(path: Path) -> dict[str, bytes]:
    """All that counts of a model's directory: what a version consists of, and model.json. Not the log, the lock, or work."""
    files = [path / "model.json", *path.glob("tasks/*/*")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if not file.parent.name.startswith(".")}
