"""The floor of this machine: the time of a training step of a frozen backbone that learns nothing.

    python benchmarks/floor.py --pixels 32 --batch 64 --rounds 9
    python benchmarks/floor.py --compile              also with torch.compile, and the time of compiling

A floor step is a forward and a backward of the gradients of inputs, from the features down to the outputs of the first layers
that would be adapted: no adapter, no head, no optimiser, and batches that are ready. A method that trains these layers cannot
take less, unless it stores activations. Steps with the whole batch and with a split batch (`lamina/speed/split_batch.py`)
alternate. As in a run of lamina, freed memory is kept and bf16 blocks are fused (`lamina/speed/fused_block.py`); with PyTorch
alone the floor would be higher. The last line is JSON: milliseconds per image, median and quartiles. What training adapters of
a high rank adds is timed by `Floor.products`, for `run.py`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lamina import backbones
from lamina.backbones import Backbone
from lamina.speed import keeping_memory, precision
from lamina.speed.attention import use_plain_attention
from lamina.speed.fused_block import fuse
from lamina.speed.split_batch import Workers


class Floor:
    """Steps of a backbone that learns nothing. targets: roles that would be adapted, in every block. fused: whether bf16 blocks
    on a CPU are."""

    def __init__(self, backbone: Backbone, targets: Sequence[str], dtype: torch.dtype, *, fused: bool = True) -> None:
        self.backbone, self.dtype = backbone, dtype
        backbone.cast(dtype)
        if dtype == torch.bfloat16 and next(backbone.module.parameters()).device.type == "cpu":
            use_plain_attention(backbone.module)
            for path in backbone.stages[1:] if backbone.fusible and fused else ():
                fuse(backbone.module.get_submodule(path))
        self.tokens = 0
        """Of an image, once a step was made."""
        self.shapes = [
            backbone.module.get_parameter(f"{site.path}.weight").shape
            for site in backbone.sites
            if site.role in targets
        ]
        for site in backbone.sites:
            if site.block == 0 and site.role in targets:
                backbone.module.get_submodule(site.path).register_forward_hook(self._differentiate)
        self.ways: dict[str, Callable[[Tensor], object]] = {"whole": self.step}
        if torch.get_num_threads() % 2 == 0:
            workers = Workers()
            self.ways["split"] = lambda pixels_bchw: workers.both(self.step, pixels_bchw.chunk(2))

    def step(self, pixels_bchw: Tensor) -> None:
        features_bd = self.backbone.features({"pixel_values": pixels_bchw.to(self.dtype)})
        features_bd.sum().backward()  # type: ignore[no-untyped-call]

    def _differentiate(self, _: nn.Module, __: object, output: Tensor) -> Tensor:
        self.tokens = output.shape[-2]
        return output.requires_grad_()

    def products(self, images: int) -> float:
        """Returns the seconds per image of one product of gradients and inputs for every adapted weight: its gradient, from
        which those of the factors follow. With a small rank, thin products with the factors take fewer operations."""
        n = images * self.tokens
        pairs = {shape: [torch.randn(n, d).to(self.dtype) for d in shape] for shape in self.shapes}
        started = time.perf_counter()
        for shape in self.shapes:
            grad_no, x_ni = pairs[shape]
            grad_no.T @ x_ni
        return (time.perf_counter() - started) / images

    def seconds_per_image(self, pixels_bchw: Tensor, steps: int, way: str = "whole") -> float:
        started = time.perf_counter()
        for _ in range(steps):
            self.ways[way](pixels_bchw)
        return (time.perf_counter() - started) / (steps * len(pixels_bchw))


def quartiles(values: Sequence[float]) -> list[float]:
    """Returns lower quartile, median and upper quartile; a single value three times."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="nano")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--targets", nargs="+", default=["k", "v"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="steps in one round")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, in alternating rounds")
    options = parser.parse_args()
    with keeping_memory():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    pixels_bchw = torch.randn(options.batch, 3, options.pixels, options.pixels)
    name = precision.resolve(options.precision, backbones.load(options.backbone).width)
    floors: dict[str, Floor] = {}
    for kind in ("eager", "compiled") if options.compile else ("eager",):
        backbone = backbones.load(options.backbone, image_size=options.pixels)
        floors[kind] = Floor(backbone, options.targets, precision.DTYPES[name], fused=kind == "eager")
        if kind == "compiled":
            backbone.module.compile()
        started = time.perf_counter()
        floors[kind].seconds_per_image(pixels_bchw, 2)
        warming_up = time.perf_counter() - started
    contenders = [("eager", way) for way in floors["eager"].ways] + [(kind, "whole") for kind in [*floors][1:]]
    rounds: dict[tuple[str, str], list[float]] = {contender: [] for contender in contenders}
    for _ in range(options.rounds):
        for kind, way in contenders:
            rounds[kind, way].append(1000 * floors[kind].seconds_per_image(pixels_bchw, options.steps, way))
    found = {contender: [round(float(x), 3) for x in quartiles(values)] for contender, values in rounds.items()}
    line: dict[str, object] = {
        "precision": name,
        "threads": torch.get_num_threads(),
        "ms_per_image": found["eager", "whole"],
    }
    if ("eager", "split") in found:
        line |= {"split_ms_per_image": found["eager", "split"]}
    if options.compile:
        line |= {"compiled_ms_per_image": found["compiled", "whole"], "compile_seconds": round(warming_up, 1)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
