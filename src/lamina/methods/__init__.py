"""The methods, one file each. A new one needs its file and a line in METHODS."""

from typing import Any

from lamina.methods.base import Method
from lamina.methods.clora import CLoRA
from lamina.methods.color import CoLoR
from lamina.methods.duallora import DualLoRA
from lamina.methods.ewc import EWC
from lamina.methods.finetune import Finetune
from lamina.methods.fsa import FSA
from lamina.methods.inflora import InfLoRA
from lamina.methods.lamina import Lamina
from lamina.methods.moram import MoRAM
from lamina.methods.olora import OLoRA
from lamina.methods.prototype import Prototype
from lamina.methods.ranpac import RanPAC
from lamina.methods.sdlora import SDLoRA
from lamina.methods.slca import SLCA
from lamina.methods.sora import SoRA
from lamina.methods.taskarithmetic import TaskArithmetic

METHODS: dict[str, type[Method[Any]]] = {
    "lamina": Lamina,
    "inflora": InfLoRA,
    "finetune": Finetune,
    "prototype": Prototype,
    "fsa": FSA,
    "ranpac": RanPAC,
    "slca": SLCA,
    "taskarithmetic": TaskArithmetic,
    "ewc": EWC,
    "color": CoLoR,
    "sora": SoRA,
    "sdlora": SDLoRA,
    "clora": CLoRA,
    "olora": OLoRA,
    "moram": MoRAM,
    "duallora": DualLoRA,
}


def table() -> list[dict[str, str]]:
    """Returns one row per method, by column: the table of `lamina methods` and of the documentation."""
    return [
        {
            "method": name,
            "paper": method.paper.venue,
            "examples": f"{method.needs.stored_examples} per class" if method.needs.stored_examples else "none stored",
            "task count": "optional" if method.needs.task_count else "not needed",
            "cost per task": method.needs.cost_per_task,
            "when to use": method.advice,
        }
        for name, method in METHODS.items()
    ]
