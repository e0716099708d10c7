"""Tiny-ImageNet's training images as arrays: x.npy (n, 64, 64, 3) uint8, y.npy (n,) int64, wnids.txt.

Usage: python prepare.py PATH/tiny-imagenet-200 FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main(root: Path, out: Path) -> None:
    wnids = sorted(folder.name for folder in (root / "train").iterdir())
    files = [(f, k) for k, w in enumerate(wnids) for f in sorted((root / "train" / w / "images").glob("*.JPEG"))]
    pixels_nhwc = np.empty((len(files), 64, 64, 3), np.uint8)
    for i, (file, _) in enumerate(files):
        with Image.open(file) as image:
            pixels_nhwc[i] = np.asarray(image.convert("RGB"))
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "x.npy", pixels_nhwc)
    np.save(out / "y.npy", np.array([k for _, k in files], np.int64))
    (out / "wnids.txt").write_text("\n".join(wnids))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
