"""Linear layers on int4 weights in tiles, as `torch.ops.aten._convert_weight_to_int4pack` lays out.

torchao keeps weights so (Int4TilePackedTo4dTensor), and programs that call torch's own kernel,
`_weight_int4pack_mm`, themselves. Four bytes hold eight elements of one row of the weight, of
which tiles of 16 along K take four each; what lies where depends on the chip's matrix instruction
(aten/src/ATen/native/cuda/int4mm.cu): on NVIDIA a tile is 8 rows high and a lane holds elements 0,
1, 8 and 9 of it behind twice its number, on AMD 16 rows and 0 to 3 behind four times its number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import ROW_DTYPES, accumulate_dtype, short_name
from aiter_inductor.core.op import Use, op
from aiter_inductor.core.problem import Dim, dim, fixed, is_row_major, product
from aiter_inductor.lowerings.arguments import apart
from aiter_inductor.lowerings.gemm import linear_of, spread_last
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from aiter_inductor.lowerings.gemm_providers import triton_unsupported
from aiter_inductor.lowerings.providers import add_triton, add_vendor

TILE_K = 128
"""Elements of K that a lane's four words hold: torchao's `inner_k_tiles` of 8, by 16."""
GROUPS = (32, 64, 128, 256)
"""Elements that share a scale where torch's own kernel is to read it."""
FEW_ROWS, SOME_ROWS = 16, 64


def tile_n_here() -> int:
    """`tile_n` of the weights that this process's torch lays out, for whatever chip is planned."""
    return 16 if torch.version.hip else 8


