"""What each provider of the quantised linear layers takes."""

from __future__ import annotations

import torch

from aiter_inductor.core.dtypes import FP8_DTYPES, QUANT_DTYPES, ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.gemm_problem import GemmProblem

FEW_ROWS = 128


def dtypes_unsupported(problem: GemmProblem, use: Use) -> str | None:
    """What no provider takes: tensors that do not fit, and dtypes that no kernel reads."""
    if problem.mismatch:
        return problem.mismatch
    weight_only = problem.scaling.startswith("weight")
    if problem.dtype not in (ROW_DTYPES if weight_only else FP8_DTYPES):
        return _not_read("x", problem.dtype)
    if problem.weight_dtype not in (QUANT_DTYPES if weight_only else FP8_DTYPES):
        return _not_read("weight", problem.weight_dtype)
    if problem.out_dtype not in ROW_DTYPES:
        return f"no kernel writes {short_name(problem.out_dtype)}"
    if problem.bias_dtype is not None and problem.bias_dtype not in (*ROW_DTYPES, torch.float64):
        return _not_read("bias", problem.bias_dtype)
    return None


def library_is_faster(problem: GemmProblem, use: Use) -> str | None:
    """Where the CPU's own product wins although it dequantises the whole weight first.

    N = K = 2048 on two cores with AVX-512 bf16: 64 rows 9.9 ms against Inductor's 14.6, 256 rows
    24.3 against 8.8; with a product in fp32 13.3 and 34.6.
    """
    rows = fixed(problem.M)
    if rows is not None and rows > FEW_ROWS:
        return f"M={rows} is more than {FEW_ROWS}, where oneDNN on a dequantised weight is as fast"
    return None


def _not_read(name: str, dtype: torch.dtype) -> str:
    return f"{name} is {short_name(dtype)}, which no kernel of this op reads"
