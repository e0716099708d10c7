"""Convert Fashion-MNIST, as Debian packages it, into a Parquet file that lamina reads.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_mnist.py runs/fashion-mnist

The images stay as they are: 28 x 28 pixels, grey.
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PARTS = (("train", "train", 60_000), ("test", "t10k", 10_000))


def numbers(file: Path, header: int) -> np.ndarray:
    """Returns the bytes of a file in IDX format (http://yann.lecun.com/exdb/mnist) after its header."""
    if not file.is_file():
        raise SystemExit(f"there is no {file}: apt-get install dataset-fashion-mnist")
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


def png(pixels_hw: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_hw).save(file, "png")
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to write to")
    target = parser.parse_args().target
    tables = {}
    for split, name, count in PARTS:
        images = numbers(FOLDER / f"{name}-images-idx3-ubyte.gz", 16).reshape(count, 28, 28)
        labels = [CLASSES[label] for label in numbers(FOLDER / f"{name}-labels-idx1-ubyte.gz", 8)]
        columns = {"image": [png(pixels_hw) for pixels_hw in images], "label": labels, "split": [split] * count}
        tables[split] = pa.table(columns)
    target.mkdir(parents=True, exist_ok=True)
    for split, table in tables.items():
        pq.write_table(table, target / f"{split}.parquet")


if __name__ == "__main__":
    main()
