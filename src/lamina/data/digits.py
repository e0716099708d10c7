"""The demo's data: scikit-learn's 1,797 handwritten digits of 8 by 8 pixels, which need no download."""

import numpy as np

from lamina.data.arrays import ArrayItems
from lamina.data.records import Source, build
from lamina.errors import DataError


def open_digits(test_fraction: float = 0.2) -> Source:
    """Ten classes of grey images (8, 8) uint8, with a stratified test split.

    Raises DataError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the dataset `digits` comes with scikit-learn, which is not installed. Run: pip install 'lamina[demo]'"
        ) from None
    digits = load_digits()
    # 0..16 becomes 0..255.
    images_n88 = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return build(
        kind="image",
        name="digits",
        items=ArrayItems("digits", images_n88),
        labels_n=np.asarray(digits.target).astype(np.int64),
        class_names=tuple(str(name) for name in digits.target_names),
        splits_n=None,
        contents=(image.tobytes() for image in images_n88),
        test_fraction=test_fraction,
        layout="handwritten digits of scikit-learn",
    )
