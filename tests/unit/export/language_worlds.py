"""Finished runs of tiny language models, of any family and method, on two tasks."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.instructions import make_tokenizer
from tests.models import FEW
from tests.tiny import scatter
from tests.unit.backbones.languages import LANGUAGE, LANGUAGES
from torch import nn

from lamina import runs

SIZES = {"vocab_size": 320, "max_position_embeddings": 512, "bos_token_id": 3, "eos_token_id": 1}
TASKS = {"reviews": ("film", "joy", "bore"), "towns": ("What is the capital of France?", "Paris", "Madrid")}


def base(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, vocabulary: int = 320, **settings: Any
) -> Path:
    """A tiny model of a family with a tokenizer, in a folder."""
    row = LANGUAGES[name]
    config = getattr(transformers, row.config)(**LANGUAGE | dict(row.settings) | SIZES | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        raw: nn.Module = scatter(getattr(transformers, row.model)(config), 0.7).eval()
    raw.to(dtype).save_pretrained(folder)
    return make_tokenizer(folder, vocabulary=vocabulary)


def instructions(folder: Path, count: int = 12) -> Path:
    """Two tasks, a file each: one with options, one with free text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (what, *words) in TASKS.items():
        records = [
            {
                "prompt": f"{name} {k}: {what}\nAnswer:",
                "completion": words[k % 2],
                "options": words if name == "reviews" else None,
                "domain": name,
                "split": "train" if 3 * k < 2 * count else "test",
            }
            for k in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def run_of(
    folder: Path, name: str = "llama", method: str = "finetune", *, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """A finished run of a tiny model. settings: of the run, with `__` for the dots of its keys."""
    made = base(name, folder / "base", dtype=dtype)
    given = {
        "backbone.name": str(made),
        "data.source": str(instructions(folder / "data")),
        "data.max_length": 64,
        "method": method,
        "threads": 1,
        "precision": "fp32",
        "training.lr": 0.02,
        "training.batch_size": 4,
        "evaluation.max_new_tokens": 4,
        "evaluation.per_task": 4,
    }
    given |= FEW.get(method, {}) | {key.replace("__", "."): value for key, value in settings.items()}
    runs.create(runs.load_config(None, list(given.items())), folder / "run")
    return folder / "run"
