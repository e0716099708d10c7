"""Items that are in memory already."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.data.records import Payload, Source, build, domain_ids, label_ids, split_ids
from lamina.errors import DataError
from lamina.types import Ints


@dataclass(frozen=True, eq=False)
class ArrayItems:
    """Pixels, encoded images or texts, in a sequence."""

    name: str
    values: Sequence[Payload] | NDArray[np.uint8]

    def read(self, i: int) -> Payload:
        return self.values[i]

    def where(self, i: int) -> str:
        return f"{self.name}[{i}]"


def from_arrays(
    images_or_texts: Sequence[Payload] | NDArray[np.uint8],
    labels: Sequence[Any] | NDArray[Any],
    *,
    class_names: Sequence[str] | None = None,
    splits: Sequence[Any] | NDArray[Any] | None = None,
    domains: Sequence[Any] | NDArray[Any] | None = None,
    name: str = "arrays",
    test_fraction: float = 0.2,
) -> Source:
    """A source of n items in memory.

    images_or_texts: n images (h, w) or (h, w, 3) uint8 (as one array or several), n encoded images (bytes), or n texts
    (str). labels: class ids or names. splits: train, val or test, or 0, 1, 2; without them a stratified share becomes
    the test. domains: names of domains.

    Raises DataError naming the first item that is not one of these, and where lengths differ.
    """
    items = ArrayItems(name, images_or_texts)
    for what, given in (("labels", labels), ("splits", splits), ("domains", domains)):
        if given is not None and len(given) != len(images_or_texts):
            raise DataError(
                f"{name} holds {len(images_or_texts)} items but {len(given)} {what}: give one for each item"
            )
    textual = len(images_or_texts) > 0 and isinstance(images_or_texts[0], str)
    labels_n, names = label_ids(list(labels), tuple(class_names) if class_names is not None else None, items.where)
    domains_n: Ints | None = None
    domain_names: tuple[str, ...] = ("all",)
    if domains is not None:
        domains_n, domain_names = domain_ids(list(domains), None, items.where)
    return build(
        kind="text" if textual else "image",
        name=name,
        items=items,
        labels_n=labels_n,
        class_names=names,
        splits_n=None if splits is None else split_ids(list(splits), items.where),
        domains_n=domains_n,
        domain_names=domain_names,
        contents=_contents(items, len(images_or_texts), textual=textual),
        test_fraction=test_fraction,
        layout="items in memory",
    )


def _contents(items: ArrayItems, n: int, *, textual: bool) -> Iterator[bytes]:
    for i in range(n):
        value = items.read(i)
        if isinstance(value, str) and textual:
            # A lone surrogate is no reason to stop; the tokenizer names the text.
            yield value.encode("utf-8", "surrogatepass")
        elif isinstance(value, bytes) and not textual:
            yield value
        elif isinstance(value, np.ndarray) and not textual:
            if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)):
                raise DataError(
                    f"{items.where(i)} has shape {value.shape} and type {value.dtype}; allowed are (h, w) or (h, w, 3),"
                    " uint8. Convert it, for example with (255 * image).round().astype('uint8')"
                )
            if value.size == 0:
                raise DataError(f"{items.where(i)} has shape {value.shape}: it holds no pixels. Leave it out")
            yield repr(value.shape).encode() + value.tobytes()
        else:
            allowed = "text (str)" if textual else "an array (uint8) or encoded bytes"
            raise DataError(
                f"{items.where(i)} is of type {type(value).__name__}; allowed here is {allowed}, as the first item is"
                " of that kind. Do not mix images and texts"
                if i
                else f"{items.where(i)} is of type {type(value).__name__}; allowed are arrays (uint8), bytes and str"
            )
