"""The report: run records in, one self-contained HTML page out."""

from lamina.report.page import RECORD_FORMAT, read_record, render, template, write, write_text

__all__ = ["RECORD_FORMAT", "read_record", "render", "template", "write", "write_text"]