@dataclass(frozen=True)
class TilePackedProblem(GemmProblem):
    """A GemmProblem whose weight is [N / 8, padded_k / 128, 32, 4] words of four bytes.

    Attributes:
        padded_n, padded_k: of the weight, whose rows and columns beyond N and K are not used.
        tile_n: rows of a tile, 8 or 16.
        scale_dtype: of scales and zeros.
    """

    padded_n: int = 0
    padded_k: int = 0
    tile_n: int = 8
    scale_dtype: torch.dtype = torch.bfloat16

    def bytes_moved(self) -> Dim:
        """x, words, scales with zeros, and bias read once, the result written once."""
        held = self.padded_n * self.padded_k
        rows = self.M * (self.K + self.N) * self.dtype.itemsize
        bias = self.N * self.bias_dtype.itemsize if self.bias_dtype else 0
        return rows + held // 2 + 2 * self.scale_dtype.itemsize * held // self.group_size + bias

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All codes, scales that give a result of about one, and zeros as large as a step."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.padded_n // 8, self.padded_k // TILE_K, 32, 4)
        bounds = (-(1 << 31), 1 << 31)
        words = torch.randint(*bounds, shape, generator=generator, device=device)
        x = torch.randn(self.M, self.K, generator=generator, device=device).to(self.dtype)
        groups = (self.padded_k // self.group_size, self.padded_n, 2)
        scales = torch.rand(groups, generator=generator, device=device) / (4 * self.K**0.5)
        bias = None
        if self.bias_dtype is not None:
            bias = torch.randn(self.N, generator=generator, device=device).to(self.bias_dtype)
        args = (x, words.to(torch.int32), scales.to(self.scale_dtype), bias)
        sizes = {"group_size": self.group_size, "out_features": self.N, "tile_n": self.tile_n}
        return args, sizes


def of_tile_packed(
    x: Tensor,
    weight: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_features: int,
    tile_n: int = 8,
) -> TilePackedProblem:
    """The problem of `gemm_w4a16_tile_packed`."""
    shape = (*map(dim, weight.shape), 0, 0)
    made = GemmProblem(
        M=product(x.shape[:-1]),
        N=out_features,
        K=dim(x.shape[-1]) if x.dim() else 1,
        dtype=x.dtype,
        weight_dtype=torch.uint8 if weight.dtype == torch.int32 else weight.dtype,
        out_dtype=x.dtype,
        scaling="weight_group",
        bias_dtype=None if bias is None else bias.dtype,
        group_size=group_size,
        x_contiguous=is_row_major(x),
        weight_contiguous=is_row_major(weight),
        scales_contiguous=is_row_major(scale_and_zero),
        mismatch=_mismatch(x, weight, scale_and_zero, bias, group_size, out_features, tile_n),
        layout="int4 tiles",
        has_zero=True,
        offset_binary=True,
    )
    padded = {"padded_n": 8 * shape[0], "padded_k": TILE_K * shape[1]}
    return TilePackedProblem(
        **vars(made), **padded, tile_n=tile_n, scale_dtype=scale_and_zero.dtype
    )


@op(problem=of_tile_packed)
def gemm_w4a16_tile_packed(
    x: Tensor,
    weight: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_features: int,
    tile_n: int = 8,
) -> Tensor:
    """`gemm_w4a16` of a weight in tiles, its codes in offset binary.

    Args:
        x: [*, K], bfloat16, float16 or float32.
        weight: [N / 8, K / 128, 32, 4], int32, N and K rounded up to whole tiles or more.
        scale_and_zero: [K / group_size, N, 2], any float dtype: scales, and what a code of 0
            stands for; N and K as the weight's.
        bias: [out_features], any float dtype, or None.
        group_size: elements of K that share a scale.
        out_features: N of the layer.
        tile_n: rows of a tile, 8 on NVIDIA or 16 on AMD.

    Returns:
        [*, out_features], x's dtype.
    """
    wide = accumulate_dtype(x.dtype)
    columns = in_rows(weight, scale_and_zero, group_size, tile_n, wide)
    columns = columns[:out_features, : x.shape[-1]]
    return linear_of(x.to(wide), columns, bias, None, x.dtype)


def codes_of(weight: Tensor, tile_n: int) -> Tensor:
    """The codes [N, K] of words [N / 8, K / 128, 32, 4], from -8 to 7, int8."""
    blocks = weight.shape[1]
    # Lanes are numbered by row, then by column of a tile on NVIDIA and the other way round on AMD.
    lanes = (tile_n, 4) if tile_n == 8 else (4, tile_n)
    words = weight.reshape(-1, blocks, *lanes, 4)
    words = words if tile_n == 8 else words.transpose(2, 3)
    shifts = 4 * torch.arange(8, device=weight.device)
    # [tiles, blocks of K, rows, lane along K, pair of 16s, odd, second 16, second pair]
    codes = ((words[..., None] >> shifts) & 15).unflatten(-1, (2, 2, 2))
    order = (0, 2, 1, 4, 6, 7, 3, 5) if tile_n == 8 else (0, 2, 1, 4, 6, 3, 7, 5)
    rows: Tensor = codes.permute(order).reshape(-1, blocks * TILE_K) - 8
    return rows.to(torch.int8)


def in_rows(
    weight: Tensor, scale_and_zero: Tensor, group_size: int, tile_n: int, dtype: torch.dtype
) -> Tensor:
    """A weight of `gemm_w4a16_tile_packed` as [N, K], dequantised."""
    codes = codes_of(weight, tile_n).to(dtype)
    scale, zero = (
        spread_last(scale_and_zero[..., i].t().to(dtype), codes.shape[1], group_size)
        for i in (0, 1)
    )
    dequantised: Tensor = codes * scale + zero
    return dequantised


def _mismatch(
    x: Tensor,
    weight: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    tile_n: int,
) -> str | None:
    found, scales = tuple(map(dim, weight.shape)), tuple(map(dim, scale_and_zero.shape))
    if len(found) != 4 or found[2:] != (32, 4) or weight.dtype != torch.int32:
        return f"weight is {list(found)} of {short_name(weight.dtype)}, not [N / 8, K / 128, 32, 4]"
    N, K, wanted = 8 * found[0], TILE_K * found[1], dim(x.shape[-1]) if x.dim() else 0
    if fixed(N) is None or fixed(K) is None or fixed(wanted) is None:
        return f"the weight is [{N}, {K}] and x has {wanted} columns, not known when compiling"
    if tile_n not in (8, 16) or N % tile_n:
        return f"tiles of {tile_n} rows do not make a weight of {N}"
    if not 0 < wanted <= K or not 0 < out_features <= N:
        return f"[{out_features}, {wanted}] is no part of the weight's [{N}, {K}]"
    if group_size < 1 or scales != (-(-K // group_size), N, 2):
        return f"scale_and_zero is {list(scales)}, not [{K} / {group_size}, {N}, 2]"
    if scale_and_zero.dtype not in (*ROW_DTYPES, torch.float64):
        return f"scale_and_zero is {short_name(scale_and_zero.dtype)}, no float dtype"
    if bias is not None and tuple(map(dim, bias.shape)) != (out_features,):
        return f"bias is {list(map(dim, bias.shape))} but the result has {out_features} columns"
    return apart(x, weight, scale_and_zero, bias) or None


def library_unsupported(problem: TilePackedProblem, use: Use) -> str | None:
    """What torch's own kernel does not take, beside what Triton's does not."""
    if reason := triton_unsupported(problem, use):
        return reason
    for name, found in (("x", problem.dtype), ("scale_and_zero", problem.scale_dtype)):
        if found != torch.bfloat16:
            return f"{name} is {short_name(found)}, torch's kernel reads bfloat16"
    if problem.tile_n != 8 or problem.group_size not in GROUPS:
        groups = ", ".join(map(str, GROUPS))
        shown = f"tiles of {problem.tile_n} rows and groups of {problem.group_size}"
        return f"torch's kernel here reads tiles of 8 rows and groups of {groups}, not {shown}"
    return None


def better_by_triton(problem: TilePackedProblem, use: Use) -> str | None:
    """Few rows: there is nothing to choose when called, and no pay for a dequantised weight.

    By 4096 x 4096 on an H100 64 rows take 30.8 us by the Triton kernel, 77.9 by torch's.
    """
    rows = fixed(problem.M)
    if rows is None or rows > SOME_ROWS:
        return None
    return f"M={rows} is known and at most {SOME_ROWS}, for which nothing is dequantised"


def left_to_torch(problem: TilePackedProblem, use: Use) -> str | None:
    """Very few rows on Hopper, where torch's own kernel, which the program calls, is faster.

    By 4096 x 4096 on an H100 one row takes 24.7 us by the Triton kernel and 6.9 by torch's.
    """
    rows = fixed(problem.M)
    if use.arch.name != "sm_90" or rows is None or rows > FEW_ROWS:
        return None
    return f"M={rows}: 16 rows of 4096 x 4096 take 24.4 us on sm_90 and torch's kernel 21.4"


add_vendor(
    gemm_w4a16_tile_packed,
    "gemm_tile_packed",
    refuse=library_unsupported,
    decline=better_by_triton,
    cede=better_by_triton,
    archs=("sm_90",),
)
add_triton(
    gemm_w4a16_tile_packed, "gemm_tile_packed", refuse=triton_unsupported, decline=left_to_torch
)
