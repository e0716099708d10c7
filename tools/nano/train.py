"""Train the nano ViT on Tiny-ImageNet, with the teacher's logits, and write it in the Hugging Face layout.

The schedule is by wall clock, as a fraction of SECONDS: 32 px until 0.15, 48 px until 0.6, then 64 px. Writes
model.safetensors (the exponential moving average, fp16, keys of ViTModel) and head.safetensors (its 200-class head).

Usage: python train.py FOLDER SECONDS (FOLDER holds x.npy, y.npy and t.npy)

Shape letters: n images, b batch, c channels, h w pixels, t tokens, d width, k classes.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, PATCH, BLOCKS, GRID = 192, 3, 8, 9, 8
BATCH, PEAK_RATE, WARM_UP, DECAY = 256, 1.2e-3, 400, 0.05
HELD_OUT = 2000


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, 1e-6)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, 1e-6)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_btd: Tensor) -> Tensor:
        b, t, d = x_btd.shape
        q, k, v = self.qkv(self.norm1(x_btd)).view(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        x_btd = x_btd + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x_btd + self.fc2(F.gelu(self.fc1(self.norm2(x_btd))))


class NanoViT(nn.Module):
    """A plain ViT with two heads: 200 Tiny-ImageNet classes, and the teacher's 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, GRID**2 + 1, WIDTH) * 0.02)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.norm = nn.LayerNorm(WIDTH, 1e-6)
        self.head = nn.Linear(WIDTH, 200)
        self.teacher_head = nn.Linear(WIDTH, 1000)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def positions_for(self, grid: int) -> Tensor:
        """Position embedding (1, 1 + grid^2, d), interpolated where the grid is not the native one."""
        if grid == GRID:
            return self.positions
        native_1dhw = self.positions[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        other_1dhw = F.interpolate(native_1dhw, size=(grid, grid), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], other_1dhw.permute(0, 2, 3, 1).reshape(1, grid**2, WIDTH)], 1)

    def forward(self, pixels_bchw: Tensor) -> tuple[Tensor, Tensor]:
        patches_btd = self.patches(pixels_bchw).flatten(2).transpose(1, 2)
        x_btd = torch.cat([self.cls.expand(len(patches_btd), -1, -1), patches_btd], 1)
        x_btd = x_btd + self.positions_for(pixels_bchw.shape[-1] // PATCH)
        for block in self.blocks:
            x_btd = block(x_btd)
        features_bd = self.norm(x_btd)[:, 0]
        return self.head(features_bd), self.teacher_head(features_bd)


def normalise(pixels_bhwc: Tensor) -> Tensor:
    return ((pixels_bhwc.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)


def random_crop(pixels_bchw: Tensor, size: int, least: float = 0.45) -> Tensor:
    """Random resized crop (area from `least` to 1) and horizontal flip, for the whole batch by grid sampling."""
    b = len(pixels_bchw)
    side_b = (torch.rand(b) * (1 - least) + least).sqrt()
    aspect_b = torch.exp((torch.rand(b) - 0.5) * 0.5)
    wide_b, high_b = (side_b * aspect_b.sqrt()).clamp(max=1), (side_b / aspect_b.sqrt()).clamp(max=1)
    right_b, down_b = (torch.rand(b) * 2 - 1) * (1 - wide_b), (torch.rand(b) * 2 - 1) * (1 - high_b)
    flip_b = torch.where(torch.rand(b) < 0.5, -1.0, 1.0)
    affine_b23 = torch.zeros(b, 2, 3)
    affine_b23[:, 0, 0], affine_b23[:, 0, 2] = wide_b * flip_b, right_b
    affine_b23[:, 1, 1], affine_b23[:, 1, 2] = high_b, down_b
    grid = F.affine_grid(affine_b23, [b, 3, size, size], align_corners=False)
    return F.grid_sample(pixels_bchw, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def batches(rows_n: Tensor) -> Iterator[Tensor]:
    while True:
        yield from rows_n[torch.randperm(len(rows_n))].split(BATCH)


def loss_of(classes_bk: Tensor, taught_bk: Tensor, labels_b: Tensor, teacher_bk: Tensor) -> Tensor:
    """0.3 cross-entropy with label smoothing 0.1, and 0.7 KL divergence to the teacher."""
    own = F.cross_entropy(classes_bk, labels_b, label_smoothing=0.1)
    taught, teacher = F.log_softmax(taught_bk, 1), F.log_softmax(teacher_bk.float(), 1)
    return 0.3 * own + 0.7 * F.kl_div(taught, teacher, log_target=True, reduction="batchmean")


def accuracy(average: dict[str, Tensor], pixels_nhwc: Tensor, labels_n: Tensor) -> float:
    """Top-1 accuracy at 64 px of the averaged weights."""
    model = NanoViT()
    model.load_state_dict(average)
    model.eval()
    right = 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for pixels, labels in zip(pixels_nhwc.split(500), labels_n.split(500), strict=True):
            right += int((model(normalise(pixels))[0].argmax(1) == labels).sum())
    return right / len(labels_n)


def to_hugging_face(average: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors in fp16, under the long-standing names of ViTModel; qkv is cut in three."""
    top = {
        "cls": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "patches.weight": "embeddings.patch_embeddings.projection.weight",
        "patches.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    parts = {
        "norm1": "layernorm_before",
        "out": "attention.output.dense",
        "norm2": "layernorm_after",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    }
    renamed = {}
    for name, tensor in average.items():
        if name in top:
            renamed[top[name]] = tensor
        elif name.startswith("blocks."):
            _, block, part, end = name.split(".")
            if part == "qkv":
                for piece, role in zip(tensor.chunk(3), ("query", "key", "value"), strict=True):
                    renamed[f"encoder.layer.{block}.attention.attention.{role}.{end}"] = piece
            else:
                renamed[f"encoder.layer.{block}.{parts[part]}.{end}"] = tensor
    return {name: tensor.half().contiguous() for name, tensor in renamed.items()}


def main(folder: Path, seconds: float) -> None:
    torch.manual_seed(0)
    pixels_nhwc, labels_n, teacher_nk = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in "xyt")
    shuffled = torch.randperm(len(pixels_nhwc), generator=torch.Generator().manual_seed(1))
    held_out, train = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    model = NanoViT()
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    named = [(p.ndim > 1 and name not in ("positions", "cls"), p) for name, p in model.named_parameters()]
    groups = [
        {"params": [p for decayed, p in named if decayed], "weight_decay": DECAY},
        {"params": [p for decayed, p in named if not decayed], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    order, start, step, running = batches(train), time.time(), 0, 0.0
    while (progress := (time.time() - start) / seconds) < 1:
        size = 32 if progress < 0.15 else 48 if progress < 0.6 else 64
        cosine = 0.5 * (1 + math.cos(math.pi * progress)) * 0.99 + 0.01
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * min(1, step / WARM_UP) * cosine
        rows_b = next(order)
        with torch.autocast("cpu", torch.bfloat16):
            classes_bk, taught_bk = model(random_crop(normalise(pixels_nhwc[rows_b]), size))
        loss = loss_of(classes_bk.float(), taught_bk.float(), labels_n[rows_b], teacher_nk[rows_b])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        keep = min(0.9995, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1 - keep)
        running = 0.98 * running + 0.02 * loss.item()
        if step % 200 == 0:
            print(
                f"{time.time() - start:.0f} s  {size} px  step {step}  loss {running / (1 - 0.98**step):.3f}",
                flush=True,
            )
    print(f"held-out accuracy {accuracy(average, pixels_nhwc[held_out], labels_n[held_out]):.4f} after {step} steps")
    save_file(to_hugging_face(average), folder / "model.safetensors", metadata={"format": "pt"})
    save_file({name: average[f"head.{name}"] for name in ("weight", "bias")}, folder / "head.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
