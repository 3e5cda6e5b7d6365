"""Rotary position embeddings: every head of q and k in one launch, each element moved once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from aiter_inductor.core.heads import heads_axis
from aiter_inductor.kernels.triton.launch import launchable
from aiter_inductor.kernels.triton.rope_kernel import rope_kernel


@dataclass(frozen=True)
class RopeConfig:
    """What one program handles.

    Attributes:
        block_t: tokens, a power of two.
        block_h: heads, a power of two.
        num_warps: warps of 32 lanes; a chip with wider ones launches as many fewer.
    """

    block_t: int
    block_h: int
    num_warps: int

    @classmethod
    def default(
        cls, num_heads: int | torch.SymInt, head_dim: int, *, normed: bool = False
    ) -> RopeConfig:
        """Untuned choice: up to 8 heads and 4096 elements, or half of either with a normalisation.

        4096 elements keep two 16-byte loads of each half in flight on each of 128 lanes. A
        reduction before the rotation has them wait: 128 tokens of 32 and 8 heads of 128 take an
        H100 3.08 µs with half of each and 3.24 with all, 2 x 4096 tokens 59.6 and 60.1.
        """
        most, size = (4, 2048) if normed else (8, 4096)
        block_h = (
            min(most, triton.next_power_of_2(num_heads)) if isinstance(num_heads, int) else most
        )
        block_t = max(1, size // (block_h * triton.next_power_of_2(head_dim)))
        return cls(block_t=min(block_t, 32), block_h=block_h, num_warps=4)

    def launch(self) -> dict[str, int]:
        """Keywords for the launch."""
        return {"num_warps": max(self.num_warps // 2, 1) if torch.version.hip else self.num_warps}


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    config: RopeConfig | None = None,
) -> Tensor:
    """Rotate `x` [*, D] of up to four dimensions and last stride 1, as the op `rope` says.

    cos and sin broadcast over its heads.
    """
    style = rotation_style(x, cos, interleaved_in, interleaved_out, rotary_dim, transposed)
    out = rotated_like(x, cos, out_dtype, style)
    _launch((x, out), None, cos, sin, style, config)
    return out


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    config: RopeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate `q` and `k` of one dtype, head_dim, batch and token count in one launch."""
    style = rotation_style(q, cos, interleaved_in, interleaved_out, rotary_dim, transposed)
    q_out, k_out = rotated_like(q, cos, out_dtype, style), rotated_like(k, cos, out_dtype, style)
    _launch((q, q_out), (k, k_out), cos, sin, style, config)
    return q_out, k_out


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
    config: RopeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS-normalise each head of `q` and `k` by weights [D], then rotate, in one launch."""
    style = rotation_style(q, cos, interleaved_in, interleaved_out, rotary_dim, False)
    q_out, k_out = rotated_like(q, cos, out_dtype, style), rotated_like(k, cos, out_dtype, style)
    norm = _Norm(q_weight, k_weight, eps, weight_offset, round_before_weight)
    _launch((q, q_out), (k, k_out), cos, sin, style, config, norm)
    return q_out, k_out


@dataclass(frozen=True)
class _Norm:
    """The normalisation in front of the rotation."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    offset: float
    round_first: bool


def rotation_style(
    x: Tensor,
    cos: Tensor,
    interleaved_in: bool,
    interleaved_out: bool,
    rotary_dim: int | None,
    transposed: bool,
) -> dict[str, Any]:
    """The constants of the kernel that follow from the arguments alone."""
    head_dim = x.shape[-1]
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    tail = head_dim - rotary_dim
    return {
        "HEAD_DIM": head_dim,
        "HALF": rotary_dim // 2,
        "BLOCK_HALF": triton.next_power_of_2(max(rotary_dim // 2, 1)),
        "BLOCK_TAIL": triton.next_power_of_2(tail) if tail else 0,
        "INTERLEAVED_IN": interleaved_in,
        "INTERLEAVED_OUT": interleaved_out,
        "FULL": cos.shape[-1] == rotary_dim,
        "TRANSPOSED": transposed,
    }


def rotated_like(
    x: Tensor, cos: Tensor, out_dtype: torch.dtype | None, style: dict[str, Any]
) -> Tensor:
    """Unwritten memory with the strides that models' own formula gives; see the op `rope`."""
    dtype = out_dtype or torch.promote_types(x.dtype, cos.dtype)
    interleaved = style["INTERLEAVED_IN"]
    one_layout = interleaved == style["INTERLEAVED_OUT"] and not style["BLOCK_TAIL"]
    if one_layout and (interleaved or style["FULL"]):
        return torch.empty_like(x, dtype=dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _launch(
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    style: dict[str, Any],
    config: RopeConfig | None,
    norm: _Norm | None = None,
) -> None:
    """Run the kernel on q and, where given, k; each is a pair of input and output."""
    heads = heads_axis(q[0], None if k is None else k[0], cos)
    tokens = 3 - heads
    axes = (0, heads, tokens)
    x = q[0]
    batch, num_heads, seq_len = (_size(x, axis) for axis in axes)
    num_kv_heads = 0 if k is None else _size(k[0], heads)
    # Without k, and without weights, the kernel gets q's pointers and never reads through them.
    pairs = (*q, *(k or q))
    weights = (x, x) if norm is None else (norm.q_weight, norm.k_weight)
    config = config or RopeConfig.default(num_heads, x.shape[-1], normed=norm is not None)
    num_tokens = batch * seq_len
    grid = (
        triton.cdiv(num_tokens, config.block_t),
        triton.cdiv(num_heads, config.block_h) + triton.cdiv(num_kv_heads, config.block_h),
    )
    launchable(rope_kernel)[grid](
        pairs[0],
        pairs[2],
        pairs[1],
        pairs[3],
        *weights,
        cos,
        sin,
        num_tokens,
        seq_len,
        num_heads,
        num_kv_heads,
        *(stride_of(pairs[i], axis) for i in (0, 2, 1, 3) for axis in axes),
        *(stride_of(table, axis) for table in (cos, sin) for axis in (0, tokens, 3)),
        1.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        **style,
        NORM=norm is not None,
        ROUND_FIRST=norm is not None and norm.round_first,
        BLOCK_T=config.block_t,
        BLOCK_H=config.block_h,
        **config.launch(),
    )


def _size(x: Tensor, axis: int) -> int:
    """The size along `axis` of four; leading dimensions that `x` lacks have size 1."""
    axis -= 4 - x.dim()
    return x.shape[axis] if axis >= 0 else 1


def stride_of(x: Tensor, axis: int) -> int:
    """The step along `axis` of four, 0 where the size is 1 and other tensors may have more."""
    size = _size(x, axis)
    if isinstance(size, int) and size == 1:
        return 0
    return x.stride(axis - (4 - x.dim()))
