"""What `accelerate` needs of instances: to replace one of their attributes, and to know whether anything watches them."""

from collections.abc import Callable

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


def is_watched(part: nn.Module) -> bool:
    """Returns whether a hook watches this module, or changes what it computes. `class_token` does not count."""
    before = [hook for hook in part._forward_pre_hooks.values() if hook is not class_token]
    return bool(before or part._forward_hooks or part._backward_hooks or part._backward_pre_hooks)
