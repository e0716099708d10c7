"""InfLoRA's subspaces against numbers recorded from the reference implementation (liangyanshuo/InfLoRA, e08b00e).

The recordings, `inflora_dualgpm_a.npz` and `b`, are our own: its subspace update, run on synthetic second moments. For task t
and layer l: `moment_before` and `moment_after` (d, d), the inputs before and after learning the task; `down_gram` (d, d), B_t^T
B_t; `down_gap`, below which the span of B_t is not determined; `old_projector`, `old_dim` and `kind` of the old tasks' space.

Shape letters: d width, r rank.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.methods.base import growing_threshold
from lamina.methods.inflora import InfLoRAConfig, Subspace, extend, main_directions

GOLDEN = Path(__file__).parent
KINDS = {"old": "remove", "free": "retain"}
DETERMINED = 1e-9


@pytest.fixture(params=["a", "b"])
def recorded(request: pytest.FixtureRequest) -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN / f"inflora_dualgpm_{request.param}.npz", allow_pickle=False) as archive:
        return dict(archive)


def projector_on_old(space: Subspace) -> Tensor:
    inside_dd = space.basis_dk @ space.basis_dk.T
    return inside_dd if space.kind == "old" else torch.eye(len(inside_dd), dtype=inside_dd.dtype) - inside_dd


def test_every_task_of_the_recorded_runs(recorded: Mapping[str, np.ndarray]):
    """With the settings that are this library's default: each task starts from our own space, so that errors add up."""
    meta = json.loads(str(recorded["meta"]))
    defaults = InfLoRAConfig()
    assert (defaults.spectrum, defaults.criterion, defaults.growing_threshold) == ("released", "released", True)
    compared, kinds = 0, set()
    for layer in range(meta["layers"]):
        old: Subspace | None = None
        for task in range(meta["tasks"]):

            def value(name: str, key: str = f"t{task}_l{layer}") -> np.ndarray:
                return recorded[f"{key}_{name}"]

            before_dd, after_dd = (torch.from_numpy(value(f"moment_{when}")).double() for when in ("before", "after"))
            if value("down_gap") > DETERMINED:
                down_rd = defaults.row_norm * main_directions(before_dd, old, meta["rank"], defaults.spectrum).T
                torch.testing.assert_close(down_rd.T @ down_rd, torch.from_numpy(value("down_gram")), atol=1e-9, rtol=0)
                compared += 1
            epsilon = growing_threshold(meta["epsilon"], task, meta["tasks"])
            old = extend(old, after_dd, epsilon, defaults.criterion)
            assert old.old_dimension == int(value("old_dim")), f"task {task}, layer {layer}"
            assert KINDS[old.kind] == str(value("kind")), f"task {task}, layer {layer}"
            kinds.add(old.kind)
            torch.testing.assert_close(
                projector_on_old(old), torch.from_numpy(value("old_projector")), atol=1e-9, rtol=0
            )
    assert compared >= 8
    assert kinds == {"old", "free"}
