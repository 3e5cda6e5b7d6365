"""Rotary embeddings of q and k, alone or behind a head norm; the Python side of rope.hip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aiter_inductor.core.heads import RANK, heads_axis
from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import KernelSignature, f32, i32, i64, pointer
from aiter_inductor.kernels.hip.loading import (
    CPP_TYPES,
    arch_name,
    hip_module,
    load_kernel,
    wave_size,
)
from aiter_inductor.kernels.hip.rows import SMALL_BLOCK, VECTOR_BYTES, LaunchPlan
from aiter_inductor.kernels.prepared import Plans, facts_of

_HEAD_STRIDES = ("batch", "head", "token")
_TABLE_STRIDES = ("batch", "token")
_RESIDENT = 5
"""Blocks that a multiprocessor is to hold, 48 registers a thread. With the 4 the compiler makes
room for, 2 x 4096 tokens of 32 and 8 heads, normalised and rotated, take an H100 70.9 us, and 60.2
with 5."""
_MAX_HEADS_IN_ALL = 2**31 - 1


@dataclass(frozen=True)
class RopeStyle:
    """What a rotation computes, beside its dtypes.

    Attributes:
        head_dim: elements of a head.
        rotary_dim: how many of them are rotated, the first ones.
        pairs_in, pairs_out: the two elements of a pair lie side by side.
        full_table: cos and sin are `rotary_dim` wide rather than half of it.
        transposed: the rotation is the inverse one.
        norm: an RMSNorm of the head comes first.
        round_before_weight, has_offset: of that norm; whether something is added to its weight.
    """

    head_dim: int
    rotary_dim: int
    pairs_in: bool
    pairs_out: bool
    full_table: bool
    transposed: bool = False
    norm: bool = False
    round_before_weight: bool = False
    has_offset: bool = False

    @property
    def keeps_strides(self) -> bool:
        """Whether the output has the strides of the input; see the op `rope`."""
        one_layout = self.pairs_in == self.pairs_out and self.rotary_dim == self.head_dim
        return one_layout and (self.pairs_in or self.full_table)


@dataclass(frozen=True)
class RopeVariant:
    """One compilation of rope.hip: a style, dtypes, and `vec` pairs in each unit of a lane."""

    style: RopeStyle
    dtype: torch.dtype
    table_dtype: torch.dtype
    out_dtype: torch.dtype
    weight_dtype: torch.dtype
    vec: int
    lanes: int
    units: int

    def module(self) -> Module:
        """rope.hip with these definitions."""
        style = self.style
        return hip_module(
            "rope",
            "rope.hip",
            X=CPP_TYPES[self.dtype],
            C=CPP_TYPES[self.table_dtype],
            OUT=CPP_TYPES[self.out_dtype],
            W=CPP_TYPES[self.weight_dtype],
            P=CPP_TYPES[torch.promote_types(self.dtype, self.weight_dtype)],
            NORM=style.norm,
            ROUND_BEFORE_WEIGHT=style.round_before_weight,
            HAS_OFFSET=style.has_offset,
            HALF=style.rotary_dim // 2,
            TAIL=style.head_dim - style.rotary_dim,
            IN_PAIRS=style.pairs_in,
            OUT_PAIRS=style.pairs_out,
            FULL_TABLE=style.full_table,
            TABLE_PAIRS=style.pairs_in if style.transposed else style.pairs_out,
            TRANSPOSED=style.transposed,
            THREADS=SMALL_BLOCK,
            LANES=self.lanes,
            UNITS=self.units,
            VEC=self.vec,
            RESIDENT=_RESIDENT if self._is_small else 1,
        )

    @property
    def _is_small(self) -> bool:
        """Whether 48 registers hold what a lane combines: without a tail, and all in 16 bits."""
        widest = max(t.itemsize for t in (self.dtype, self.table_dtype, self.weight_dtype))
        return self.units == 1 and self.style.rotary_dim == self.style.head_dim and widest == 2

    def signature(self) -> KernelSignature:
        """rope_kernel's parameters."""
        heads = [f"{x}_{s}" for x in ("q", "k", "q_out", "k_out") for s in _HEAD_STRIDES]
        tables = [f"{table}_{s}" for table in ("cos", "sin") for s in _TABLE_STRIDES]
        return KernelSignature(
            "rope_kernel",
            (
                pointer("q", self.dtype),
                pointer("k", self.dtype, optional=True),
                pointer("q_out", self.out_dtype),
                pointer("k_out", self.out_dtype, optional=True),
                pointer("q_weight", self.weight_dtype, optional=True),
                pointer("k_weight", self.weight_dtype, optional=True),
                pointer("cos", self.table_dtype),
                pointer("sin", self.table_dtype),
                *(i32(name) for name in ("num_rows", "seq_len", "num_heads", "num_kv_heads")),
                f32("eps"),
                f32("weight_offset"),
                *(i64(name) for name in (*heads, *tables)),
            ),
            waits=True,
        )


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
) -> Tensor:
    """Rotate `x` [*, D] of up to four dimensions; cos and sin broadcast over its heads."""
    style = rope_style(x, cos, rotary_dim, interleaved_in, interleaved_out, transposed=transposed)
    out = _output(x, cos, out_dtype, style)
    _launch(_Tensors(x, None, out, None, None, None, cos, sin), style)
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
) -> tuple[Tensor, Tensor]:
    """Rotate `q` and `k` of one dtype, head_dim, batch and token count in one launch."""
    style = rope_style(q, cos, rotary_dim, interleaved_in, interleaved_out, transposed=transposed)
    q_out, k_out = (_output(x, cos, out_dtype, style) for x in (q, k))
    _launch(_Tensors(q, k, q_out, k_out, None, None, cos, sin), style)
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
) -> tuple[Tensor, Tensor]:
    """RMS-normalise each head of `q` and `k` by weights [D], then rotate, in one launch."""
    style = rope_style(
        q,
        cos,
        rotary_dim,
        interleaved_in,
        interleaved_out,
        norm=True,
        round_before_weight=round_before_weight,
        has_offset=weight_offset != 0.0,
    )
    q_out, k_out = (_output(x, cos, out_dtype, style) for x in (q, k))
    tensors = _Tensors(q, k, q_out, k_out, q_weight, k_weight, cos, sin)
    _launch(tensors, style, eps, weight_offset)
    return q_out, k_out


