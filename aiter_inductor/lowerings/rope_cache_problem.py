"""What is rotated on its way into a cache of fixed length, and what its kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.rope_problem import MAX_HEAD_DIM, RopeProblem, rope_unsupported


@dataclass(frozen=True)
class RopeCacheProblem(RopeProblem):
    """Heads of q that are rotated, and those of k, rotated, and of v that are stored.

    Attributes:
        num_slots: tokens that the cache holds of each sequence.
        v_head_dim: elements of a value.
        cache_dtype: of both caches.
        unfit: what no kernel takes about values, caches and slots, or None.
    """

    num_slots: Dim = 1
    v_head_dim: Dim = 1
    cache_dtype: torch.dtype = torch.bfloat16
    unfit: str | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        *,
        eps: float = 0.0,
        **style: Any,
    ) -> RopeCacheProblem:
        """From the arguments of `rope_cache_write`."""
        if q_weight is None or k_weight is None:
            rope = RopeProblem.of_rope_qk(q, k, cos, sin, **style)
        else:
            rope = RopeProblem.of_qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, **style)
        return cls(
            **vars(rope),
            num_slots=dim(key_cache.shape[2]),
            v_head_dim=dim(v.shape[-1]),
            cache_dtype=key_cache.dtype,
            unfit=_unfit_weights(q_weight, k_weight)
            or _unfit_heads(q, k, v, cos)
            or _unfit_caches(k, v, key_cache, value_cache)
            or _unfit_slots(slots, k),
        )

    def bytes_moved(self) -> Dim:
        """Every head of q, k and v read and written once, tables and slots read once."""
        values = self.batch * self.num_tokens * self.num_kv_heads * self.v_head_dim
        of_values = values * (self.dtype.itemsize + self.cache_dtype.itemsize)
        return super().bytes_moved() + of_values + self.num_tokens * torch.int64.itemsize

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random heads and caches, and slots in random order."""
        (q, k, *rest), kwargs = super().sample(seed=seed, device=device)
        normed = self.weight_dtype is not None
        *weights, cos, sin = rest[:-1] if normed else (None, None, *rest)
        generator = torch.Generator(device).manual_seed(seed + 1)

        def normal(tokens: Dim, width: Dim, dtype: torch.dtype) -> Tensor:
            shape = (self.batch, self.num_kv_heads, tokens, width)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        v = normal(self.num_tokens, self.v_head_dim, self.dtype)
        caches = (
            normal(self.num_slots, self.head_dim, self.cache_dtype),
            normal(self.num_slots, self.v_head_dim, self.cache_dtype),
        )
        order = torch.randperm(self.num_slots, generator=generator, device=device)
        slots = order[: self.num_tokens]
        kwargs.pop("transposed", None)
        kwargs |= {"eps": self.eps} if normed else {}
        return (q, k, v, cos, sin, *caches, slots, *weights), kwargs


def rope_cache_unsupported(problem: RopeCacheProblem, use: Use) -> str | None:
    """What no kernel that rotates and stores takes."""
    if reason := problem.unfit or rope_unsupported(problem, use):
        return reason
    width = fixed(problem.v_head_dim)
    if width is None or not 0 < width <= MAX_HEAD_DIM:
        return f"v_head_dim={problem.v_head_dim} is not a number from 1 to {MAX_HEAD_DIM}"
    if problem.out_dtype != problem.cache_dtype:
        made, held = short_name(problem.out_dtype), short_name(problem.cache_dtype)
        return f"keys leave the rotation as {made} and the cache holds {held}"
    return None


def _unfit_weights(q_weight: Tensor | None, k_weight: Tensor | None) -> str | None:
    if (q_weight is None) != (k_weight is None):
        return "one of q and k is normalised and the other is not"
    return None


def _unfit_heads(q: Tensor, k: Tensor, v: Tensor, cos: Tensor) -> str | None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            return f"{name} has {x.dim()} dimensions, not [batch, heads, tokens, head_dim]"
    if v.dtype != k.dtype:
        return f"v is {short_name(v.dtype)} but k is {short_name(k.dtype)}"
    if dim(v.stride(-1)) != 1:
        return f"the last stride of v is {v.stride(-1)}; rotary kernels read with stride 1"
    if [dim(n) for n in v.shape[:3]] != [dim(n) for n in k.shape[:3]]:
        return f"v is {list(v.shape)} but k is {list(k.shape)}"
    if cos.dim() == 4 and dim(cos.shape[1]) != 1:
        return f"cos is {list(cos.shape)}: heads are its second dimension and do not share it"
    return None


def _unfit_caches(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor) -> str | None:
    for name, rows, cache in (("key", k, key_cache), ("value", v, value_cache)):
        found = [dim(cache.shape[axis]) for axis in (0, 1, -1)]
        wanted = [dim(rows.shape[axis]) for axis in (0, 1, -1)]
        if cache.dim() != 4 or found != wanted:
            return f"{name}_cache is {list(cache.shape)} but the heads are {list(rows.shape)}"
        if dim(cache.stride(-1)) != 1:
            return f"{name}_cache has last stride {cache.stride(-1)}; kernels write with stride 1"
    if dim(key_cache.shape[2]) != dim(value_cache.shape[2]):
        return f"key_cache holds {key_cache.shape[2]} tokens, value_cache {value_cache.shape[2]}"
    if key_cache.dtype != value_cache.dtype:
        ours, theirs = short_name(key_cache.dtype), short_name(value_cache.dtype)
        return f"key_cache is {ours} but value_cache is {theirs}"
    return None


def _unfit_slots(slots: Tensor, k: Tensor) -> str | None:
    if slots.dtype != torch.int64:
        return f"slots are {short_name(slots.dtype)}, not int64"
    if slots.dim() != 1 or dim(slots.shape[0]) != dim(k.shape[2]):
        return f"slots are {list(slots.shape)} for {k.shape[2]} tokens"
    return None
