"""Files of a backbone: where they are, and reading weights and JSON from them safely."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import BackboneError


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hexadecimal) over the sorted names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_hash(name: str) -> str:
    """Of everything that is read from a named backbone: its weights, and the settings and tokenizer beside them."""
    folder, files = locate(name)
    digest = hashlib.sha256(tensors_hash(read_weights(files)).encode())
    for file in sorted(_HUB_FILES):
        if "safetensors" not in file and (folder / file).is_file():
            digest.update(f"|{file}|".encode() + hashlib.sha256((folder / file).read_bytes()).digest())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- files

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
_HUB_FILES = [
    *("config.json", "preprocessor_config.json", "1_Pooling/config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "merges.txt", *TOKENIZER_FILES),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
]


def locate(name: str) -> tuple[Path, list[Path]]:
    """The folder of a named backbone and the safetensors files of its weights."""
    path = Path(name)
    if name == "nano":
        with resources.as_file(resources.files("lamina") / "assets" / "nano") as path:
            return path, [path / "model.safetensors"]
    if path.is_file():
        if path.suffix != ".safetensors":
            raise BackboneError(f"{name}: {_NO_PICKLE}")
        return path.parent, [path]
    if path.is_dir():
        return path, _weight_files(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise BackboneError(f"no backbone {name!r}: give 'nano', a folder, a .safetensors file, or owner/name")
    folder = _download(name)
    return folder, _weight_files(folder)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, HFValidationError) as error:  # every hub error is an OSError: not found, gated, offline
        raise BackboneError(
            f"{name!r} is neither a local path nor to be had from the Hugging Face hub ({type(error).__name__}). Check "
            "the name and the connection, or download the model elsewhere and give the path of its folder"
        ) from error


_NO_PICKLE = (
    "only safetensors weights are read, because loading a pickle can run any code. Convert once, where you trust the "
    "file: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        names = sorted({str(shard) for shard in read_json(index).get("weight_map", {}).values()})
        for shard in names:
            if Path(shard).name != shard:
                raise BackboneError(f"{index}: refused shard {shard!r}: shards must lie in the same folder")
        if not names:
            raise BackboneError(f"{index}: no weight_map")
        return [folder / shard for shard in names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise BackboneError(f"{folder}: several .safetensors files and no model.safetensors.index.json; give one file")
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(pattern))]
    reason = f"found {', '.join(pickles)}: {_NO_PICKLE}" if pickles else "put model.safetensors beside config.json"
    raise BackboneError(f"{folder}: no safetensors weights; {reason}")


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except FileNotFoundError as error:
            raise BackboneError(f"weights file {file} is missing; complete the download") from error
        except (SafetensorError, OSError) as error:
            raise BackboneError(f"{file} is not a readable safetensors file ({error}); download it again") from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BackboneError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BackboneError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its load reports and progress bars, put back afterwards."""
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
