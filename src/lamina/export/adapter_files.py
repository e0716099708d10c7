"""A PEFT adapter from elsewhere: read without running code, and refused by name where it is damaged or not what lamina adds.

It opens nothing but plain files in the folder itself, and checks the header of the weights before they are read.

Shape letters: o outputs, i inputs of a linear layer, r rank.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from lamina.data.names import listed
from lamina.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_JSON, MOST_HEADER, MOST_WEIGHTS = 2**20, 2**23, 2**31
"""Bytes."""
START, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
FREE = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
    ),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"),
    *("lora_dropout", "use_rslora", "init_lora_weights", "megatron_core", "qalora_group_size"),
}
"""Fields of the configuration that are read here, or change nothing once training has ended."""
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the weights of the base as they are."""
DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class ForeignAdapter:
    """A LoRA adapter that was trained elsewhere, checked."""

    path: Path
    updates: Mapping[str, tuple[Tensor, Tensor]]
    """up (o, r), its scale included, and down (r, i), float32, by the path of the linear layer in the backbone."""
    saved: Mapping[str, Tensor]
    """Other tensors, those of the classifier, by name."""
    base: str | None
    """Where it says its base is."""


def read_adapter(path: Path, layers: Mapping[str, tuple[int, int]], prefixes: Sequence[str]) -> ForeignAdapter:
    """Returns an adapter. layers: (outputs, inputs) of every linear layer of the backbone, by path. prefixes: how their names
    may begin in a class with a classifier. Raises ModelError naming what is wrong."""
    config = _config(path)
    tensors = _tensors(path)
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(START)
        if name == key:
            raise ModelError(
                f"{path}: tensor {key!r} does not begin with {START!r}, as PEFT's names do. Save it with peft's "
                f"save_pretrained."
            )
        plain = value.float()
        if not bool(torch.isfinite(plain).all()):
            raise ModelError(
                f"{path}: {key} holds NaN or infinity, or a number that is too large for float32. Its training diverged, or "
                f"the file is damaged: save it again from a healthy checkpoint."
            )
        for end in (DOWN, UP):
            if name.endswith(end):
                where = _layer(name.removesuffix(end), layers, prefixes, path)
                factors.setdefault(where, {})[end] = plain
                break
        else:
            if "lora_" in name:
                raise ModelError(
                    f"{path}: left-over tensor {key!r}; only {DOWN[1:]} and {UP[1:]} are known. Train a plain LoRA."
                )
            saved[name] = plain
    _missing(config, factors, layers, prefixes, path)
    if not factors:
        raise ModelError(
            f"{path} holds no {DOWN[1:]}: there is no adapter in it. Give the folder that peft's save_pretrained wrote."
        )
    updates = {}
    for where, parts in factors.items():
        updates[where] = _update(where, parts, layers[where], config, path)
    base = config.get("base_model_name_or_path")
    return ForeignAdapter(path, updates, saved, base if isinstance(base, str) else None)


def plain_file(path: Path, most: int) -> Path:
    """Returns a path that is a regular file of at most so many bytes, and no link. Raises ModelError for any other."""
    if path.is_symlink():
        raise ModelError(f"{path} is a symbolic link, and those are not followed. Copy the file itself there.")
    if not path.is_file():
        raise ModelError(f"{path} is {'no regular file' if path.exists() else 'missing'}.")
    if path.stat().st_size > most:
        raise ModelError(f"{path} has {path.stat().st_size} bytes; at most {most} are read.")
    return path


def _config(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_dir():
        raise ModelError(f"{path} is no folder with an adapter. Give the folder that holds {CONFIG} and {WEIGHTS}.")
    file = plain_file(path / CONFIG, MOST_JSON)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {str(error)[:100]}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold an object, and holds a {type(config).__name__}.")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type is {_short(config.get('peft_type'))}; only LORA can be imported.")
    if config.get("bias", "none") != "none":
        raise ModelError(
            f"{file}: bias is {_short(config['bias'])}; an update of biases cannot be imported, only none."
        )
    if config.get("init_lora_weights", True) not in KEEP_THE_BASE:
        raise ModelError(
            f"{file}: init_lora_weights is {_short(config['init_lora_weights'])}, which changes the weights of the base too, "
            f"or is unknown; allowed are {', '.join(map(repr, KEEP_THE_BASE))}. Save the adapter anew as a plain LoRA (peft's "
            f"path_initial_model_for_weight_conversion)."
        )
    for key, value in config.items():
        if key not in FREE and key != "bias" and value not in (None, False, [], {}, 0, 0.0):
            what = {"use_dora": "DoRA also scales the weights", "fan_in_fan_out": "its factors are transposed"}
            told = what.get(key, "lamina does not know what it changes")
            raise ModelError(f"{file}: {key} is {_short(value)}, and such an adapter cannot be imported: {told}.")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS
    pickles = sorted(found.name for end in ("bin", "pt", "pth", "ckpt", "pkl") for found in path.glob(f"*.{end}"))
    if pickles and not file.exists():
        raise ModelError(
            f"{path} holds {listed(pickles, 3)}: loading a pickle can run any code, so only {WEIGHTS} is read. Save the "
            f"adapter with safe_serialization=True."
        )
    size = plain_file(file, MOST_WEIGHTS).stat().st_size
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if not 2 <= header <= min(MOST_HEADER, size - 8):
        raise ModelError(
            f"{file} is damaged: its header says {header} bytes, of a file of {size}; at most {MOST_HEADER} are read."
        )
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                if not re.fullmatch(r"[\w.:/-]{1,512}", name):
                    raise ModelError(f"{file}: {_short(name)} is not the name of a tensor.")
                if stored.get_slice(name).get_dtype() not in DTYPES:
                    raise ModelError(
                        f"{file}: {name} is stored as {stored.get_slice(name).get_dtype()}, not as floats."
                    )
        found: dict[str, Tensor] = load_file(file)
        return found
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged: {str(error)[:200]}.") from error


