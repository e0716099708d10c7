"""The floor of learning on this machine: what a frozen backbone costs when it learns nothing.

    python benchmarks/floor.py --pixels 32 --batch 64 --rounds 9
    python benchmarks/floor.py --compile              the same beside it through torch.compile, and what compiling took

A floor step is a forward and the backward of gradients with regard to inputs, from the features down to the outputs of the
first layers that would be adapted: no adapter, no head, no optimiser, and batches that are ready. No learner of these layers
can do with less, unless it stores activations. It is taken with the batch in one piece and in two halves side by side, as
lamina does in float32 (`lamina/halves.py`), in turn. Memory is kept from step to step, and in bf16 each block is computed as
one (`lamina/block.py`), both as in a run of lamina: as PyTorch does these things, the floor would be higher. The last line is
JSON: milliseconds per image, median and quartiles.
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
from lamina.engine import device
from lamina.speed import precision
from lamina.speed.fused_block import fuse
from lamina.speed.split_batch import Halves


class Floor:
    """Steps of a backbone that learns nothing. targets: roles that would be adapted, in every block."""

    def __init__(self, backbone: Backbone, targets: Sequence[str], dtype: torch.dtype) -> None:
        self.backbone, self.dtype = backbone, dtype
        backbone.cast(dtype)
        for site in backbone.sites:
            if site.block == 0 and site.role in targets:
                backbone.module.get_submodule(site.path).register_forward_hook(_differentiate)
        self.ways: dict[str, Callable[[Tensor], object]] = {"in one piece": self.step}
        if torch.get_num_threads() % 2 == 0:
            halves = Halves()
            self.ways["in halves"] = lambda pixels_bchw: halves.both(self.step, pixels_bchw.chunk(2))

    def step(self, pixels_bchw: Tensor) -> None:
        features_bd = self.backbone.features({"pixel_values": pixels_bchw.to(self.dtype)})
        features_bd.sum().backward()

    def seconds_per_image(self, pixels_bchw: Tensor, steps: int, way: str = "in one piece") -> float:
        started = time.perf_counter()
        for _ in range(steps):
            self.ways[way](pixels_bchw)
        return (time.perf_counter() - started) / (steps * len(pixels_bchw))


def _differentiate(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return output.requires_grad_()


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; of one value, three times that."""
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
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, round by round in turn")
    options = parser.parse_args()
    with device.keeping_memory():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    pixels_bchw = torch.randn(options.batch, 3, options.pixels, options.pixels)
    name = precision.resolve(options.precision, backbones.load(options.backbone).width)
    floors: dict[str, Floor] = {}
    for kind in ("eager", "compiled") if options.compile else ("eager",):
        backbone = backbones.load(options.backbone, image_size=options.pixels)
        floors[kind] = Floor(backbone, options.targets, precision.DTYPES[name])
        if kind == "compiled":
            # The compiler makes its own of transformers' blocks.
            for block in backbone.stages[1:] if backbone.fusible else ():
                fuse(backbone.module.get_submodule(block), False)
            backbone.module.compile()
        started = time.perf_counter()
        floors[kind].seconds_per_image(pixels_bchw, 2)
        warming_up = time.perf_counter() - started
    contenders = [("eager", way) for way in floors["eager"].ways] + [(kind, "in one piece") for kind in [*floors][1:]]
    rounds: dict[tuple[str, str], list[float]] = {contender: [] for contender in contenders}
    for _ in range(options.rounds):
        for kind, way in contenders:
            rounds[kind, way].append(1000 * floors[kind].seconds_per_image(pixels_bchw, options.steps, way))
    found = {contender: [round(x, 3) for x in quartiles(values)] for contender, values in rounds.items()}
    line = {"precision": name, "threads": torch.get_num_threads(), "ms_per_image": found["eager", "in one piece"]}
    if ("eager", "in halves") in found:
        line |= {"in_halves_ms_per_image": found["eager", "in halves"]}
    if options.compile:
        line |= {"compiled_ms_per_image": found["compiled", "in one piece"], "compile_seconds": round(warming_up, 1)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
