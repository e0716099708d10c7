"""Changes to a checkpoint in a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Lets `edit` change the stored tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    edit(tensors)
    save_file(tensors, file)


def configure(folder: Path, **settings: Any) -> None:
    """Changes config.json; a setting of None is taken out."""
    file = folder / "config.json"
    changed = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
