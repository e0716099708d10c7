"""A folder with one folder of images per class, with or without folders for splits and domains above them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamina.data.records import Kind, Source, build, split_of
from lamina.errors import DataError
from lamina.types import Ints

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".jfif", ".png", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class FolderItems:
    """Images by their paths below a root."""

    root: Path
    paths: tuple[str, ...]

    def read(self, i: int) -> bytes:
        return (self.root / self.paths[i]).read_bytes()

    def where(self, i: int) -> str:
        return str(self.root / self.paths[i])


@dataclass(frozen=True)
class ClassFolder:
    """One folder of images: its class, its split if its place tells, its domain."""

    path: Path
    split: int | None
    domain: str


def open_folder(root: Path, *, kind: Kind, test_fraction: float) -> Source:
    """The images below `root`, laid out as CLASS, SPLIT/CLASS, DOMAIN/CLASS or DOMAIN/SPLIT/CLASS.

    Raises DataError for a folder of none of these forms, and for a class folder without images.
    """
    if kind != "image":
        raise DataError(
            f"{root} is a folder of folders, which can only hold images, but the kind asked for is {kind}."
            " Put texts in a CSV or Parquet file with the columns text and label"
        )
    folders = class_folders(root)
    class_names = tuple(sorted({folder.path.name for folder in folders}))
    domain_names = tuple(dict.fromkeys(folder.domain for folder in folders))
    paths, labels, splits, domains, sizes, times = [], [], [], [], [], []
    for folder in folders:
        files = list(_images(folder.path))
        if not files:
            raise DataError(
                f"class folder {folder.path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})."
                " Put images in it, or remove it"
            )
        for file in files:
            state = file.stat()
            paths.append(file.relative_to(root).as_posix())
            labels.append(class_names.index(folder.path.name))
            splits.append(folder.split)
            domains.append(domain_names.index(folder.domain))
            sizes.append(state.st_size)
            times.append(state.st_mtime_ns)
    splits_n: Ints | None = None if None in splits else np.array(splits, np.int64)
    return build(
        kind="image",
        name=root.resolve().name,
        items=FolderItems(root, tuple(paths)),
        labels_n=np.array(labels, np.int64),
        class_names=class_names,
        splits_n=splits_n,
        domains_n=np.array(domains, np.int64),
        domain_names=domain_names,
        contents=(f"{path}\0{size}".encode() for path, size in zip(paths, sizes, strict=True)),
        test_fraction=test_fraction,
        stamp=hashlib.blake2b(repr(times).encode(), digest_size=16).hexdigest(),
    )


def class_folders(root: Path) -> list[ClassFolder]:
    """The class folders below `root`, in a fixed order, each with the split and domain its place says."""
    first = _folders(root)
    if not first:
        raise DataError(
            f"{root} holds neither folders of images, nor Parquet files, nor a saved Hugging Face dataset."
            " Point at a folder with one folder per class, at a Parquet or CSV file, or at hf:owner/name"
        )
    if any(split_of(folder.name) is not None for folder in first):
        return _by_split(root, first, "all")
    second = {folder: _folders(folder) for folder in first}
    nested = [folder for folder in first if second[folder] and not any(_direct_images(folder))]
    if nested == first:
        if all(split_of(inner.name) is not None for inners in second.values() for inner in inners):
            return [found for folder in first for found in _by_split(folder, second[folder], folder.name)]
        names = [inner.name for inners in second.values() for inner in inners]
        # Several classes, one of them in more than one place: the outer folders can only be domains. Otherwise they
        # are classes that keep their images one folder deeper (as Tiny ImageNet does).
        if 1 < len(set(names)) < len(names):
            return [ClassFolder(inner, None, folder.name) for folder in first for inner in second[folder]]
    return [ClassFolder(folder, None, "all") for folder in first]


def _by_split(parent: Path, folders: list[Path], domain: str) -> list[ClassFolder]:
    found: list[ClassFolder] = []
    for folder in sorted(folders, key=lambda folder: (split_of(folder.name) or 0, folder.name)):
        split = split_of(folder.name)
        if split is None:
            raise DataError(
                f"{parent} holds folders of splits (train, val, test) and also {folder.name!r}, which is none."
                f" Move {folder.name!r} elsewhere, or rename the folders if they are classes"
            )
        inner = _folders(folder)
        if not inner:
            raise DataError(f"split folder {folder} holds no class folders. Put one folder per class in it")
        found.extend(ClassFolder(path, split, domain) for path in inner)
    return found


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _direct_images(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _images(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path
