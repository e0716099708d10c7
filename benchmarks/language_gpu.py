"""Training steps of causal language models on one GPU: lamina, PEFT, and PEFT with torch.compile. At most eight minutes.

    python benchmarks/language_gpu.py --out language-gpu.json           needs runs/smollm2 (`make runs/smollm2`)
    python benchmarks/language_gpu.py --smoke --out smoke.json          on a CPU, with a tiny model: to see that it runs

Models: SmolLM2-135M, and one of the shape of Llama 3.2 1B with random weights. bf16, batch 16 of 512 tokens, the last 256 of
them to be learnt; adapters of rank 8 and 64 on q and v; AdamW. Each contender is loaded, warmed up, timed and freed before the
next one; lamina is timed twice in every group, so that a change of the speed of the GPU is seen. A contender that could begin
only after the time is over is left out, and named in `left_out`. The file is written after every contender. With --smoke the
losses of all contenders are compared as well.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import machine
from language_rivals import Floor, Lamina, Peft, long_batch

from lamina.engine import device
from lamina.types import Batch

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "Llama 1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
RANKS, BATCH = (8, 64), (16, 512, 256)
SMOKE_RANKS, SMOKE_BATCH = (2, 4), (2, 16, 8)
Make = Callable[..., Any]
CONTENDERS: dict[str, Make] = {
    "lamina": Lamina,
    "floor": lambda folder, dtype, rank, device: Floor(folder, dtype, device=device),  # noqa: ARG005
    "PEFT": Peft,
    "PEFT, needed logits": partial(Peft, logits="needed"),
    "lamina, again": Lamina,
}
COMPILED: dict[str, Make] = {
    "PEFT, torch.compile": partial(Peft, compiled=True),
    "PEFT, needed logits, torch.compile": partial(Peft, logits="needed", compiled=True),
}
"""Last, since compiling takes a minute or more."""


def save(shape: str, folder: Path) -> Path:
    """Saves a Llama of this shape with random weights in bf16, and returns its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, max_position_embeddings=4096, **SHAPES[shape]))
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    return folder


def timed(make: Callable[[], Any], batch: Batch, rounds: int, steps: int) -> dict[str, Any]:
    """Returns seconds of loading and of warming up, milliseconds of a step (quartiles), tokens a second, and peak memory."""
    on_gpu = batch.labels_b.is_cuda
    wait: Callable[[], object] = torch.cuda.synchronize if on_gpu else lambda: None
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with closing(make()) as made:
        loaded = time.perf_counter()
        first = made.step(batch)
        for _ in range(2):
            made.step(batch)
        wait()
        warm = time.perf_counter()
        seconds = []
        for _ in range(rounds):
            begun = time.perf_counter()
            for _ in range(steps):
                made.step(batch)
            wait()
            seconds.append((time.perf_counter() - begun) / steps)
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "first_loss": first,
        "load_seconds": round(loaded - started, 2),
        "warm_up_seconds": round(warm - loaded, 2),
        "step_ms": [round(1000 * value, 3) for value in quartiles],
        "tokens_per_second": round(batch.inputs["input_ids"].numel() / quartiles[1]),
        "peak_mb": round(torch.cuda.max_memory_allocated() / 1e6) if on_gpu else None,
    }


def measure(
    folders: dict[str, Path], where: str, smoke: bool, limit: float, compiled: bool, write: Callable[[Any], None]
) -> dict[str, Any]:
    started = time.perf_counter()
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "gpu": torch.cuda.get_device_name() if where == "cuda" else None,
        "batch": SMOKE_BATCH if smoke else BATCH,
        "groups": [],
        "left_out": [],
    }
    ranks, shape = (SMOKE_RANKS, SMOKE_BATCH) if smoke else (RANKS, BATCH)
    rounds, steps = (2, 1) if smoke else (7, 3)
    groups: dict[tuple[str, int], dict[str, Any]] = {
        (model, rank): {"model": model, "rank": rank, "contenders": {}} for model in folders for rank in ranks
    }
    found["groups"] = [*groups.values()]
    # What compiles comes last. Half of the limit is kept for it, and none begins that could take longer than what is left.
    for contenders in (CONTENDERS, COMPILED) if compiled else (CONTENDERS,):
        for (model, rank), group in groups.items():
            vocabulary = json.loads((folders[model] / "config.json").read_text(encoding="utf-8"))["vocab_size"]
            batch = long_batch(*shape, vocabulary, where)
            for name, make in contenders.items():
                longest = 0.0 if contenders is CONTENDERS else 90.0
                if time.perf_counter() - started + longest > limit:
                    found["left_out"].append(f"{model}, rank {rank}: {name}")
                    continue
                try:
                    group["contenders"][name] = timed(
                        partial(make, folders[model], torch.bfloat16, rank, device=where), batch, rounds, steps
                    )
                except torch.OutOfMemoryError:
                    group["contenders"][name] = {"error": "out of memory"}
                finally:
                    torch._dynamo.reset()
                say(f"{model}, rank {rank}: {name}: {json.dumps(group['contenders'][name])}")
                write(found)
    found["seconds"] = round(time.perf_counter() - started, 1)
    write(found)
    return found


def check_losses(found: dict[str, Any]) -> None:
    """Raises AssertionError where the first losses of contenders with adapters differ by more than bf16 explains."""
    for group in found["groups"]:
        losses = {name: of["first_loss"] for name, of in group["contenders"].items() if name != "floor"}
        assert max(losses.values()) - min(losses.values()) < 0.02 * min(losses.values()), losses


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU if there is no GPU")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--seconds", type=float, default=450, help="after so many seconds nothing new begins")
    parser.add_argument("--without-compile", action="store_true")
    parser.add_argument("--smollm2", type=Path, default=ROOT / "runs" / "smollm2")
    options = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cpu" and not options.smoke:
        parser.error("there is no GPU; --smoke runs on a CPU")
    device.prepare("cuda" if where == "cuda" else "cpu")
    say(torch.cuda.get_device_name() if where == "cuda" else "no GPU")

    def write(found: Any) -> None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as name:
        shape = "tiny" if options.smoke else "Llama 1B"
        folders = {} if options.smoke else {"SmolLM2-135M": options.smollm2}
        folders[shape] = save(shape, Path(name))
        found = measure(folders, where, options.smoke, options.seconds, not options.without_compile, write)
    if options.smoke:
        check_losses(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
