"""Exports and imports. A model is written in the formats of other libraries, each compared with the model before it gets its
name; an adapter that was trained elsewhere becomes a task of a model."""

from lamina.export.formats import export_merged, export_onnx, export_peft, export_tasks
from lamina.export.importing import import_adapter
from lamina.export.written import Difference, Exported

__all__ = ["Difference", "Exported", "export_merged", "export_onnx", "export_peft", "export_tasks", "import_adapter"]