class _Tensors(NamedTuple):
    q: Tensor
    k: Tensor | None
    q_out: Tensor
    k_out: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor
    sin: Tensor


_PLANS = Plans[LaunchPlan]()


def rope_style(
    x: Tensor,
    cos: Tensor,
    rotary_dim: int | None,
    pairs_in: bool,
    pairs_out: bool,
    *,
    transposed: bool = False,
    norm: bool = False,
    round_before_weight: bool = False,
    has_offset: bool = False,
) -> RopeStyle:
    """Of a rotation as the op `rope` describes it.

    Raises:
        ValueError: for widths that do not fit together.
    """
    head_dim = x.shape[-1]
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim={rotary_dim} is not an even number up to {head_dim}")
    if cos.shape[-1] not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"cos is {cos.shape[-1]} wide, neither rotary_dim={rotary_dim} nor half of it"
        )
    full_table = cos.shape[-1] == rotary_dim
    widths = (head_dim, rotary_dim, pairs_in, pairs_out, full_table)
    return RopeStyle(*widths, transposed, norm, round_before_weight, has_offset)


def _output(x: Tensor, cos: Tensor, out_dtype: torch.dtype | None, style: RopeStyle) -> Tensor:
    dtype = out_dtype or torch.promote_types(x.dtype, cos.dtype)
    if style.keeps_strides:
        return torch.empty_like(x, dtype=dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _launch(
    given: _Tensors, style: RopeStyle, eps: float = 0.0, weight_offset: float = 0.0
) -> None:
    if given.q.numel() == 0:
        return
    key = (style, facts_of(*given))
    plan = _PLANS.get(key)
    if plan is None:
        given = given._replace(cos=_whole_rows(given.cos), sin=_whole_rows(given.sin))
        key = (style, facts_of(*given))
        plan = _PLANS.get(key) or _PLANS.keep(key, _plan(given, style))
    numbers = (*plan.sizes, eps, weight_offset, *plan.strides)
    plan.launch(plan.grid, plan.threads, 0, *given, *numbers)


def _whole_rows(table: Tensor) -> Tensor:
    """A copy where tokens are innermost: GPT-OSS's cos and sin are of a transposed product."""
    return table if table.stride(-1) == 1 else table.contiguous()


def _plan(given: _Tensors, style: RopeStyle) -> LaunchPlan:
    q, k, arch = given.q, given.k, arch_name(given.q.device)
    heads = heads_axis(q, k, given.cos)
    axes = {"batch": 0, "head": heads, "token": 3 - heads}
    batch, num_heads, seq_len = (_size(q, axis) for axis in axes.values())
    num_kv_heads = 0 if k is None else _size(k, heads)
    num_rows = batch * seq_len * (num_heads + num_kv_heads)
    if num_rows > _MAX_HEADS_IN_ALL:
        raise ValueError(f"{num_rows} heads in all exceed {_MAX_HEADS_IN_ALL}")
    strides = [_stride(tensor, axes[name]) for tensor in given[:4] for name in _HEAD_STRIDES] + [
        _stride(table, axes[name]) for table in given[6:] for name in _TABLE_STRIDES
    ]
    vec, wave = _vec(given, style, tuple(strides)), wave_size(arch)
    num_units = style.rotary_dim // 2 // vec + (style.head_dim - style.rotary_dim) // vec
    lanes = min(1 << (num_units - 1).bit_length(), wave)
    variant = RopeVariant(
        style=style,
        dtype=q.dtype,
        table_dtype=given.cos.dtype,
        out_dtype=given.q_out.dtype,
        weight_dtype=q.dtype if given.q_weight is None else given.q_weight.dtype,
        vec=vec,
        lanes=lanes,
        units=-(-num_units // lanes),
    )
    return LaunchPlan(
        load_kernel(variant, arch, q.device.type).launch,
        (-(-num_rows // (SMALL_BLOCK // lanes)), 1),
        SMALL_BLOCK,
        (num_rows, seq_len, num_heads, num_kv_heads),
        tuple(strides),
    )


def _vec(given: _Tensors, style: RopeStyle, strides: tuple[int, ...]) -> int:
    """Pairs in a unit: 16 bytes of first elements, if widths, strides and addresses allow."""
    tensors = [tensor for tensor in given if tensor is not None]
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            raise ValueError(f"heads with last stride {tensor.stride(-1)} are not contiguous")
    side_by_side = style.pairs_in or style.pairs_out
    counts = (style.rotary_dim // 2, style.head_dim - style.rotary_dim, *strides)
    vec = VECTOR_BYTES // given.q.element_size()
    while vec > 1:
        accessed = 2 * vec if side_by_side else vec
        fits = counts[0] % vec == 0 and counts[1] % vec == 0
        even = all(stride % accessed == 0 for stride in strides)
        if fits and even and all(_is_aligned(tensor, accessed) for tensor in tensors):
            return vec
        vec //= 2
    aligned_pairs = all(stride % 2 == 0 for stride in strides) and all(
        _is_aligned(tensor, 2) for tensor in tensors
    )
    if side_by_side and not aligned_pairs:
        raise ValueError(f"pairs that lie side by side are not aligned at strides {strides}")
    return 1


def _is_aligned(tensor: Tensor, elements: int) -> bool:
    bytes_moved = min(elements * tensor.element_size(), VECTOR_BYTES)
    return tensor.data_ptr() % bytes_moved == 0


def _size(x: Tensor, axis: int) -> int:
    """The size along `axis` of four; leading dimensions that `x` lacks have size 1."""
    axis -= RANK - x.dim()
    return x.shape[axis] if axis >= 0 else 1


def _stride(x: Tensor | None, axis: int) -> int:
    """The step along `axis` of four, 0 where the size is 1 and other tensors may have more."""
    if x is None or _size(x, axis) == 1:
        return 0
    return x.stride(axis - (RANK - x.dim()))
