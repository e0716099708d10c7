"""What `accelerate` needs of instances: to replace one of their attributes for a while, and to know who watches them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lamina.backbones import class_token


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Within the context this attribute of the instance has another value. Its class stays as it is."""
    own = vars(owner)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)


def is_watched(part: nn.Module) -> bool:
    """Returns whether a hook watches this module, or changes what it computes. `class_token` does not count."""
    before = [hook for hook in part._forward_pre_hooks.values() if hook is not class_token]
    return bool(before or part._forward_hooks or part._backward_hooks or part._backward_pre_hooks)
