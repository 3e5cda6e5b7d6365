"""No kernel goes without a simulation: each op, size, entry point and HIP kernel is looked for."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import aiter_inductor.kernels
from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from tests.kernels.triton.compiled import Recorder
from tests.simulation.executing import (
    ARCHS,
    LANGUAGES,
    cases_of,
    host_function,
    modules,
    serves,
    written_in,
)

KERNELS = Path(aiter_inductor.kernels.__file__).parent
HIP_KERNEL = re.compile(r'(?:SIMT_KERNEL\(.*?\)|extern "C" __global__.*?\bvoid)\s+(\w+)\(')

Launch = Callable[..., None]

_DEQUANTISING = "tests/kernels/triton/test_dequantise_simulated.py"
BESIDE_OPS = {"dequantise_kernel": _DEQUANTISING, "dequantise_tiles_kernel": _DEQUANTISING}
"""Kernels that no Triton provider launches, and the tests that execute them."""


def is_jit(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
    )


def triton_entry_points() -> set[str]:
    """Kernels: the compiled functions that no other compiled function calls."""
    trees = [ast.parse(path.read_text()) for path in (KERNELS / "triton").rglob("*.py")]
    compiled = [node for tree in trees for node in ast.walk(tree) if is_jit(node)]
    used = {
        inner.id
        for function in compiled
        for inner in ast.walk(function)
        if isinstance(inner, ast.Name)
    }
    return {function.name for function in compiled} - used


def hip_kernels() -> set[str]:
    """Every kernel in a source or header of `kernels/hip`, as `file:kernel`."""
    sources = [path for path in (KERNELS / "hip").iterdir() if path.suffix == ".hip"]
    return {f"{p.stem}:{name}" for p in sources for name in HIP_KERNEL.findall(p.read_text())}


class LoadedKernels:
    """Stands in for `load_kernel`: notes what would be launched, and launches nothing."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __call__(self, variant: Any, arch: str, device_type: str) -> Any:
        names = self.names

        class Kernel:
            def launch(self, *arguments: Any) -> None:
                (source,) = variant.module().sources
                names.add(f"{source.stem}:{variant.signature().name}")

        return Kernel()


@contextmanager
def recorded(language: str) -> Iterator[Callable[[], set[str]]]:
    """Within, host functions launch nothing; yields what asks for the names of their kernels."""
    recorder, kernels = Recorder(), LoadedKernels()
    hook = {"triton": ("launchable", recorder), "hip": ("load_kernel", kernels)}[language]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules(language):
            if hasattr(module, hook[0]):
                patch.setattr(module, *hook)
        yield lambda: kernels.names | {kernel.__name__ for kernel, _ in recorder.launches}


@cache
def reached(language: str) -> set[str]:
    """Kernels that the cases launch."""
    with recorded(language) as names:
        for case in cases_of(language):
            args, kwargs = case.arguments(ARCHS[0])
            host_function(case.op, language)(*args, **kwargs)
        return names()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_op_has_two_sizes_and_a_ragged_one(language):
    missing = []
    for name in written_in(language):
        taken = [case for case in cases_of(language) if case.op == name]
        sizes = {tuple(case.dims.items()) for case in taken}
        if len(sizes) < 2 or not any(case.ragged for case in taken):
            missing.append(f"{name} is simulated at {[str(case) for case in taken]}")
    assert not missing, "add sizes to tests/simulation/cases.py:\n" + "\n".join(missing)


@pytest.mark.parametrize(
    ("language", "all_kernels"), [("triton", triton_entry_points), ("hip", hip_kernels)]
)
def test_every_kernel_is_reached(language, all_kernels):
    assert all_kernels(), "the sources have been moved"
    missing = all_kernels() - reached(language)
    for name, path in BESIDE_OPS.items():
        if name in missing and name in (KERNELS.parent.parent / path).read_text():
            missing.remove(name)
    assert not missing, f"no case in tests/simulation/cases.py launches {sorted(missing)}"
    assert reached(language) <= all_kernels(), "a kernel that the sources do not show"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_case_is_one_that_the_kernel_refuses(language):
    for case in cases_of(language):
        provider = load_ops()[case.op].providers[language]
        for arch in (arch for arch in ARCHS if serves(case.op, language, arch)):
            refusal = provider.refuse(case.problem(arch), Use(arch_named(arch)))
            assert refusal is None, f"{case}: {refusal}"
