"""What `accelerate` needs of instances: to replace one of their attributes, and to know their hooks."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lamina.backbones import class_token


def replace(owner: object, name: str, value: object) -> Callable[[], None]:
    """Give this attribute of the instance another value. Returns a function that undoes it."""
    own = vars(owner)
    before = {name: own[name]} if name in own else {}
    own[name] = value

    def undo() -> None:
        del own[name]
        own.update(before)

    return undo


def hooks_of(part: nn.Module) -> list[Any]:
    """Returns the hooks that watch this module or change what it computes, without `class_token`."""
    before = [hook for hook in part._forward_pre_hooks.values() if hook is not class_token]
    others = (part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
    return [*before, *(hook for hooks in others for hook in hooks.values())]
