"""docs/architecture.md and its drawing are those of the code."""

import runpy
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "architecture.py"


def test_the_page_and_the_drawing_are_those_of_the_code():
    tool = runpy.run_path(str(TOOL))
    imports = tool["parts"]()
    assert tool["DRAWING"].read_text(encoding="utf-8") == tool["drawing"](imports), "run python tools/architecture.py"
    assert tool["table"](imports) in tool["PAGE"].read_text(encoding="utf-8"), "run python tools/architecture.py"


def test_a_cycle_is_refused():
    tool = runpy.run_path(str(TOOL))
    with pytest.raises(ValueError, match="cycle among"):
        tool["levels"]({"a": {"b"}, "b": {"a"}, "c": set()})


def test_an_arrow_that_others_imply_is_not_drawn():
    tool = runpy.run_path(str(TOOL))
    assert tool["without_shortcuts"]({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
