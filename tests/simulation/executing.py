"""Run an op's kernel of one language as machine code, and compare it with the op's reference."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import aiter_inductor.kernels
from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core.arch import arch_named
from aiter_inductor.kernels.hip import loading
from aiter_inductor.kernels.triton import simulated
from tests.lowerings.checks import assert_close, assert_same_layout
from tests.simulation.cases import Case, cases

ARCHS = ("gfx942", "gfx950")
LANGUAGES = ("triton", "hip")
SIMULATING = {"triton": simulated.simulating, "hip": loading.simulating}


@cache
def modules(language: str) -> tuple[ModuleType, ...]:
    """Every module of `kernels/<language>`."""
    package = importlib.import_module(f"{aiter_inductor.kernels.__name__}.{language}")
    names = (f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__))
    return tuple(importlib.import_module(name) for name in names)


def host_function(op: str, language: str) -> Callable[..., Any]:
    """The function that launches the kernel, without the provider's ways around a failure."""
    (found,) = {id(f): f for m in modules(language) if (f := getattr(m, op, None))}.values()
    return found


def written_in(language: str) -> list[str]:
    """Names of the ops that have a kernel in this language."""
    return [op.name for op in load_ops().values() if language in op.providers]


def serves(op: str, language: str, arch: str) -> bool:
    """Whether the op's kernel in this language is for the chip at all."""
    return load_ops()[op].providers[language].serves(arch_named(arch))


def cases_of(language: str) -> list[Case]:
    """Every case that a kernel of this language takes."""
    ops = written_in(language)
    return [case for case in cases() if case.op in ops and takes(case, language)]


def takes(case: Case, language: str) -> bool:
    """Whether the op's kernel in this language is for such a case; HIP attends from one query."""
    if case.op == "attention" and language == "hip":
        return case.style.fields.get("num_queries") == 1
    return language in case.style.languages


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, new memory is NaN, or the largest integer, until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def execute(op: str, language: str, arch: str, args: Any, kwargs: Any) -> Any:
    """What the kernel's machine code makes of the arguments; raises what the simulator finds."""
    with poisoned(), SIMULATING[language](arch):
        return load_ops()[op].outcome(host_function(op, language), args, kwargs)


def assert_right(op: str, out: Any, args: Any, kwargs: Any) -> None:
    """`out` is what the op's reference computes, in its shapes, dtypes and strides."""
    expected = load_ops()[op].outcome(load_ops()[op].reference, args, kwargs)
    assert_same_layout(out, expected)
    if op == "quant_int4_per_group":
        out, expected = ((nibbles(packed), scale) for packed, scale in (out, expected))
    assert_close(out, expected, what=op)


def nibbles(packed: Tensor) -> Tensor:
    """[*, N / 2] bytes as [*, N] int8 in [-8, 7], the low nibble first."""
    both = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int8)
    return torch.where(both > 7, both - 16, both)
