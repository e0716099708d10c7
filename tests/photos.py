"""Folders of real photographs, as a user would have them: from the groceries in ../shared/data."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

SOURCE = Path(__file__).resolve().parents[2] / "shared" / "data" / "grocery81"
FIRST = ("Banana", "Kiwi", "Lemon", "Mango")
SECOND = ("Avocado", "Pineapple", "Lime", "Orange")
WRONG = {"Banana": "Kiwi", "Kiwi": "Lemon", "Lemon": "Mango", "Mango": "Banana"}
EACH = 24
"""Photographs of a class in a month."""


def months(out: Path) -> None:
    """Make 2026-09 to 2026-12 (the last with wrong labels), 2027-01, and new-photos."""
    photos = {split: by_class(split) for split in ("train", "test")}
    for month, names in (("2026-09", FIRST), ("2026-10", SECOND)):
        for name in names:
            put(out / month / name, photos["train"][name][:EACH])
    for name in FIRST:
        put(out / "2026-11" / name, photos["test"][name][:EACH])
        put(out / "2026-12" / name, photos["test"][WRONG[name]][-EACH:])
    put(out / "2026-11" / "Watermelon", photos["train"]["Watermelon"][:EACH])
    for name in ("Plum", "Nectarine"):
        put(out / "2027-01" / name, photos["train"][name][:EACH])
    put(out / "new-photos", [photos["test"][name][EACH] for name in ("Banana", "Avocado", "Pineapple", "Watermelon")])


def by_class(split: str) -> dict[str, list[bytes]]:
    names = json.loads((SOURCE / "README.json").read_text())["class_names"]
    table = pq.read_table(SOURCE / f"{split}-00-of-01.parquet")
    found: dict[str, list[bytes]] = {name: [] for name in names}
    for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
        found[names[label]].append(image["bytes"] if isinstance(image, dict) else image)
    return found


def put(folder: Path, images: list[bytes]) -> None:
    folder.mkdir(parents=True)
    for number, content in enumerate(images):
        Image.open(io.BytesIO(content)).convert("RGB").save(folder / f"{number:03d}.png")
