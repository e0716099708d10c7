"""Non-finite numbers are found where they arise, before anything is reported or saved as a result."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lamina.errors import TrainingError


def check_finite(tensors: Mapping[str, Tensor], what: str, lr: float) -> None:
    """Raises TrainingError naming the first of these tensors that holds NaN or infinity. what: to be named in the message.
    lr: training.lr, for its advice."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise TrainingError(
                f"{what}: {name} is not finite (NaN or infinity). Training diverged, or an input is not finite. Use a smaller "
                f"training.lr (now {lr}) or training.clip=1, and check the data."
            )
