"""The report: records of runs in, one self-contained HTML page out."""

from lamina.report.page import render, template, write, write_text
from lamina.report.run_view import Drawing

__all__ = ["Drawing", "render", "template", "write", "write_text"]
