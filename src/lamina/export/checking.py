"""Compares what was written with the model: files are read again by plain peft, transformers, or a plain script."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamina.backbones.files import quiet
from lamina.errors import LaminaError, ModelError
from lamina.export.written import told
from lamina.types import Batch

LOADER, SCRIPT_SECONDS = "load.py", 600
INSTEAD = "Other versions of transformers or peft may help; `--format onnx` depends on neither."
"""What to do where these libraries fail."""


def need(module: str, extra: str, what: str) -> None:
    """Raises ModelError where an optional library is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ModelError(
            f"{what} needs the library {module}, which is not installed. Install it: pip install 'lamina[{extra}]'."
        )


@contextmanager
def by_library(what: str, instead: str = INSTEAD) -> Iterator[None]:
    """Turns whatever another library raises while it is open into ModelError, and silences it. what: it is asked for. instead:
    what else there is."""
    try:
        with silently():
            yield
    except LaminaError:
        raise
    except Exception as error:
        raise ModelError(f"{what} fails ({told(error)}), so nothing was written. {instead}") from error


@contextmanager
def silently() -> Iterator[None]:
    """Silences load reports of transformers, and warnings of libraries, while it is open."""
    import warnings

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def logits_of(model: Any, batches: Sequence[Batch]) -> list[Tensor]:
    """Returns the logits that a model of transformers computes for every batch."""
    with torch.no_grad():
        return [model(**dict(batch.inputs)).logits.float() for batch in batches]


def together(base: Any, folders: Sequence[Path]) -> Any:
    """Returns plain peft's model with several adapters, all of them active. base: what they are added to."""
    from peft import PeftModel

    names = [adapter_name(folder.name) for folder in folders]
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    model.base_model.set_adapter(names)  # that of PeftModel takes one name
    return model.eval()


def adapter_name(folder: str) -> str:
    """Returns the name of a task's adapter in peft, which allows no dot: the number that its folder begins with."""
    return folder.partition("-")[0]


def told_together(folders: Sequence[str]) -> str:
    """Returns how peft uses the adapters of these folders together."""
    if not folders:
        return "No task has changed a weight."
    names = [adapter_name(folder) for folder in folders]
    loading = f'PeftModel.from_pretrained(base, "tasks/{folders[0]}", adapter_name="{names[0]}")'
    return (
        f"The adapters act together. With peft: `model = {loading}`, then `model.load_adapter(FOLDER, adapter_name=NUMBER)` "
        f"for each other folder in tasks/, then `model.base_model.set_adapter({names})`."
    )


def write_script(folder: Path, name: str) -> None:
    """Write `load.py`."""
    text = (resources.files("lamina.export") / "scripts" / f"{name}.txt").read_text(encoding="utf-8")
    (folder / LOADER).write_text(text, encoding="utf-8")


def by_script(folder: Path, batches: Sequence[Batch], **environment: str) -> list[Tensor]:
    """Returns the scores that `load.py` of a folder computes in a process of its own."""
    found = script_tensors(folder, batches, **environment)
    return [found[str(n)] for n in range(len(batches))]


def script_tensors(folder: Path, batches: Sequence[Batch], **environment: str) -> dict[str, Tensor]:
    """Returns everything that `load.py` of a folder computes in a process of its own."""
    given, scores = folder / ".inputs.safetensors", folder / ".scores.safetensors"
    tensors = {
        f"{n}.{key}": value.contiguous() for n, batch in enumerate(batches) for key, value in batch.inputs.items()
    }
    save_file(tensors, given)
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    try:
        done = subprocess.run(
            [sys.executable, LOADER, given.name, scores.name],
            cwd=folder,
            env=own,
            capture_output=True,
            text=True,
            timeout=SCRIPT_SECONDS,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ModelError(f"{LOADER} of the export fails, so nothing was written: {last[:300]}. {INSTEAD}")
        found: dict[str, Tensor] = load_file(scores)
        return found
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"{LOADER} of the export takes more than {SCRIPT_SECONDS} seconds, so nothing was written. Give fewer --inputs."
        ) from error
    finally:
        given.unlink(missing_ok=True)
        scores.unlink(missing_ok=True)
