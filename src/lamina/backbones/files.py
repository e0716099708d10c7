"""Files of a backbone: where they are, and how weights and JSON are read without running code.

Only regular files are opened. Names, shapes and types of tensors are read before any weight is.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamina.errors import BackboneError

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "merges.txt")
_HUB_FILES = [
    *("config.json", "preprocessor_config.json", "1_Pooling/config.json", "generation_config.json"),
    *(*_BESIDE_TOKENIZER, *TOKENIZER_FILES),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
]
_NO_PICKLE = (
    "only safetensors weights are read, because loading a pickle can run any code. Convert once, where you trust the "
    "file: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
)
_MOST_JSON_BYTES = 2**26
_STORED_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
_COPIED_AT_ONCE = 2**26
"""Bytes of a mapped file that are in memory beside their copies."""


class Location(NamedTuple):
    """Where a named backbone is."""

    folder: Path
    file: Path | None = None
    """The weights file, if the name is that of a file."""
    hub_name: str | None = None
    """Its name on the Hugging Face hub, if its weights have still to be downloaded."""


class Header(NamedTuple):
    """A stored tensor, as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it."""


def locate(name: str) -> Location:
    """Returns where a backbone is; of one on the hub, everything but the weights is downloaded."""
    path = Path(name)
    if name == "nano":
        with resources.as_file(resources.files("lamina") / "assets" / "nano") as path:
            return Location(path)
    if path.is_dir():
        return Location(path)
    if path.exists():
        if path.suffix != ".safetensors":
            raise BackboneError(f"{name}: {_NO_PICKLE}")
        return Location(path.parent, path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise BackboneError(f"no backbone {name!r}: give 'nano', a folder, a .safetensors file, or owner/name")
    return Location(_download(name, [file for file in _HUB_FILES if "safetensors" not in file]), hub_name=name)


def _download(name: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, HFValidationError) as error:  # every hub error is an OSError: not found, gated, offline
        raise BackboneError(
            f"{name!r} is neither a local path nor to be had from the Hugging Face hub ({type(error).__name__}). Check "
            "the name and the connection, or download the model elsewhere and give the path of its folder"
        ) from error


def weight_files(where: Location) -> list[Path]:
    """Returns the safetensors files of a backbone. Raises BackboneError if there are none, or it is not clear which."""
    if where.file is not None:
        return [where.file]
    folder = where.folder if where.hub_name is None else _download(where.hub_name, _HUB_FILES)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        return _shards(index)
    if (folder / "model.json").is_file():
        raise BackboneError(f"{folder} is a lamina model, not a backbone. `lamina learn {folder} DATA` teaches it more")
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise BackboneError(f"{folder}: several .safetensors files and no model.safetensors.index.json; give one file")
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(pattern))]
    reason = f"found {', '.join(pickles)}: {_NO_PICKLE}" if pickles else "put model.safetensors beside config.json"
    raise BackboneError(f"{folder}: no safetensors weights; {reason}")


def copy_files(name: str, folder: Path) -> None:
    """Copy weights, settings and tokenizer of a backbone into a folder, from which it loads as before."""
    where = locate(name)
    folder.mkdir(parents=True, exist_ok=True)
    weights = weight_files(where)
    for file in weights:
        shutil.copyfile(file, folder / ("model.safetensors" if len(weights) == 1 else file.name))
    source = weights[0].parent if where.hub_name is not None else where.folder
    for pattern in _HUB_FILES:
        for file in source.glob(pattern):
            target = folder / file.relative_to(source)
            if file.suffix != ".safetensors" and file.is_file():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def licence(name: str) -> str | None:
    """Returns the licence that the model card beside the weights names; None if there is none."""
    card = locate(name).folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if lines[:1] != ["---"]:
        return None
    ends = lines.index("---", 1) if "---" in lines[1:] else 0
    told = [line.partition(":")[2].strip().strip("'\"") for line in lines[1:ends] if line.startswith("license:")]
    return told[0] if told and told[0] else None


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BackboneError(
            f"{index}: weight_map must be an object that names the file of each tensor; download it again"
        )
    names = sorted({str(shard) for shard in weight_map.values()})
    for shard in names:
        if Path(shard).name != shard:
            raise BackboneError(f"{index}: refused shard {shard!r}: shards must lie in the same folder")
    return [index.parent / shard for shard in names]


def read_headers(files: Sequence[Path], passed_over: Callable[[str], bool] = lambda _: False) -> dict[str, Header]:
    """Returns name, shape, type and file of every stored tensor; no weight is read.

    passed_over: of a name, whether the tensor is never read, so that any type is allowed.
    Raises BackboneError for a file that is missing, damaged, not a regular file or a PEFT adapter, and for quantised
    weights.
    """
    from safetensors import SafetensorError, safe_open

    headers: dict[str, Header] = {}
    for file in files:
        if not file.exists():
            raise BackboneError(f"weights file {file} is missing; complete the download")
        check_regular(file)
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a dict
                    if not re.fullmatch(r"[\w.:/-]+", name):  # transformers takes names for patterns
                        raise BackboneError(f"{file}: {name!r} is not the name of a tensor; download it again")
                    part = stored.get_slice(name)
                    if part.get_dtype() not in _STORED_TYPES and not passed_over(name):
                        raise BackboneError(
                            f"{file}: {name} is stored as {part.get_dtype()}; quantised weights are not supported, give "
                            f"the weights in one of {', '.join(_STORED_TYPES[:4])}"
                        )
                    headers[name] = Header(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise BackboneError(f"{file} is not a readable safetensors file ({error}); download it again") from error
    if files and (files[0].name.startswith("adapter_model") or any(".lora_A." in name for name in headers)):
        raise _is_an_adapter(files[0])
    return headers


def _is_an_adapter(file: Path) -> BackboneError:
    base = read_json(file.parent / "adapter_config.json").get("base_model_name_or_path")
    return BackboneError(
        f"{file} is a PEFT adapter, not a whole model. Give its base model"
        + (f", {base!r}" if isinstance(base, str) else "")
        + ", or merge the adapter into it (peft's merge_and_unload) and save the result"
    )


def read_tensors(headers: Mapping[str, Header], names: Collection[str], *, mapped: bool = False) -> dict[str, Tensor]:
    """Returns these stored tensors. Raises BackboneError for a value that is not finite.

    mapped: whether they may stay in mapped files, for reading once. Otherwise they are copies: addresses in a mapped file
    are odd, which changes the last bits of a product. Files are mapped anew for every few copies. A model is thus not in
    memory twice.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(headers[name].file for name in names):
        pending = [name for name in reversed(tuple(names)) if headers[name].file == file]
        try:
            while pending:
                with safe_open(file, framework="pt") as stored:
                    size = 0
                    while pending and size < _COPIED_AT_ONCE:
                        tensor = stored.get_tensor(pending[-1])
                        tensors[pending[-1]] = tensor if mapped else tensor.clone()
                        _check_finite(pending.pop(), tensor, file)
                        size += 0 if mapped else tensor.nbytes
                        del tensor
        except (SafetensorError, OSError) as error:
            raise BackboneError(f"{file} is not a readable safetensors file ({error}); download it again") from error
    return tensors


