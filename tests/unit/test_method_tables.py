"""The tables of methods in the documentation are those of the code."""

import runpy
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "method_tables.py"


def test_the_tables_of_methods_are_those_of_the_code():
    tool = runpy.run_path(str(TOOL))
    for page, columns in tool["COLUMNS"].items():
        text = page.read_text(encoding="utf-8")
        assert tool["written"](columns) in text, "run python tools/method_tables.py"
        assert tool["filled"](page) == text
