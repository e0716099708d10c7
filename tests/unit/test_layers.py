"""What may import what, and what may not occur anywhere in the package."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lamina

ROOT = Path(lamina.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LEVELS = (
    ("errors", "types"),
    ("rng", "files"),
    ("maths", "config", "data", "backbones", "adapters"),
    ("learner", "record"),
    ("methods", "report"),
    ("engine",),
    ("speed",),
    ("runs",),
    ("compare", "model"),
    ("export", "serve"),
    ("cli",),
    ("__main__",),
)
"""Parts of one level do not import each other."""
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
FACADE = "lamina/__init__.py"
"""Lists the public names, and imports each when it is first used."""


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("lamina", *parts)).removesuffix(".__init__")


MODULES = {dotted(path): path for path in FILES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path, *, typing_too: bool = True) -> tuple[str, ...]:
    """Every module imported anywhere in a file, also inside functions; `from a import b` is a.b where that is a module."""
    return tuple(_imports(path, typing_too))


def _imports(path: Path, typing_too: bool) -> Iterator[str]:
    tree = parsed(path)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_too:
            skipped |= {inner for part in node.body for inner in ast.walk(part)}
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "lamina" and name != "lamina"}


every_module = pytest.mark.parametrize("module", sorted(MODULES), ids=str)


def test_every_module_has_a_level():
    assert {part(module) for module in MODULES} - {""} == LEVEL.keys(), "give a new module a level in this file"


@every_module
def test_a_module_imports_from_lower_levels_only(module: str):
    mine = part(module)
    if not mine:
        assert not ours(MODULES[module])
        return
    for other in {part(name) for name in ours(MODULES[module])} - {mine}:
        assert LEVEL[other] < LEVEL[mine], f"{module} (level {LEVEL[mine]}) imports {other} (level {LEVEL[other]})"


def test_there_are_no_import_cycles():
    graph = {module: ours(path) - {module} for module, path in MODULES.items()}
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    for module, needed in graph.items():  # importing a.b runs a's __init__ first, which is no use of it
        graph[module] = {name for name in needed if name not in packages or not module.startswith(f"{name}.")}
    list(TopologicalSorter(graph).static_order())


SHARED = {"lamina.methods.base", "lamina.methods.first_session", "lamina.methods.routed"}
"""What several methods have in common."""


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_a_method_knows_no_other_method_and_nothing_above_it(path: Path):
    used = set(imports(path))
    others = {name for name in used if name.startswith("lamina.methods.")} - SHARED
    assert path.stem == "__init__" or not others
    forbidden = ("lamina.engine", "lamina.data", "lamina.data.streams", "lamina.backbones", "transformers", "timm")
    assert not {name for name in used if name.startswith(forbidden)}


@pytest.mark.parametrize("path", sorted((ROOT / "engine").glob("*.py")), ids=lambda path: path.stem)
def test_the_engine_names_no_method(path: Path):
    assert {name for name in imports(path) if name.startswith("lamina.methods")} <= {"lamina.methods.base"}
    for file in (ROOT / "methods").glob("[a-z]*.py"):
        if file.stem != "base":
            assert f'"{file.stem}"' not in path.read_text(encoding="utf-8")


EDGES = {
    "transformers": ("backbones", "data/", "speed/attention.py", "speed/rms_norm.py", "export/"),
    "huggingface_hub": ("backbones", "data/"),
    "datasets": ("data/",),
    "pyarrow": ("data/",),
    "sklearn": ("data/digits.py",),
    "PIL": ("data/", "export/merged.py"),
    "safetensors": ("backbones", "engine/checkpoint.py", "export/"),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "jinja2": ("report/",),
    "fastapi": ("serve/",),
    "starlette": ("serve/",),
    "uvicorn": ("serve/",),
    "python_multipart": ("serve/",),
    "prometheus_client": ("serve/",),
    "yaml": ("config/", "report/"),
    "peft": ("export/",),
    "onnx": (),
    "onnxruntime": ("export/graph.py",),
    "timm": (),
    "pickle": (),
    "shelve": (),
    "marshal": (),
    "joblib": (),
}


@pytest.mark.parametrize("library", EDGES)
def test_third_parties_stay_at_their_edge(library: str):
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    strays = {user for user in users if not user.startswith(EDGES[library] or ("nowhere",))}
    assert not strays, f"{library} is imported in {sorted(strays)}"


@cache
def calls(path: Path) -> list[tuple[str, int]]:
    return [(ast.unparse(node.func), node.lineno) for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    "call", ["print", "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.unsafe_load"]
)
def test_calls_that_occur_nowhere(call: str):
    allowed = {"print": {"cli"}}.get(call, set())
    found = [
        f"{path.name}:{line}"
        for path in FILES
        for name, line in calls(path)
        if name == call and path.parent.name not in allowed
    ]
    assert not found, f"{call} is called in {found}"


def test_yaml_and_arrays_are_read_without_running_code():
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            match ast.unparse(node.func):
                case "yaml.load" | "yaml.compose":
                    assert named.get("Loader", "") in ("yaml.SafeLoader", "Loader"), f"{path.name}:{node.lineno}"
                case "np.load" | "np.save" | "open_memmap":
                    assert named.get("allow_pickle", "False") == "False", f"{path.name}:{node.lineno}"


def test_the_yaml_loader_is_a_safe_one_that_also_reads_1e_3():
    from lamina.config import Loader

    assert Loader.yaml_constructors == __import__("yaml").SafeLoader.yaml_constructors


def test_no_file_is_a_drawer_for_everything():
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "tools", "core"}


def test_importing_the_package_imports_no_torch():
    """And neither does the command line, which must answer at once."""
    import subprocess
    import sys

    code = (
        "import sys, lamina, lamina.cli; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_there():
    for name in lamina.__all__:
        assert getattr(lamina, name) is not None
    with pytest.raises(AttributeError, match="'lamina' has no attribute 'nothing'"):
        _ = lamina.nothing


PLAIN = ("adapters", "learner", "methods", "engine", "backbones", "data", "maths")
FAST = ("speed", "fused", "split_batch", "cuda_graph", "prefetch", "composed")


@pytest.mark.parametrize("part", PLAIN)
def test_the_plain_path_names_nothing_that_makes_it_faster(part: str):
    for module, path in MODULES.items():
        if module.startswith(f"lamina.{part}"):
            names = {n.id for n in ast.walk(parsed(path)) if isinstance(n, ast.Name)}
            assert not {name for name in names if any(word in name.lower() for word in FAST)}, module


NAMED_TUPLE = {"_replace", "_asdict", "_fields"}
FOREIGN = {
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_softmax_backward_data",
    "_attn_implementation",
}
"""Of PyTorch and transformers."""


@every_module
def test_no_private_name_is_reached_from_another_module(module: str):
    tree = parsed(MODULES[module])
    defined = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    defined |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    defined |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lamina"):
            assert not [a.name for a in node.names if a.name.startswith("_") and not a.name.endswith("__")]
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            assert node.attr in defined | NAMED_TUPLE | FOREIGN, f"{module}:{node.lineno} reaches {node.attr}"


MOST_LINES, MOST_IN_A_FUNCTION = 480, 75
"""A guide is 400 and 60."""


@every_module
def test_no_module_and_no_function_is_long(module: str):
    text = MODULES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.body[0].lineno + 1  # without a long signature
            assert length <= MOST_IN_A_FUNCTION, f"{module}:{node.name} has {length} lines"


@every_module
def test_every_module_says_what_it_is(module: str):
    text = MODULES[module].read_text(encoding="utf-8")
    assert not text.strip() or re.match(r'"""\S', text), f"{module} has no docstring"
