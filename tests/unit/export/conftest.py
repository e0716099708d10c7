"""The script that comes with an export runs in this process, since starting Python with peft takes five seconds.

Tests that `make test` leaves to `make test-slow` start it, as users do, and so do tests/end_to_end."""

import os
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from lamina.export import checking


def run_here(command: Sequence[str], cwd: Path, env: dict[str, str], **_: object) -> "subprocess.CompletedProcess[str]":
    _python, *arguments = command
    code, said = 0, ""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", arguments)
        for key in os.environ.keys() - env.keys():
            patch.delenv(key)
        for key, value in env.items():
            patch.setenv(key, value)
        try:
            with warnings.catch_warnings(action="ignore"):
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            code, said = int(bool(end.code)), str(end.code)
        except Exception:  # noqa: BLE001 - whatever a script raises ends it
            code, said = 1, traceback.format_exc()
    return subprocess.CompletedProcess(command, code, stdout="", stderr=said)


@pytest.fixture(autouse=True)
def scripts_run_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("slow") is None:
        told = SimpleNamespace(run=run_here, TimeoutExpired=subprocess.TimeoutExpired)
        monkeypatch.setattr(checking, "subprocess", told)