def _layer(name: str, layers: Mapping[str, tuple[int, int]], prefixes: Sequence[str], path: Path) -> str:
    for prefix in prefixes:
        if name.startswith(prefix) and name.removeprefix(prefix) in layers:
            return name.removeprefix(prefix)
    raise ModelError(
        f"{path}: left-over update of {name!r}, which is no linear layer of this model's base. Its layers are called like "
        f"{next(iter(layers))!r} in the installed transformers; an adapter of another architecture, or of an older "
        f"transformers, cannot be imported."
    )


def _missing(
    config: Mapping[str, Any],
    factors: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, tuple[int, int]],
    prefixes: Sequence[str],
    path: Path,
) -> None:
    """Raises ModelError for a layer that the configuration names and the weights lack, and for half an update."""
    half = [where for where, parts in factors.items() if len(parts) < 2]
    if half:
        have, lack = sorted((DOWN[1:], UP[1:]), key=lambda end: f".{end}" not in factors[half[0]])
        raise ModelError(
            f"{path}: the update of {half[0]!r} has {have} and lacks {lack}. The file is incomplete: copy or save it again."
        )
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    for field, names in (("target_modules", targets), ("exclude_modules", excluded)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelError(
                f"{path}: {field} is {_short(names)}; only a list of names is read, no regular expression, since it says which "
                f"layers must be there. Name the layers."
            )

    def named(name: str) -> list[str]:
        ends = [name.removeprefix(prefix) for prefix in prefixes]
        return [where for where in layers if any(where == end or where.endswith(f".{end}") for end in ends)]

    without = {where for name in excluded for where in named(name)}
    for target in targets or []:
        wanted = named(target)
        lacking = [where for where in wanted if where not in factors and where not in without]
        if not wanted or lacking:
            told = f"the update of {lacking[0]!r}" if lacking else "any layer of that name in this base"
            raise ModelError(
                f"{path}: target_modules names {_short(target)}, and the weights lack {told}. The file is incomplete, or of "
                f"another base."
            )


def _update(
    where: str, parts: Mapping[str, Tensor], shape: tuple[int, int], config: Mapping[str, Any], path: Path
) -> tuple[Tensor, Tensor]:
    """Returns up, with its scale, and down. Raises ModelError for shapes or ranks that do not fit."""
    down_ri, up_or = parts[DOWN], parts[UP]
    if down_ri.ndim != 2 or up_or.ndim != 2 or (up_or.shape[0], down_ri.shape[1]) != shape:
        raise ModelError(
            f"{path}: the update of {where!r} has shapes {tuple(up_or.shape)} and {tuple(down_ri.shape)}, and that layer of "
            f"the base has {shape[0]} outputs and {shape[1]} inputs. It belongs to another base."
        )
    rank = down_ri.shape[0]
    said = _pattern(config, "rank_pattern", "r", where, path)
    if rank != up_or.shape[1] or rank != said or not 1 <= rank <= max(shape):
        raise ModelError(
            f"{path}: the update of {where!r} has rank {rank} ({up_or.shape[1]} on the other side), and {CONFIG} says "
            f"{_short(said)}; a rank from 1 to {max(shape)} is allowed, the same everywhere."
        )
    alpha = _pattern(config, "alpha_pattern", "lora_alpha", where, path)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) < 1e6:
        raise ModelError(f"{path}: lora_alpha of {where!r} is {_short(alpha)}; a number other than 0 is needed.")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    scaled_or = scale * up_or
    if not bool(torch.isfinite(scaled_or @ down_ri).all()):
        raise ModelError(
            f"{path}: the update of {where!r}, scaled by {scale:g}, is larger than float32 can hold. Its training diverged, or "
            f"the file is damaged: save it again from a healthy checkpoint."
        )
    return scaled_or.contiguous(), down_ri.contiguous()


def _pattern(config: Mapping[str, Any], pattern: str, usual: str, where: str, path: Path) -> Any:
    """Returns the value of a pattern for a layer. Patterns are names, or their ends; a regular expression is refused."""
    found = config.get(pattern) or {}
    if not isinstance(found, dict):
        raise ModelError(f"{path}: {pattern} must hold names and numbers.")
    for key, value in found.items():
        if not re.fullmatch(r"[\w.]{1,256}", key):
            raise ModelError(
                f"{path}: {pattern} has {_short(key)}; only names of layers are read, no regular expressions."
            )
        if key == where or where.endswith(f".{key}") or key.endswith(f".{where}"):
            return value
    return config.get(usual, 8)


def _short(value: object) -> str:
    told = repr(value)
    return told if len(told) <= 60 else told[:57] + "..."
