"""docs/reading-order.md: what it names exists, in an order in which every name is explained before it is used."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "lamina"
MOST = 900
"""Lines of code, without blank lines, comments and docstrings."""
ITEM = re.compile(r"^\d+\. \[([\w/]+\.py)\]\([^)]*\): (.*?)\.\s+[A-Z]", re.MULTILINE | re.DOTALL)
EXPLAINED = {"seed_of", "Departure", "Paper", "Needs", "Refusal", "MethodConfig"}
"""Not in the list, because their names say enough."""


class Piece(NamedTuple):
    file: str
    name: str
    code: str


def pieces() -> list[Piece]:
    """The functions and classes that the page lists, in its order."""
    found = []
    for file, names in ITEM.findall((ROOT / "docs" / "reading-order.md").read_text(encoding="utf-8")):
        text = (SOURCE / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            node: ast.AST = ast.parse(text)
            for part in name.split("."):
                (node,) = (inner for inner in node.body if getattr(inner, "name", None) == part)
            found.append(Piece(file, name, ast.get_source_segment(text, node)))
    return found


def lines_of(code: str) -> int:
    tree, lines = ast.parse(code), code.splitlines()
    skipped: set[int] = set()
    for node in ast.walk(tree):
        for inner in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
                skipped |= set(range(inner.lineno, inner.end_lineno + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in skipped
        for number, line in enumerate(lines, 1)
    )


def defined(file: str) -> set[str]:
    tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def test_it_leads_through_at_most_so_many_lines():
    found = pieces()
    assert len(found) > 50
    assert sum(lines_of(piece.code) for piece in found) <= MOST


def test_every_name_is_explained_before_it_is_used():
    """Of the classes and functions that the files on the page define."""
    found = pieces()
    listed = {piece.name.split(".")[0] for piece in found}
    known = {name for piece in found for name in defined(piece.file)} & (
        listed | set().union(*(defined(p.file) for p in found))
    )
    seen: set[str] = set(EXPLAINED) | {"Learner", "Loop"}
    late: list[str] = []
    of_file: dict[str, set[str]] = {}
    for piece in found:
        of_file.setdefault(piece.file, set()).add(piece.name.split(".")[0])
    for piece in found:
        seen |= of_file[piece.file]  # a file is read as one
        names = {
            n.id for n in ast.walk(ast.parse(piece.code)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        }
        late += [f"{piece.name} uses {name}" for name in sorted(names & known - seen)]
    assert not late, "\n".join(late)
