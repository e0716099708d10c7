"""The report: records of runs in, one self-contained HTML page out."""

from lamina.report.page import render, template, write, write_text

__all__ = ["render", "template", "write", "write_text"]