def all_finite(tensor: Tensor) -> bool:
    """Returns whether no number is NaN or infinite. Its extremes show that in one pass, about ten times as fast as isfinite."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def _check_finite(name: str, tensor: Tensor, file: Path) -> None:
    if tensor.is_floating_point() and not all_finite(tensor):
        raise BackboneError(
            f"{file}: {name} holds values that are not finite (NaN or infinity); the weights are damaged or training them "
            "diverged. Download them again, or use another checkpoint"
        )


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns sha256 (hexadecimal) over the sorted names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_hash(name: str) -> str:
    """Returns a hash over all files of a named backbone: its weights, and the settings and tokenizer beside them."""
    with readable(name):
        where = locate(name)
        headers = read_headers(weight_files(where))
        digest = hashlib.sha256(tensors_hash(read_tensors(headers, headers, mapped=True)).encode())
        for file in sorted(_HUB_FILES):
            if "safetensors" not in file and (where.folder / file).is_file():
                digest.update(f"|{file}|".encode() + hashlib.sha256((where.folder / file).read_bytes()).digest())
        return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if there is no such file."""
    if not path.exists():
        return {}
    check_regular(path)
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise BackboneError(f"{path} has {path.stat().st_size} bytes; at most {_MOST_JSON_BYTES} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BackboneError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise BackboneError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BackboneError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns errors of the system (no permission, a name that is too long) into BackboneError while it is open."""
    try:
        yield
    except OSError as error:
        raise BackboneError(f"{name} cannot be read: {error}") from error


def check_regular(path: Path) -> None:
    """Raises BackboneError for a folder, pipe, device or socket: reading one may never end."""
    if not path.is_file():
        raise BackboneError(f"{path} is not a regular file; put the file itself there")


def some(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def quiet() -> Iterator[None]:
    """Silences load reports and progress bars of transformers while it is open."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, its chat template among them, from one folder into another."""
    for file in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
