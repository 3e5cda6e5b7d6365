"""The rules that keep the code readable, as tests over its source: layers, sizes, ambient state."""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aiter_inductor"
SIMULATOR = ROOT / "cdnasim"

MAX_FILE_LINES = 500
MAX_MEDIAN_LINES = 160
MAX_FUNCTION_LINES = 50
MAX_KERNEL_LINES = 70  # Triton inlines what it calls, but returns and early exits stay in one body

LAYERS = ("core", "kernels", "lowerings", "patterns", "top")
"""Bottom to top; a module imports from its own layer and from those below it."""
SUFFIXES = ("_backward", "_quant", "_quant_static")
TORCH_INTERNALS = ("torch._inductor", "torch._dynamo")
INTERNALS_ALLOWED = {
    "core/inductor.py",  # the list of everything asked of Inductor and Dynamo
    "cli/bench_op.py",  # torch._dynamo.reset is documented, and forgets earlier cases
    "cli/bench_model.py",
}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and whether that happens when the file is imported."""

    module: str
    at_module_level: bool
    line: int


def sources(*folders: Path) -> list[Path]:
    return sorted(p for f in folders for p in f.rglob("*.py") if "__pycache__" not in p.parts)


@lru_cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, in functions too; `if TYPE_CHECKING:` does not count."""

    def visit(node: ast.AST, outer: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, outer, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno} imports relatively"
                for alias in child.names:
                    yield Import(f"{child.module}.{alias.name}", outer, child.lineno)
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, outer and not inner)

    yield from visit(tree(path), True)


def layer(dotted: str) -> int:
    """Rank of a module of the package; what is in no folder of `LAYERS` stands on top."""
    parts = dotted.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else len(LAYERS) - 1


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_go_one_way():
    broken = []
    for path in sources(PACKAGE):
        if path.name == "autoload.py":
            continue  # has a test of its own
        own = layer(dotted(path))
        for found in imports(path):
            if not found.module.startswith("aiter_inductor"):
                continue
            if layer(found.module) > own and found.module != "aiter_inductor.__version__":
                broken.append(f"{name_of(path)}:{found.line} imports {found.module}, above it")
    assert not broken, "\n".join(broken)


def test_kernels_are_imported_by_provider_bodies_only():
    broken = [
        f"{name_of(path)}:{found.line} imports {found.module}"
        for path in sources(PACKAGE)
        if dotted(path).split(".")[1:2] not in (["kernels"], ["cli"])
        for found in imports(path)
        if found.module.startswith("aiter_inductor.kernels")
        if found.at_module_level or not dotted(path).startswith("aiter_inductor.lowerings")
    ]
    assert not broken, "\n".join(broken)


def test_kernels_know_no_ops_and_no_graphs():
    banned = ("torch.fx", "aiter_inductor.core.op", "aiter_inductor.core.graph")
    broken = [
        f"{name_of(path)}:{found.line} imports {found.module}"
        for path in sources(PACKAGE / "kernels")
        for found in imports(path)
        if found.module.startswith(banned)
    ]
    assert not broken, "\n".join(broken)


def test_triton_is_imported_under_kernels_only():
    broken = [
        f"{name_of(path)}:{found.line} imports {found.module}"
        for path in sources(PACKAGE)
        for found in imports(path)
        if found.module.split(".")[0] == "triton"
        if not dotted(path).startswith("aiter_inductor.kernels")
        # Inside a function of core it is the wheel's assembler, not the language.
        if found.at_module_level or not dotted(path).startswith("aiter_inductor.core.")
    ]
    assert not broken, "\n".join(broken)


def test_core_names_no_op():
    from aiter_inductor.cli.cases import load_ops

    distinctive = {name for name in load_ops() if "_" in name}
    for path in sources(PACKAGE / "core"):
        calls = {
            node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call)
        }
        assert not calls & distinctive, f"{name_of(path)} calls {calls & distinctive}"


def test_simulator_stands_alone():
    for path in sources(SIMULATOR):
        for found in imports(path):
            assert not found.module.startswith(("aiter_inductor", "torch")), f"{path}:{found.line}"


def test_autoload_imports_only_what_import_torch_has():
    """It runs at the end of every `import torch` on the machine."""
    wanted = {"functools", "typing.Any", "__future__.annotations"}
    found = {i.module for i in imports(PACKAGE / "autoload.py") if i.at_module_level}
    assert found <= wanted, found - wanted


def test_environment_is_read_in_one_place():
    broken = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources(PACKAGE)
        if name_of(path) != "core/config.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    ]
    assert not broken, "the environment is read in core/config.py only: " + ", ".join(broken)


