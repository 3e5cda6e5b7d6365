"""The problem that every row-wise op shares, and the ranges its kernels take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import FP8_DTYPES, QUANT_DTYPES, ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed, product
from aiter_inductor.core.rows import MAX_LEVELS, num_loops, result_is_strided
from aiter_inductor.lowerings.arguments import apart, no_scale

MAX_N = 65536
MAX_BACKWARD_N = 16384
HOPPER_ROW_BYTES = range(512, 16384 + 1, 512)
"""A vector of 16 bytes for each lane of a warp, and for each of up to 1024 threads."""


@dataclass(frozen=True)
class RowProblem:
    """Rows of one tensor, each handled alone.

    Attributes:
        arguments: names of the op's positional arguments, in order, space-separated.
        num_rows: product of the leading sizes of x.
        N: length of a row.
        dtype: dtype of x.
        residual_dtype: dtype of the residual or of the output's gradient, or None.
        weight_dtype: dtype of the weight, or None.
        bias_dtype: dtype of the bias, or None.
        out_dtype: dtype of the rows written.
        group_size: elements that share a scale; None for the whole row or no scale at all.
        levels: nested loops that visit the rows of all row tensors.
        row_contiguous: whether the last stride of every row tensor is 1.
        mismatch: why the tensors do not belong together, or None.
        qmin: lower bound of a quantisation by a given scale, None for its dtype's symmetric one.
    """

    arguments: str
    num_rows: Dim
    N: Dim
    dtype: torch.dtype
    residual_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None
    out_dtype: torch.dtype = torch.bfloat16
    group_size: int | None = None
    levels: int = 1
    row_contiguous: bool = True
    mismatch: str | None = None
    qmin: float | None = None

    @classmethod
    def of(
        cls,
        arguments: str,
        rows: tuple[Tensor, ...],
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        group_size: int | None = None,
        scales: bool = False,
    ) -> RowProblem:
        """The problem over `rows`, of which the first is x and the second a residual.

        Args:
            scales: whether scales are written, row-major, besides the rows.
        """
        x = rows[0]
        N = dim(x.shape[-1]) if x.dim() else 1
        mismatch = _mismatch(rows, N, weight, bias)
        return cls(
            arguments=arguments,
            num_rows=product(x.shape[:-1]),
            N=N,
            dtype=x.dtype,
            residual_dtype=rows[1].dtype if len(rows) > 1 else None,
            weight_dtype=None if weight is None else weight.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            out_dtype=out_dtype or x.dtype,
            group_size=group_size,
            levels=1 if mismatch else num_loops(*rows, row_major_output=scales),
            row_contiguous=all(t.dim() > 0 and dim(t.stride(-1)) == 1 for t in rows),
            mismatch=mismatch,
        )

    @classmethod
    def of_norm(
        cls,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        *,
        out_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> RowProblem:
        """RMSNorm without residual."""
        return cls.of("x weight eps", (x,), weight=weight, out_dtype=out_dtype)

    @classmethod
    def of_add_norm(
        cls,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        *,
        out_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> RowProblem:
        """RMSNorm of a sum."""
        return cls.of("x residual weight eps", (x, residual), weight=weight, out_dtype=out_dtype)

    @classmethod
    def of_layer_norm(
        cls,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> RowProblem:
        """LayerNorm."""
        return cls.of("x weight bias eps", (x,), weight=weight, bias=bias, out_dtype=out_dtype)

    @classmethod
    def of_norm_backward(
        cls, grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, **_: Any
    ) -> RowProblem:
        """Gradients of a normalisation."""
        return cls.of("grad x weight eps", (x, grad), weight=weight)

    @classmethod
    def of_add_norm_backward(
        cls, grad: Tensor, grad_sum: Tensor, x: Tensor, weight: Tensor | None, eps: float, **_: Any
    ) -> RowProblem:
        """Gradients of the normalisation of a sum that is used elsewhere too."""
        return cls.of("grad grad_sum x weight eps", (x, grad, grad_sum), weight=weight)

    def bytes_moved(self) -> Dim:
        """Each row tensor read or written once; weights are read once for all rows."""
        beside_x = sum(name in ("grad", "grad_sum", "residual") for name in self.arguments.split())
        beside_x += "residual" in self.arguments  # the sum is written
        others = beside_x * (self.residual_dtype.itemsize if self.residual_dtype else 0)
        a_row = self.N * (self.dtype.itemsize + others + self.out_dtype.itemsize)
        if self.out_dtype == torch.uint8:  # two int4 a byte
            a_row = a_row - self.N // 2
        if "scale" not in self.arguments and self.out_dtype in (*QUANT_DTYPES, torch.uint8):
            a_row = a_row + 4 * (self.N // (self.group_size or self.N))
        return self.num_rows * a_row

    def flops(self) -> Dim:
        """A square, an addition and two multiplications an element."""
        return 4 * self.num_rows * self.N

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random rows, a weight around one, a bias around zero."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(dtype: torch.dtype | None, *shape: int) -> Tensor | None:
            if dtype is None:
                return None
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        rows = (self.num_rows, self.N)
        weight = normal(self.weight_dtype, self.N)
        made = {
            "x": normal(self.dtype, *rows),
            "grad": normal(self.residual_dtype, *rows),
            "grad_sum": normal(self.residual_dtype, *rows),
            "residual": normal(self.residual_dtype, *rows),
            "weight": None if weight is None else 1 + weight / 8,
            "bias": normal(self.bias_dtype, self.N),
            "eps": 1e-6,
            "scale": torch.full((1,), 0.01, device=device),
        }
        return tuple(made[name] for name in self.arguments.split()), self._keywords()

    def _keywords(self) -> dict[str, Any]:
        if "grad" in self.arguments:
            return {}
        groups = {} if self.group_size is None else {"group_size": self.group_size}
        if self.out_dtype in QUANT_DTYPES:
            return {"dtype": self.out_dtype, **groups}
        return groups if self.out_dtype == self.dtype or groups else {"out_dtype": self.out_dtype}


Rows = TypeVar("Rows", bound=RowProblem)


def with_one_scale(problem: Rows, scale: Tensor, x: Tensor) -> Rows:
    """The problem of a quantisation of `x` whose scale is given: a mismatch if it is none."""
    return replace(problem, mismatch=problem.mismatch or _unfit_scale(scale, x))


def _unfit_scale(scale: Tensor, x: Tensor) -> str | None:
    if scale.numel() != 1:
        return f"scale has {scale.numel()} elements, not one"
    return no_scale("scale", scale) or apart(x, scale) or None


def rows_unsupported(problem: RowProblem, use: Use) -> str | None:
    """What no row kernel takes."""
    if problem.mismatch:
        return problem.mismatch
    for name in ("dtype", "residual_dtype", "weight_dtype", "bias_dtype"):
        dtype = getattr(problem, name)
        if dtype is not None and dtype not in ROW_DTYPES:
            which = "x" if name == "dtype" else name.removesuffix("_dtype")
            readable = "bfloat16, float16 and float32"
            return f"{which} is {short_name(dtype)}; row kernels read {readable}"
    if problem.out_dtype not in (*ROW_DTYPES, *QUANT_DTYPES, torch.uint8):
        return f"row kernels do not write {short_name(problem.out_dtype)}"
    N = fixed(problem.N)
    if N is None:
        return f"the row length {problem.N} is not known when compiling"
    if not 0 < N <= MAX_N:
        return f"N={N} is outside 1 to {MAX_N}, the rows one workgroup holds"
    if not problem.row_contiguous:
        return "the last dimension is strided; row kernels read and write it with stride 1"
    if problem.levels > MAX_LEVELS:
        return f"the rows need {problem.levels} nested loops; row kernels have {MAX_LEVELS}"
    return quantisation_unsupported(problem, use)


def quantisation_unsupported(problem: RowProblem, use: Use) -> str | None:
    """What no quantising row kernel takes."""
    out, group = problem.out_dtype, problem.group_size
    if out in FP8_DTYPES and out not in (*use.arch.fp8_dtypes, *use.arch.emulated_fp8):
        known = " and ".join(map(short_name, use.arch.fp8_dtypes)) or "no fp8 at all"
        return f"{use.arch.name} converts to {known}, not to {short_name(out)}"
    if group is None:
        return None
    if group < 1 or problem.N % group:
        return f"rows of {problem.N} do not divide into groups of {group}"
    if group & (group - 1):
        return f"group_size={group} is not a power of two"
    return None


def hip_rows_unsupported(problem: RowProblem, use: Use) -> str | None:
    """What no HIP row kernel takes."""
    if reason := rows_unsupported(problem, use):
        return reason
    if problem.residual_dtype not in (None, problem.dtype):
        dtypes = f"{short_name(problem.dtype)} and {short_name(problem.residual_dtype)}"
        return f"x and the residual are {dtypes}; HIP kernels add equal dtypes"
    return None


def backward_unsupported(problem: RowProblem, use: Use) -> str | None:
    """What no backward row kernel takes."""
    if reason := rows_unsupported(problem, use):
        return reason
    if problem.N > MAX_BACKWARD_N:
        return f"N={problem.N} is above {MAX_BACKWARD_N}, the most whose gradients fit registers"
    return None


def hopper_backward_unsupported(problem: RowProblem, use: Use) -> str | None:
    """What the backward kernel for sm_90 does not take."""
    if reason := backward_unsupported(problem, use):
        return reason
    if problem.residual_dtype != problem.dtype:
        grad, x = problem.residual_dtype, short_name(problem.dtype)
        return f"the gradient is {grad and short_name(grad)} and x {x}; the kernel reads one dtype"
    if (row_bytes := problem.N * problem.dtype.itemsize) not in HOPPER_ROW_BYTES:
        step, most = HOPPER_ROW_BYTES.step, HOPPER_ROW_BYTES[-1]
        return f"rows of {row_bytes} bytes are no multiple of {step} up to {most}: whole warps"
    return None


def _mismatch(
    rows: tuple[Tensor, ...], N: Dim, weight: Tensor | None, bias: Tensor | None
) -> str | None:
    x = rows[0]
    if x.dim() == 0:
        return "x is a scalar; row kernels need a dimension to work along"
    for other in rows[1:]:
        if [dim(s) for s in other.shape] != [dim(s) for s in x.shape]:
            return (
                f"x is {_shape(x)} and is combined with {_shape(other)}; kernels do not broadcast"
            )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.dim() != 1 or dim(vector.shape[0]) != N):
            return f"{name} is {_shape(vector)} but rows have {N} elements"
        if vector is not None and vector.stride(0) != 1:
            return f"{name} has stride {vector.stride(0)}; row kernels read it with stride 1"
    if any(map(result_is_strided, rows)):
        return "rows lie transposed or overlap; kernels write results whose last stride is 1"
    return apart(*rows, weight, bias) or None


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(str(dim(s)) for s in x.shape) + "]"
