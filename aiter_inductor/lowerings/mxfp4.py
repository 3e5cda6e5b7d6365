"""Linear layers in MXFP4: elements of four bits, e2m1, in groups of 32 with a power of two each.

The format of the Open Compute Project's Microscaling Formats v1.0 (sections 5.3 and 6.3): a byte
holds two elements, the even one in the low half; a scale is a byte too, e8m0, `2 ** (code - 127)`
with 255 for NaN. Quantising divides a group by the power of two that brings its largest magnitude
into [4, 8) and rounds to the nearest element, ties to even; what lies above 6 becomes 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aiter_inductor.core.dtypes import ROW_DTYPES, accumulate_dtype, short_name
from aiter_inductor.core.op import Use, op
from aiter_inductor.core.problem import Dim, dim, fixed, is_row_major, product
from aiter_inductor.lowerings.arguments import apart
from aiter_inductor.lowerings.gemm_providers import open_sizes
from aiter_inductor.lowerings.providers import add_triton

GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by code; bit 3 is the sign."""
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Between neighbours of `E2M1`; a tie goes to the even code, so every other one counts itself."""
LARGEST_EXPONENT = 2
CDNA4 = ("gfx950",)


@dataclass(frozen=True)
class MxGemmProblem:
    """`out[M, N] = x[M, K] @ weight[N, K].T`, both in MXFP4.

    Attributes:
        M, N, K: all leading dimensions of x together, output and input features.
        out_dtype: of the result.
        bias_dtype: of the bias; None if there is none.
        contiguous: whether x, weight and scales are row-major without gaps.
        mismatch: why the tensors do not belong together, or None.
    """

    M: Dim
    N: Dim
    K: Dim
    out_dtype: torch.dtype
    bias_dtype: torch.dtype | None = None
    contiguous: bool = True
    mismatch: str | None = None

    def bytes_moved(self) -> Dim:
        """Operands, scales and bias read once, the result written once."""
        held = (self.M + self.N) * (self.K // 2 + self.K // GROUP)
        bias = self.N * self.bias_dtype.itemsize if self.bias_dtype else 0
        return held + self.M * self.N * self.out_dtype.itemsize + bias

    def flops(self) -> Dim:
        """A multiplication and an addition for each of M·N·K."""
        return 2 * self.M * self.N * self.K

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All elements, and scales that give a result of about one."""
        generator = torch.Generator(device).manual_seed(seed)

        def codes(rows: Dim, columns: Dim, low: int, high: int) -> Tensor:
            shape = (rows, columns)
            made = torch.randint(low, high, shape, generator=generator, device=device)
            return made.to(torch.uint8)

        operands = [codes(rows, self.K // 2, 0, 256) for rows in (self.M, self.N)]
        scales = [codes(rows, self.K // GROUP, 120, 124) for rows in (self.M, self.N)]
        bias = None
        if self.bias_dtype is not None:
            bias = torch.randn(self.N, generator=generator, device=device).to(self.bias_dtype)
        return (*operands, *scales, bias), {"out_dtype": self.out_dtype}


@dataclass(frozen=True)
class MxQuantProblem:
    """Rows [num_rows, N] that become MXFP4.

    Attributes:
        num_rows: all leading dimensions of x together.
        N: elements a row.
        dtype: of x.
        mismatch: why x cannot be quantised so, or None.
    """

    num_rows: Dim
    N: Dim
    dtype: torch.dtype
    mismatch: str | None = None

    def bytes_moved(self) -> Dim:
        """x read once, elements and scales written once."""
        return self.num_rows * (self.N * self.dtype.itemsize + self.N // 2 + self.N // GROUP)

    def flops(self) -> Dim:
        """A magnitude, a comparison, a product and a rounding for each element."""
        return 4 * self.num_rows * self.N

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Groups of many magnitudes."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.num_rows, self.N)
        x = torch.randn(shape, generator=generator, device=device)
        return (x.to(self.dtype),), {}


def of_gemm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> MxGemmProblem:
    """The problem of `gemm_mxfp4`."""
    tensors = (x, weight, x_scale, weight_scale)
    return MxGemmProblem(
        M=product(x.shape[:-1]),
        N=dim(weight.shape[0]) if weight.dim() else 1,
        K=2 * dim(x.shape[-1]) if x.dim() else 0,
        out_dtype=out_dtype,
        bias_dtype=None if bias is None else bias.dtype,
        contiguous=all(map(is_row_major, tensors)),
        mismatch=_mismatch(*tensors, bias),
    )


def of_quant(x: Tensor) -> MxQuantProblem:
    """The problem of `quant_mxfp4`."""
    N = dim(x.shape[-1]) if x.dim() else 0
    reason = None
    if fixed(N) is None or N % GROUP:
        reason = f"N={N} is not made of groups of {GROUP}"
    return MxQuantProblem(product(x.shape[:-1]), N, x.dtype, reason)


@op(problem=of_quant)
def quant_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each group of 32 consecutive elements of a row.

    Args:
        x: [*, K], any float dtype, K a multiple of 32.

    Returns:
        packed: [*, K / 2], uint8, two elements a byte.
        scale: [*, K / 32], uint8: e8m0. A group that holds a NaN or an infinity has 255, NaN.
    """
    groups = x.to(torch.float32).unflatten(-1, (x.shape[-1] // GROUP, GROUP))
    exponent = (groups.abs().amax(-1).view(torch.int32) >> 23) & 255
    code = torch.where(exponent == 255, 255, (exponent - LARGEST_EXPONENT).clamp(min=0))
    inverse = ((254 - code).clamp(min=0) << 23).view(torch.float32)
    scaled = groups * inverse[..., None]
    magnitude = scaled.abs()
    element = torch.zeros_like(scaled, dtype=torch.uint8)
    for at, middle in enumerate(MIDPOINTS):
        element += magnitude >= middle if at % 2 else magnitude > middle
    element = element + (torch.signbit(scaled) & (code != 255)[..., None]).to(torch.uint8) * 8
    pairs = element.flatten(-2).unflatten(-1, (x.shape[-1] // 2, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4), code.to(torch.uint8)


@op(problem=of_gemm)
def gemm_mxfp4(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A linear layer in MXFP4.

    Args:
        x: [*, K / 2], uint8 or float4_e2m1fn_x2.
        weight: [N, K / 2], likewise.
        x_scale: [*, K / 32], uint8 or float8_e8m0fnu.
        weight_scale: [N, K / 32], likewise.
        bias: [N], any float dtype, or None.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [*, N], `out_dtype`.
    """
    wide = accumulate_dtype(out_dtype)
    rows, columns = dequantised(x, x_scale, wide), dequantised(weight, weight_scale, wide)
    out = F.linear(rows, columns)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(out_dtype)


def dequantised(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Elements [*, K / 2] with their scales [*, K / 32] as numbers [*, K]."""
    codes = packed.view(torch.uint8)
    elements = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    magnitudes = torch.tensor(E2M1, dtype=dtype, device=packed.device)
    values = magnitudes[(elements & 7).long()] * (1 - 2 * (elements >> 3).to(dtype))
    powers = powers_of_two(scale).to(dtype)
    return values * powers.repeat_interleave(GROUP, -1)


def powers_of_two(scale: Tensor) -> Tensor:
    """e8m0 scales in fp32, exactly: 2^-127, the least, has no exponent bits of its own there."""
    code = scale.view(torch.uint8).to(torch.int32)
    power = (code << 23).view(torch.float32)
    power = torch.where(code == 0, 2.0**-127, power)
    return torch.where(code == 255, torch.nan, power)


def gemm_unsupported(problem: MxGemmProblem, use: Use) -> str | None:
    """What the kernel does not take."""
    if problem.mismatch:
        return problem.mismatch
    if problem.out_dtype not in ROW_DTYPES:
        return f"no kernel writes {short_name(problem.out_dtype)}"
    if problem.bias_dtype not in (None, *ROW_DTYPES):
        return f"no kernel adds a bias in {short_name(problem.bias_dtype or torch.float64)}"
    return open_sizes(problem.N, problem.K)


def quant_unsupported(problem: MxQuantProblem, use: Use) -> str | None:
    """What the kernel does not take."""
    if problem.mismatch:
        return problem.mismatch
    known = problem.dtype in ROW_DTYPES
    return None if known else f"x is {short_name(problem.dtype)}, which no kernel reads"


def _mismatch(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> str | None:
    shapes = [tuple(map(dim, t.shape)) for t in (x, weight, x_scale, weight_scale)]
    if not shapes[0] or len(shapes[1]) != 2:
        return f"x is {list(shapes[0])} and weight {list(shapes[1])}, not [*, K / 2], [N, K / 2]"
    K = 2 * shapes[0][-1]
    if shapes[1][1] * 2 != K:
        return f"x has {K} elements a row and weight {2 * shapes[1][1]}"
    if K % GROUP:
        return f"K={K} is not made of groups of {GROUP}"
    for name, found, of in (("x", shapes[2], shapes[0]), ("weight", shapes[3], shapes[1])):
        wanted = (*of[:-1], K // GROUP)
        if found != wanted:
            return f"{name}_scale is {list(found)}, {name} wants {list(wanted)}"
    if bias is not None and tuple(map(dim, bias.shape)) != shapes[1][:1]:
        return f"bias is {list(bias.shape)} but the result has {shapes[1][0]} columns"
    for name, held, allowed in (
        ("x", x, torch.float4_e2m1fn_x2),
        ("weight", weight, torch.float4_e2m1fn_x2),
        ("x_scale", x_scale, torch.float8_e8m0fnu),
        ("weight_scale", weight_scale, torch.float8_e8m0fnu),
    ):
        if held.dtype not in (torch.uint8, allowed):
            return f"{name} is {short_name(held.dtype)}, not uint8 or {short_name(allowed)}"
    return apart(x, weight, x_scale, weight_scale, bias) or None


add_triton(quant_mxfp4, "mxfp4", refuse=quant_unsupported, archs=CDNA4)
add_triton(gemm_mxfp4, "mxfp4", refuse=gemm_unsupported, archs=CDNA4)
