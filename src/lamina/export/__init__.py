"""Exports: what a model has learnt, in the formats of other libraries. Each is compared with the model before it is written;
and adapters that were trained elsewhere."""

from lamina.export.adapter import export_peft
from lamina.export.graph import export_onnx
from lamina.export.importing import import_adapter
from lamina.export.merged import export_merged
from lamina.export.tasks import export_tasks
from lamina.export.written import Difference, Exported

__all__ = ["Difference", "Exported", "export_merged", "export_onnx", "export_peft", "export_tasks", "import_adapter"]
