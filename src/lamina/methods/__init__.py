"""The methods, one file each. To add one: its file, and a line here."""

from typing import Any

from lamina.methods.base import Method
from lamina.methods.clora import CLoRA
from lamina.methods.color import CoLoR
from lamina.methods.duallora import DualLoRA
from lamina.methods.ewc import EWC
from lamina.methods.finetune import Finetune
from lamina.methods.inflora import InfLoRA
from lamina.methods.lamina import Lamina
from lamina.methods.olora import OLoRA
from lamina.methods.prototype import Prototype
from lamina.methods.sdlora import SDLoRA
from lamina.methods.sora import SoRA
from lamina.methods.taskarithmetic import TaskArithmetic

METHODS: dict[str, type[Method[Any]]] = {
    "lamina": Lamina,
    "inflora": InfLoRA,
    "finetune": Finetune,
    "prototype": Prototype,
    "taskarithmetic": TaskArithmetic,
    "ewc": EWC,
    "color": CoLoR,
    "sora": SoRA,
    "sdlora": SDLoRA,
    "clora": CLoRA,
    "olora": OLoRA,
    "duallora": DualLoRA,
}
