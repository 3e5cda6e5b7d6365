"""What an op is asked to compute, as named dimensions.

One frozen object per call feeds eligibility, the tuning key, CSV columns, the log line, sample
inputs and the roofline. Dimensions that a graph leaves open are sympy expressions: arithmetic and
comparisons on them never install a guard, and `fixed` tells which of them are plain integers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

Dim = Any
"""An int, or the sympy expression of a SymInt."""


def dim(size: int | torch.SymInt) -> Dim:
    """`size` as an int where it is one, else the expression behind it. Installs no guard."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_number else expr


def fixed(size: Dim) -> int | None:
    """`size` if it is an integer known at compile time, else None."""
    return size if isinstance(size, int) else None


def product(sizes: Sequence[int | torch.SymInt]) -> Dim:
    """The product of some sizes, 1 for none."""
    return math.prod(map(dim, sizes))


def is_row_major(x: torch.Tensor) -> bool:
    """Whether `x` is contiguous, decided on expressions and so without a guard."""
    stride: Dim = 1
    for n, found in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if dim(n) != 1 and dim(found) != stride:
            return False
        stride = stride * dim(n)
    return True


@runtime_checkable
class Problem(Protocol):
    """What every op's problem offers; implementations are frozen dataclasses."""

    def bytes_moved(self) -> Dim:
        """The least bytes to move: each input read once, each output written once."""

    def flops(self) -> Dim:
        """Floating-point operations."""

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random `(args, kwargs)` for the op, reproducible by `seed`."""


def columns(problem: Problem) -> dict[str, str]:
    """The problem as named text columns, in declaration order: CSV row, tuning key, log line."""
    row = {}
    for field in dataclasses.fields(problem):  # type: ignore[arg-type]
        value = getattr(problem, field.name)
        row[field.name] = str(value).removeprefix("torch.")
    return row


def describe(problem: Problem) -> str:
    """One line, `num_rows=64 N=7168 dtype=bfloat16`."""
    return " ".join(f"{name}={value}" for name, value in columns(problem).items())
