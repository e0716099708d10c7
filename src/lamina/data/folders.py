"""A folder with one folder of images per class, with or without folders for splits and domains above them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamina.data.names import clean, listed, refuse_likely_splits, shown, split_of, split_words
from lamina.data.records import Source, build
from lamina.data.tree import IMAGE_SUFFIXES, Folder, Leftovers, scan
from lamina.errors import DataError
from lamina.types import SPLITS, Kind

_FEW = 10
"""Images beside folders of images are strays if there are ten times as many in the folders."""


@dataclass(frozen=True)
class FolderItems:
    """Images by their paths below a root."""

    root: Path
    paths: tuple[str, ...]

    def read(self, i: int) -> bytes:
        return (self.root / self.paths[i]).read_bytes()

    def where(self, i: int) -> str:
        # A name that is not valid Unicode must be printable all the same.
        return os.fsencode(self.root / self.paths[i]).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class ClassFolder:
    """One folder of images: its class, its split if its place tells, its domain."""

    folder: Folder
    split: int | None
    domain: str


@dataclass(frozen=True)
class Reading:
    """How a folder was understood."""

    classes: list[ClassFolder]
    layout: str
    passed: list[Folder]
    """Folders above the class folders: images directly in them are left out."""


def open_folder(root: Path, *, kind: Kind, test_fraction: float) -> Source:
    """The images below `root`, laid out as CLASS, SPLIT/CLASS, DOMAIN/CLASS or DOMAIN/SPLIT/CLASS.

    Raises DataError for a folder of none of these forms, and for a class folder without images.
    """
    if kind != "image":
        raise DataError(
            f"{root} is a folder of folders, which can only hold images, but the kind asked for is {kind}."
            " Put texts in a CSV or Parquet file with the columns text and label"
        )
    tree, left = scan(root)
    reading = read_layout(tree)
    for found in reading.classes:
        _refuse_splits_in_class(found.folder)
    above = set(reading.passed)
    for folder in (tree, *_below(tree)):
        filled = [inner for inner in folder.folders if inner.holds]
        read_as_splits = [inner.name for inner in filled if inner in above and split_words(inner.name)[0]]
        refuse_likely_splits([inner.name for inner in filled], str(folder.at), read_as_splits)
    for folder in reading.passed:
        if not folder.holds:
            left.add("empty folders", folder.path)
        for image in folder.images:
            left.add("images beside the class folders", image.path)
    names = [clean(found.folder.name, f"class folder {found.folder.path!a}") for found in reading.classes]
    domains = [clean(found.domain, "the name of a domain") for found in reading.classes]
    class_names, domain_names = tuple(sorted(set(names))), tuple(dict.fromkeys(domains))
    class_ids = {name: k for k, name in enumerate(class_names)}
    images, labels_n, domains_n, splits = [], [], [], []
    for found, name, domain in zip(reading.classes, names, domains, strict=True):
        inside = sorted(found.folder.all_images(), key=lambda image: image.path.split("/"))
        if not inside:
            raise DataError(
                f"class folder {root / found.folder.path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})."
                " Put images in it, or remove it"
            )
        _note_empty(found.folder, left)
        images += inside
        labels_n += [class_ids[name]] * len(inside)
        domains_n += [domain_names.index(domain)] * len(inside)
        splits += [found.split] * len(inside)
    return build(
        kind="image",
        name=root.resolve().name,
        items=FolderItems(root, tuple(image.path for image in images)),
        labels_n=np.array(labels_n, np.int64),
        class_names=class_names,
        splits_n=None if None in splits else np.array(splits, np.int64),
        domains_n=np.array(domains_n, np.int64),
        domain_names=domain_names,
        contents=(os.fsencode(f"{image.path}\0{image.size}") for image in images),
        test_fraction=test_fraction,
        stamp=hashlib.blake2b(repr([image.changed for image in images]).encode(), digest_size=16).hexdigest(),
        layout=reading.layout,
        left_out=left.found(),
    )


def read_layout(root: Folder) -> Reading:
    """The class folders below `root`, in a fixed order, each with the split and domain that its place says.

    Raises DataError where the folders can be understood in more than one way.
    """
    if not root.folders:
        raise DataError(
            f"{root.at} holds neither folders of images, nor Parquet, CSV or JSON lines files, nor a saved Hugging Face"
            " dataset. Point at a folder with one folder per class, at a Parquet, CSV or JSON lines file, or at hf:owner/name"
        )
    top, passed = _unwrapped(root)
    inside = f"inside {shown(top.path)}, " if top is not root else ""
    splits = _splits(top, top.folders)
    if splits:
        found, above = _classes_of_splits(splits, "all")
        _refuse_domains_in_splits(top, found)
        told = ", ".join(f"{shown(folder.name)}/ is {SPLITS[split]}" for split, folder in splits)
        return Reading(found, f"{inside}folders SPLIT/CLASS: {told}", [*passed, *above])
    if _hold_splits(top):
        found, above = [], []
        for domain in top.folders:
            its_classes, its_above = _classes_of_splits(_splits(domain, domain.folders), domain.name)
            found += its_classes
            above += [domain, *its_above]
        return Reading(found, f"{inside}folders DOMAIN/SPLIT/CLASS: {_named(top.folders)}", [*passed, *above])
    if _are_domains(top):
        found = [ClassFolder(inner, None, domain.name) for domain in top.folders for inner in domain.folders]
        layout = f"{inside}folders DOMAIN/CLASS: {_named(top.folders)}"
        return Reading(found, layout, [*passed, *top.folders])
    return Reading([ClassFolder(folder, None, "all") for folder in top.folders], f"{inside}folders CLASS", passed)


def _unwrapped(folder: Folder) -> tuple[Folder, list[Folder]]:
    """The first folder below this one that holds more than one folder, and all above it.

    A zip file is often unpacked into a folder of its own. A lone folder of images, or of a split, is no such wrapper.
    Raises DataError for a lone folder with images and folders of images, unless there are few of either.
    """
    passed = [folder]
    while len(folder.folders) == 1 and split_of(folder.folders[0].name) is None:
        inner = folder.folders[0]
        direct, nested = len(inner.images), inner.nested
        if not nested or nested * _FEW <= direct:
            break
        if direct * _FEW > nested:
            raise DataError(
                f"{inner.at} is the only folder and holds {direct} images directly and {nested} in folders"
                f" ({_named(inner.folders)}): one class, or a folder around classes; it cannot be told. Move the images into"
                " the folders, or the folders elsewhere"
            )
        folder = inner
        passed.append(folder)
    # Where nothing but single folders was met, there is one class, and it is the outermost.
    return (folder, passed) if len(folder.folders) > 1 or _splits(folder, folder.folders) else (passed[0], passed[:1])


def _classes_of_splits(splits: list[tuple[int, Folder]], domain: str) -> tuple[list[ClassFolder], list[Folder]]:
    found, above = [], []
    for split, folder in splits:
        above.append(inner := folder)
        # A split is at times unpacked into a folder of its own name.
        while len(inner.folders) == 1 and not inner.folders[0].images and split_words(inner.folders[0].name)[0]:
            above.append(inner := inner.folders[0])
        if not inner.folders:
            raise DataError(f"split folder {folder.at} holds no class folders. Put one folder per class in it")
        found += [ClassFolder(path, split, domain) for path in inner.folders]
    return found, above


def _splits(parent: Folder, folders: Sequence[Folder]) -> list[tuple[int, Folder]]:
    """The split of each folder, in the order of splits; none where they are no splits.

    Raises DataError where only some are, or where it cannot be told.
    """
    meant = {folder: split_of(folder.name) for folder in folders}
    if all(split is None or _is_class_named_train(folder, folders) for folder, split in meant.items()):
        return _splits_by_one_word(parent, folders)
    other = next((folder for folder, split in meant.items() if split is None), None)
    if other is not None:
        raise DataError(
            f"{parent.at} holds folders of splits (train, val, test) and also {shown(other.name)!r}, which is none."
            f" Move {shown(other.name)!r} elsewhere, or rename the folders if they are classes"
        )
    found = [(split, folder) for folder, split in meant.items() if split is not None]
    return sorted(found, key=lambda pair: (pair[0], pair[1].name))


def _is_class_named_train(folder: Folder, beside: Sequence[Folder]) -> bool:
    """A train is a thing too: a folder of images with other folders beside it that are no splits."""
    others = [split_of(other.name) is None for other in beside if other is not folder]
    return (
        folder.name.lower() == "train"
        and bool(folder.images)
        and not folder.folders
        and len(others) > 1
        and all(others)
    )


def _splits_by_one_word(parent: Folder, folders: Sequence[Folder]) -> list[tuple[int, Folder]]:
    """Folders such as seg_train and seg_test, which hold class folders and differ in the word of the split only."""
    words = {folder: split_words(folder.name) for folder in folders if folder.holds}
    meant = {folder: min(splits) for folder, (splits, _) in words.items() if len(splits) == 1}
    nested = all(folder.nested > len(folder.images) for folder in meant)
    if 0 not in meant.values() or len(set(meant.values())) < 2 or not nested:
        return []
    if len(meant) == len(words) and len({rest for _, rest in words.values()}) == 1:
        return sorted(((split, folder) for folder, split in meant.items()), key=lambda pair: (pair[0], pair[1].name))
    raise DataError(
        f"{parent.at} holds folders that may be splits ({_named(list(meant))}) or domains: it cannot be told."
        f" Name splits train, val and test, and move other folders elsewhere (found: {_named(folders)})"
    )


def _hold_splits(top: Folder) -> bool:
    """Whether these are domains, each with folders for its splits. Raises DataError where only some are."""
    inner = [folder for outer in top.folders for folder in outer.folders]
    are = [bool(_splits(outer, outer.folders)) for outer in top.folders if outer.folders]
    if not inner or not any(are):
        return False
    without = [outer.name for outer in top.folders if not outer.folders or not _splits(outer, outer.folders)]
    if without:
        raise DataError(
            f"{top.at} holds domains with folders of splits (train, val, test), but {listed(without)} has none."
            " Give every domain the same splits, or move that folder elsewhere"
        )
    return True


def _are_domains(top: Folder) -> bool:
    """Whether the folders are domains: the same class folders stand in several of them.

    Otherwise they are classes, perhaps with their images one folder deeper (as in Tiny ImageNet). Raises DataError
    where both are possible.
    """
    outer = [folder for folder in top.folders if folder.folders]
    if not _shared(outer):
        return False
    direct, nested = sum(len(folder.images) for folder in outer), sum(folder.nested for folder in outer)
    flat = [folder for folder in top.folders if folder.images and not folder.folders]
    if direct * _FEW <= nested and not flat:
        return True
    if direct >= nested:
        return False
    found = f"{flat[0].path} holds images directly" if flat else f"{direct} images lie directly in them"
    raise DataError(
        f"{top.at}: the folders {_named(outer)} hold folders of the same names, as domains do, but {shown(found)}, as in"
        " classes: it cannot be told. Move the images into class folders, or give every class one folder"
    )


def _refuse_domains_in_splits(top: Folder, found: list[ClassFolder]) -> None:
    outer = [each.folder for each in found if each.folder.nested > len(each.folder.images)]
    if _shared(outer):
        raise DataError(
            f"{top.at}: in the folders of splits, the folders {_named(outer)} hold folders of the same names: domains of"
            " classes, or classes in parts; it cannot be told. Lay domains out as DOMAIN/SPLIT/CLASS, or put the images of a"
            " class into its folder"
        )


def _refuse_splits_in_class(folder: Folder) -> None:
    """Raises DataError where folders for training and for testing stand beside each other, at any depth in a class."""
    split_by_folder = {
        inner: min(splits) for inner in folder.folders if inner.holds and len(splits := split_words(inner.name)[0]) == 1
    }
    if 0 in split_by_folder.values() and len(set(split_by_folder.values())) > 1:
        told = listed([f"{inner.path}/" for inner in split_by_folder])
        raise DataError(
            f"{folder.at} was read as a class, or as a part of one, but holds folders of splits ({told}): they would be"
            " mixed. Point --data at the folder that holds the splits, lay the data out as DOMAIN/SPLIT/CLASS, or rename them"
        )
    for inner in folder.folders:
        _refuse_splits_in_class(inner)


def _shared(outer: Sequence[Folder]) -> bool:
    """Whether these folders hold several names of folders, one of them below more than one name."""
    pairs = {(folder.name, clean(inner.name, f"folder {inner.path!a}")) for folder in outer for inner in folder.folders}
    return 1 < len({inner for _, inner in pairs}) < len(pairs)


def _named(folders: Sequence[Folder]) -> str:
    return listed([f"{folder.name}/" for folder in folders])


def _note_empty(folder: Folder, left: Leftovers) -> None:
    for inner in _below(folder):
        if not inner.holds:
            left.add("empty folders", inner.path)


def _below(folder: Folder) -> Iterator[Folder]:
    for inner in folder.folders:
        yield inner
        yield from _below(inner)
