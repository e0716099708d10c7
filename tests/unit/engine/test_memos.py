"""What a batch remembers takes no more memory than it says, and is not changed by who asks for it."""

import torch

from lamina.methods.routed import remembered
from lamina.types import Batch


def test_what_is_remembered_is_a_copy_of_its_own_size():
    states_btd = torch.randn(4, 50, 8)
    batch = Batch(inputs={}, labels_b=torch.zeros(4).long(), memo={})
    first = remembered(batch, "features", lambda: states_btd[:, 0])
    kept = batch.memo["features"]
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    first.zero_()
    assert torch.equal(remembered(batch, "features", lambda: states_btd[:, 1]), states_btd[:, 0])
