"""The documentation's own code: what stands in docs/add-a-method.md is taken from there and held against the laws."""

import re
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from tests.conformance import cases
from tests.conformance import test_growth as growth
from tests.conformance import test_methods as laws
from tests.conformance.cases import HOME, Trail, World, walk

from lamina.methods import METHODS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-method.md"


def load(name: str, file: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    file.write_text(text, encoding="utf-8")
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> laws.Walks:
    """The page's method is in the library, with the page's row in the table."""
    example, row = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(example.splitlines()) < 100
    method = load("lamina.methods.anchored", tmp_path / "anchored.py", example, monkeypatch).Anchored
    row = f"from tests.conformance.cases import Case, SHARED_LORA, one_adapter\n\nROW = {row}"
    monkeypatch.setitem(METHODS, "anchored", method)
    monkeypatch.setitem(cases.CASES, "anchored", load("row_of_anchored", tmp_path / "row.py", row, monkeypatch).ROW)
    walked: dict[World, Trail] = {}

    def find(name: str, world: World) -> Trail:
        if world not in walked:
            walked[world] = walk(name, world, tmp_path / f"trail-{world}")
        return walked[world]

    return find


def test_the_example_of_a_method_obeys_the_laws(
    trail: laws.Walks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laws.checkpoint, "fsync", lambda _: None)
    laws.test_it_is_one_file_that_bears_its_name("anchored")
    laws.test_every_setting_is_explained_has_a_default_and_cannot_be_changed("anchored")
    laws.test_its_record_is_complete_and_plain_json("anchored")
    laws.test_training_moves_what_is_declared_and_nothing_else("anchored", HOME, trail)
    laws.test_a_run_resumed_from_anywhere_ends_in_the_same_bits("anchored", True, trail, tmp_path / "resumed")
    laws.test_a_prediction_does_not_depend_on_the_rest_of_its_batch("anchored", World("bert", "domain"), trail)
    laws.test_it_keeps_what_it_declares("anchored", World("fused_vit", "mixed"), trail, tmp_path / "kept")
    laws.test_it_learns("anchored", trail)
    laws.test_its_row_of_the_generated_table_is_complete_and_fits_on_a_screen("anchored")
    costs = cache(lambda name: growth.costs_of(name, tmp_path / "grown"))
    for part in growth.PARTS:
        growth.test_cost_grows_as_documented("anchored", part, costs)
    growth.test_memory_stays_within_its_bound_which_grows_no_faster_than_the_law("anchored", costs)
