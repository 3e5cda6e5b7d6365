"""Small programs, and inputs that no kernel was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

ROWS, WIDTH = 6, 16
FP8 = torch.float8_e4m3fn


def rms_norm(x: Any, w: Any) -> Any:
    y = x.to(torch.float32)
    return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def add_rms_norm(x: Any, w: Any) -> Any:
    total = x + x.flip(0)
    return F.rms_norm(total, (WIDTH,), w, 1e-6), total


def layer_norm(x: Any, w: Any) -> Any:
    return F.layer_norm(x, (WIDTH,), w, None, 1e-5)


def rope(x: Any, w: Any) -> Any:
    cos, sin = torch.cos(w), torch.sin(w)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def silu_and_mul(x: Any, w: Any) -> Any:
    return F.silu(x) * (x * w)


def gelu_halves(x: Any, w: Any) -> Any:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def quant_per_token(x: Any, w: Any) -> Any:
    scale = x.abs().amax(-1, keepdim=True).float() / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


def norm_quant(x: Any, w: Any) -> Any:
    return quant_per_token(rms_norm(x, w), w)


PROGRAMS: Mapping[str, Callable[..., Any]] = {
    program.__name__: program
    for program in (
        rms_norm, add_rms_norm, layer_norm, rope, silu_and_mul, gelu_halves, quant_per_token,
        norm_quant,
    )
}  # fmt: skip


def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


def with_row(value: float) -> torch.Tensor:
    x = normal(ROWS, WIDTH)
    x[2] = value
    x[4, 3] = value
    return x


W = normal(WIDTH)
X = normal(ROWS, WIDTH)
INPUTS: Mapping[str, tuple[Any, Any]] = {
    **{
        f"x_{str(dtype).removeprefix('torch.')}": (normal(ROWS, WIDTH).mul(9).to(dtype), W)
        for dtype in (torch.float64, torch.int64, torch.int8, torch.complex64, torch.bool)
    },
    "all_float64": (X.double(), W.double()),
    "all_complex": (X.to(torch.complex64), W.to(torch.complex64)),
    "weight_int": (X, torch.arange(WIDTH)),
    "weight_bfloat16": (X, W.bfloat16()),
    "last_dim_strided": (normal(ROWS, 2 * WIDTH)[:, ::2], W),
    "transposed": (normal(WIDTH, ROWS).t(), W),
    "expanded_rows": (normal(1, WIDTH).expand(ROWS, WIDTH), W),
    "expanded_last": (normal(ROWS, 1).expand(ROWS, WIDTH), W),
    "overlapping": (normal(WIDTH + ROWS).as_strided((ROWS, WIDTH), (1, 1)), W),
    "offset_rows": (normal(ROWS, WIDTH + 3)[:, 3:], W),
    "weight_strided": (X, normal(2 * WIDTH)[::2]),
    "weight_expanded": (X, normal(1).expand(WIDTH)),
    "nan": (with_row(float("nan")), W),
    "inf": (with_row(float("inf")), W),
    "negative_inf": (with_row(float("-inf")), W),
    "zeros": (with_row(0.0), W),
    "no_rows": (normal(0, WIDTH), W),
    "no_columns": (normal(ROWS, 0), normal(0)),
    "no_columns_but_weight": (normal(ROWS, 0), W),
    "empty": (normal(0, 0), normal(0)),
    "zero_d": (torch.tensor(1.5), W),
    "weight_zero_d": (X, torch.tensor(1.5)),
    "one_d": (normal(WIDTH), W),
    "width_one": (normal(ROWS, 1), normal(1)),
    "weight_per_row": (X, normal(ROWS, 1)),
    "weight_too_long": (X, normal(WIDTH + 1)),
    "weight_of_rank_three": (X, normal(2, ROWS, WIDTH)),
    "weight_number": (X, 2.0),
    "x_number": (2.0, W),
    "weight_none": (X, None),
    "meta": (X.to("meta"), W.to("meta")),
    "mixed_devices": (X, W.to("meta")),
    "sparse": (X.to_sparse(), W),
}  # fmt: skip


def assert_same(found: Any, wanted: Any) -> None:
    """Equal in structure, dtype, shape, stride and, within rounding, in value."""
    for ours, eagers in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert (ours.dtype, ours.shape, ours.device) == (eagers.dtype, eagers.shape, eagers.device)
        if eagers.device.type == "meta":
            continue
        assert ours.stride() == eagers.stride() or not eagers.numel()
        if eagers.dtype is FP8:
            # One step is an eighth of the value: the scale's last bit may move a rounding.
            torch.testing.assert_close(
                ours.float(), eagers.float(), rtol=0.126, atol=2**-9, equal_nan=True
            )
            continue
        torch.testing.assert_close(ours, eagers, rtol=1e-5, atol=1e-5, equal_nan=True)
