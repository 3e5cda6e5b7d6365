"""What is rotated on its way into a key-value cache, and what its kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.arguments import apart, no_vector
from aiter_inductor.lowerings.kv_cache_problem import KvCacheProblem, kv_cache_unsupported
from aiter_inductor.lowerings.rope_problem import unlike_tables


@dataclass(frozen=True)
class RopeKvCacheProblem(KvCacheProblem):
    """Heads of q that are rotated, and those of k, rotated, and of v that are stored.

    Attributes:
        num_heads: heads of q.
        rotary_dim: leading elements of a head that are rotated.
        table_width: last size of cos and sin, rotary_dim or half of it.
        table_dtype: dtype of cos and sin.
        num_positions: rows of cos and sin that positions choose from; 0 where each token has one.
        interleaved_in: pairs are neighbours in q and k.
        interleaved_out: pairs are neighbours in the results.
        unfit: what no kernel takes about q and the tables, or None.
    """

    num_heads: Dim = 1
    rotary_dim: Dim = 2
    table_width: Dim = 2
    table_dtype: torch.dtype = torch.bfloat16
    num_positions: Dim = 0
    interleaved_in: bool = False
    interleaved_out: bool = False
    unfit: str | None = None

    @classmethod
    def of_rope(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        *,
        layout: str = "paged",
        interleaved_in: bool = False,
        interleaved_out: bool = False,
        rotary_dim: int | None = None,
    ) -> RopeKvCacheProblem:
        """From the arguments of `rope_kv_cache_write`."""
        scales = key_scale, value_scale
        stored = KvCacheProblem.of(k, v, key_cache, value_cache, slots, *scales, layout=layout)
        return cls(
            **vars(stored),
            num_heads=dim(q.shape[1]),
            rotary_dim=dim(q.shape[2]) if rotary_dim is None else rotary_dim,
            table_width=dim(cos.shape[-1]),
            table_dtype=cos.dtype,
            num_positions=0 if positions is None else dim(cos.shape[0]),
            interleaved_in=interleaved_in,
            interleaved_out=interleaved_out,
            unfit=_unfit_heads(q, k, v)
            or _unfit_tables(q, cos, sin, positions)
            or no_vector("positions", positions, q.shape[0])
            or apart(q, k, cos, sin, positions)
            or None,
        )

    def bytes_moved(self) -> Dim:
        """q read and written, k and v read and stored, a row of each table for each token."""
        heads = 2 * self.num_tokens * self.num_heads * self.head_dim * self.dtype.itemsize
        table = 2 * self.num_tokens * self.table_width * self.table_dtype.itemsize
        positions = 8 * self.num_tokens if self.num_positions else 0
        return super().bytes_moved() + heads + table + positions

    def flops(self) -> Dim:
        """Two multiplications and an addition for each rotated element."""
        return 3 * self.num_tokens * (self.num_heads + self.num_kv_heads) * self.rotary_dim

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random heads, angles and positions beside the rows and the cache of `KvCacheProblem`."""
        (k, v, *cache), kwargs = super().sample(seed=seed, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        shape = self.num_tokens, self.num_heads, self.head_dim
        q = torch.randn(shape, generator=generator, device=device).to(self.dtype)
        table = self.num_positions or self.num_tokens, self.table_width
        angle = 6.28 * torch.rand(table, generator=generator, device=device)
        positions = None
        if self.num_positions:
            positions = torch.randint(
                self.num_positions, (self.num_tokens,), generator=generator, device=device
            )
        tables = angle.cos().to(self.table_dtype), angle.sin().to(self.table_dtype)
        style = {
            "interleaved_in": self.interleaved_in,
            "interleaved_out": self.interleaved_out,
            "rotary_dim": self.rotary_dim,
        }
        return (q, k, v, *tables, positions, *cache), {**kwargs, **style}


def rope_kv_cache_unsupported(problem: RopeKvCacheProblem, use: Use) -> str | None:
    """What no kernel that rotates and stores takes."""
    if reason := problem.unfit or kv_cache_unsupported(problem, use):
        return reason
    if problem.table_dtype not in ROW_DTYPES:
        table = short_name(problem.table_dtype)
        return f"cos is {table}; rotary kernels take bfloat16, float16, float32"
    if problem.head_dim != problem.v_head_dim:
        return f"keys have {problem.head_dim} elements and values {problem.v_head_dim}"
    rotary_dim, width = fixed(problem.rotary_dim), fixed(problem.table_width)
    if rotary_dim is None or width is None:
        return f"the rotated width {problem.rotary_dim} is not known when compiling"
    if rotary_dim % 2 or not 0 < rotary_dim <= problem.head_dim:
        return f"rotary_dim={rotary_dim} is not an even number up to {problem.head_dim}"
    if width not in (rotary_dim, rotary_dim // 2):
        return f"cos is {width} wide, neither rotary_dim={rotary_dim} nor half of it"
    return None


def _unfit_heads(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    for name, x in (("q", q), ("v", v)):
        if x.dim() != 3 or dim(x.stride(-1)) != 1:
            return (
                f"{name} of shape {list(x.shape)} and strides {x.stride()} is not "
                f"[num_tokens, heads, head_dim] with contiguous heads"
            )
    if q.dtype != k.dtype:
        return f"q is {short_name(q.dtype)} but k is {short_name(k.dtype)}"
    if dim(q.shape[0]) != dim(k.shape[0]) or dim(q.shape[2]) != dim(k.shape[2]):
        return f"q is {list(q.shape)} but k is {list(k.shape)}"
    return None


def _unfit_tables(q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> str | None:
    if unlike := unlike_tables(cos, sin):
        return unlike
    if cos.dim() != 2 or any(dim(x.stride(-1)) != 1 for x in (cos, sin)):
        return f"cos has shape {list(cos.shape)} and strides {cos.stride()}, not contiguous rows"
    if positions is None and dim(cos.shape[0]) != dim(q.shape[0]):
        return f"cos has {cos.shape[0]} rows for {q.shape[0]} tokens and there are no positions"
    if positions is not None and positions.dtype != torch.int64:
        return f"positions are {short_name(positions.dtype)}, not int64"
    return None
