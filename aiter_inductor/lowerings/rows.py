"""The problem that every row-wise op shares, and the ranges its kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed, product

MAX_N = 65536


@dataclass(frozen=True)
class RowProblem:
    """Rows of one tensor, each handled alone.

    Attributes:
        num_rows: product of the leading sizes of x.
        N: length of a row.
        dtype: dtype of x.
        weight_dtype: dtype of the weight, or None.
        row_contiguous: whether x's last stride is 1.
    """

    num_rows: Dim
    N: Dim
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    row_contiguous: bool

    @classmethod
    def of_norm(cls, x: Tensor, weight: Tensor | None, eps: float, **_: Any) -> RowProblem:
        """The problem of a normalisation without residual."""
        return cls(
            num_rows=product(x.shape[:-1]),
            N=dim(x.shape[-1]),
            dtype=x.dtype,
            weight_dtype=None if weight is None else weight.dtype,
            row_contiguous=x.stride(-1) == 1,
        )

    def bytes_moved(self) -> Dim:
        """One read and one write of the rows."""
        return 2 * self.num_rows * self.N * self.dtype.itemsize

    def flops(self) -> Dim:
        """A square, an addition and two multiplications an element."""
        return 4 * self.num_rows * self.N

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random rows and a weight around one."""
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(self.num_rows, self.N, generator=generator, device=device)
        weight = None
        if self.weight_dtype is not None:
            weight = 1 + 0.1 * torch.randn(self.N, generator=generator, device=device)
            weight = weight.to(self.weight_dtype)
        return (x.to(self.dtype), weight, 1e-6), {}


def rows_unsupported(problem: RowProblem, use: Use) -> str | None:
    """What no row kernel takes."""
    if problem.dtype not in ROW_DTYPES:
        return f"x is {short_name(problem.dtype)}; row kernels read bfloat16, float16 and float32"
    N = fixed(problem.N)
    if N is None:
        return f"the row length {problem.N} is not known when compiling"
    if not 0 < N <= MAX_N:
        return f"N={N} is outside 1 to {MAX_N}, the rows one workgroup holds"
    if not problem.row_contiguous:
        return "the last dimension of x is strided; row kernels read it with stride 1"
    return None