def test_torch_internals_are_in_one_list():
    broken = []
    for path in sources(PACKAGE):
        if name_of(path) in INTERNALS_ALLOWED:
            continue
        broken += [
            f"{name_of(path)}:{i.line} imports {i.module}"
            for i in imports(path)
            if i.module.startswith(TORCH_INTERNALS)
        ]
        broken += [
            f"{name_of(path)}:{node.lineno} uses {ast.unparse(node)}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute) and ast.unparse(node) in TORCH_INTERNALS
        ]
    assert not broken, "\n".join(broken)


def test_no_wildcards_and_no_swallowed_errors():
    broken = []
    for path in sources(PACKAGE, SIMULATOR):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                broken.append(f"{path}:{node.lineno} imports *")
            if isinstance(node, ast.ExceptHandler) and all(
                isinstance(line, ast.Pass) for line in node.body
            ):
                broken.append(f"{path}:{node.lineno} swallows an error")
    assert not broken, "\n".join(broken)


def test_files_and_functions_are_short():
    broken, lengths = [], []
    for path in sources(PACKAGE, SIMULATOR):
        lines = len(path.read_text().splitlines())
        lengths += [lines] if lines > 1 else []
        if lines > MAX_FILE_LINES:
            broken.append(f"{path.relative_to(ROOT)} has {lines} lines, more than {MAX_FILE_LINES}")
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
                continue
            # A signature and a docstring may be as long as they need to be.
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            size = (node.end_lineno or 0) - body[0].lineno + 1
            limit = MAX_KERNEL_LINES if "kernels" in path.parts else MAX_FUNCTION_LINES
            if size > limit:
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                broken.append(f"{where} {node.name} has {size} lines, more than {limit}")
    assert not broken, "\n".join(broken)
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES


def test_native_sources_are_short():
    suffixes = {".hip", ".cu", ".h", ".hpp", ".c", ".cpp", ".s"}
    folders = (PACKAGE, SIMULATOR)
    long = [
        f"{p.relative_to(ROOT)} has {n} lines"
        for f in folders
        for p in f.rglob("*")
        if p.suffix in suffixes and (n := len(p.read_text().splitlines())) > MAX_FILE_LINES
    ]
    assert not long, "\n".join(long)


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()


def test_every_file_says_what_it_is_for():
    for path in sources(PACKAGE, SIMULATOR):
        if path.name != "__init__.py":
            assert ast.get_docstring(tree(path)), f"{path.relative_to(ROOT)} has no docstring"


def is_tested(name: str, text: str) -> bool:
    """Whether `name` occurs, whole or put together from a stem as in `OPS[f"{stem}_backward"]`."""
    stems = (name.removesuffix(suffix) for suffix in SUFFIXES if f"}}{suffix}" in text)
    return name in text or any(stem != name and stem in text for stem in stems)


def test_every_op_is_tested():
    """Each op's name occurs in a test of its meaning; one with kernels also in a test of those."""
    from aiter_inductor.cli.cases import load_ops

    meaning = "".join(p.read_text() for p in sources(ROOT / "tests" / "lowerings"))
    kernels = "".join(p.read_text() for p in sources(ROOT / "tests" / "kernels"))
    ops = load_ops().values()
    assert not [op.name for op in ops if not is_tested(op.name, meaning)]
    assert not [op.name for op in ops if op.providers and not is_tested(op.name, kernels)]


def fastest_ms(code: str, repeats: int = 3, **environment: str) -> float:
    """The least that `code`, which prints milliseconds, prints in fresh processes."""
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    return min(
        float(subprocess.run(command, env=env, cwd=ROOT, capture_output=True, check=True).stdout)
        for _ in range(repeats)
    )


@pytest.mark.parametrize(
    ("statement", "limit_ms"),
    [("import aiter_inductor", 50), ("import aiter_inductor.core.config", 10)],
)
def test_import_is_cheap(statement, limit_ms):
    code = f"""
import torch, time, sys
for name in [n for n in sys.modules if n.startswith("aiter_inductor")]:
    del sys.modules[name]
start = time.perf_counter()
{statement}
print((time.perf_counter() - start) * 1e3)
"""
    assert fastest_ms(code) < limit_ms


def test_import_torch_costs_nothing_more():
    """What torch's autoload does for this package, without AITER_INDUCTOR in the environment."""
    code = """
import os, time
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
start = time.perf_counter()
from aiter_inductor.autoload import autoload
autoload()
print((time.perf_counter() - start) * 1e3)
"""
    assert fastest_ms(code, AITER_INDUCTOR="0") < 10
