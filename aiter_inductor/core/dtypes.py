"""Facts about the dtypes that kernels read and write."""

from __future__ import annotations

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
QUANT_DTYPES = (*FP8_DTYPES, torch.int8)
HALF_DTYPES = (torch.bfloat16, torch.float16)
ROW_DTYPES = (*HALF_DTYPES, torch.float32)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a reference computes: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promoted(left: torch.dtype, right: torch.dtype) -> torch.dtype | None:
    """What two dtypes combine to; None where torch has no rule, as for fp8 with anything else."""
    if left != right and {left, right} & {*FP8_DTYPES}:
        return None
    return torch.promote_types(left, right)


def quant_max(dtype: torch.dtype) -> float:
    """The largest magnitude a symmetric quantisation maps to: 448, 240 or 127.

    Raises:
        ValueError: for a dtype that is not a quantised one.
    """
    if dtype in FP8_DTYPES:
        return torch.finfo(dtype).max
    if dtype == torch.int8:
        return 127.0
    known = ", ".join(short_name(d) for d in QUANT_DTYPES)
    raise ValueError(f"{short_name(dtype)} is not a quantised dtype; those are {known}")


def short_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`: dtypes as sentences and tables show them."""
    return str(dtype).removeprefix("torch.")
