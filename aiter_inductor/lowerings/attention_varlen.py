"""Attention within sequences of different lengths that lie packed in one tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.heads import heads_first
from aiter_inductor.core.op import OPS, Use, op
from aiter_inductor.core.problem import Dim, dim
from aiter_inductor.lowerings.arguments import apart, misshapen, no_vector
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_hopper import wgmma_unsupported
from aiter_inductor.lowerings.attention_problem import (
    AttentionProblem,
    flash_unsupported,
    mismatch_of,
)
from aiter_inductor.lowerings.providers import add_cuda, add_triton


@dataclass(frozen=True)
class VarlenProblem:
    """Packed attention, [total_q, H, Dqk] against [total_k, KVH, Dqk] and [total_k, KVH, Dv].

    Attributes:
        heads: the attention of all queries with all keys as one sequence.
        num_sequences: how many there are.
        max_seqlen_q: the most queries a sequence has.
        mismatch: what is wrong with the starts, or empty.
    """

    heads: AttentionProblem
    num_sequences: Dim
    max_seqlen_q: Dim
    mismatch: str = ""

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        sinks: Tensor | None = None,
        *,
        max_seqlen_q: int,
        scale: float,
        causal: str = "none",
        window: int | None = None,
        softcap: float | None = None,
    ) -> VarlenProblem:
        """The problem behind the arguments of `attention_varlen`."""
        num_queries, num_heads, qk_dim = map(dim, q.shape)
        num_keys, num_kv_heads, v_dim = map(dim, v.shape)
        heads = AttentionProblem(
            batch=1,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            num_queries=num_queries,
            num_keys=num_keys,
            qk_dim=qk_dim,
            v_dim=v_dim,
            dtype=q.dtype,
            causal=causal,
            window=window,
            softcap=softcap,
            scale=scale,
            mask="none",
            mask_shape=(),
            sinks=sinks is not None,
            layout="bshd",
            mismatch=mismatch_of(q, k, v)
            or misshapen("k", k, (num_keys, num_kv_heads, qk_dim))
            or no_vector("sinks", sinks, num_heads)
            or apart(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks),
        )
        count = dim(cu_seqlens_q.shape[0]) - 1
        return cls(heads, count, dim(max_seqlen_q), _unfit_starts(cu_seqlens_q, cu_seqlens_k))

    @classmethod
    def of_training(cls, *tensors: Tensor | None, **how: Any) -> VarlenProblem:
        """The problem behind the arguments of `attention_varlen_with_lse`."""
        made = cls.of(*tensors, **how)  # type: ignore[arg-type]
        return replace(made, heads=replace(made.heads, asked="out and lse"))

    @classmethod
    def of_backward(
        cls,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        sinks: Tensor | None = None,
        grad_lse: Tensor | None = None,
        **how: Any,
    ) -> VarlenProblem:
        """The problem behind the arguments of `attention_varlen_backward`."""
        made = cls.of(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, **how)
        rows, v_dim = tuple(map(dim, q.shape[:-1])), made.heads.v_dim
        mismatch = (
            made.mismatch
            or misshapen("the gradient", grad, (*rows, v_dim))
            or misshapen("the result", out, (*rows, v_dim))
            or misshapen("its log-sum-exp", lse, rows[::-1])
            or misshapen("the log-sum-exp's gradient", grad_lse, rows[::-1])
            or apart(q, grad, out, lse, grad_lse)
        )
        return replace(made, heads=replace(made.heads, asked="gradients"), mismatch=mismatch)

    def bytes_moved(self) -> Dim:
        """Query, keys and values read once, the result written once."""
        return self.heads.bytes_moved()

    def flops(self) -> Dim:
        """Those of sequences of equal lengths: the lengths are known when it runs."""
        return self.heads.flops() // self.num_sequences

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random heads; sequences as long as the longest, the last one shorter or empty."""
        whole = replace(self.heads, asked="out")
        (q, k, v, _, sinks, _), kwargs = whole.sample(seed=seed, device=device)
        q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (q, k, v))
        starts = torch.arange(self.num_sequences + 1, dtype=torch.int32, device=device)
        of_queries = (starts * self.max_seqlen_q).clamp(max=q.shape[0])
        of_keys = starts * (k.shape[0] // self.num_sequences)
        of_queries[-1], of_keys[-1] = q.shape[0], k.shape[0]
        del kwargs["layout"]
        kwargs["max_seqlen_q"] = self.max_seqlen_q
        if self.heads.asked != "gradients":
            return (q, k, v, of_queries, of_keys, sinks), kwargs
        forward = OPS["attention_varlen_with_lse"]
        out, lse = forward.reference(q, k, v, of_queries, of_keys, sinks, **kwargs)
        generator = torch.Generator(device).manual_seed(seed + 1)
        grad = torch.randn(out.shape, generator=generator, device=device).to(out.dtype)
        return (grad, q, k, v, out, lse, of_queries, of_keys, sinks, None), kwargs


def _unfit_starts(of_queries: Tensor, of_keys: Tensor) -> str:
    """Why kernels cannot read where sequences start, or nothing."""
    count, others = dim(of_queries.shape[0]) - 1, dim(of_keys.shape[0]) - 1
    if count != others:
        return f"{count} sequences of queries, {others} of keys"
    for name, starts in (("cu_seqlens_q", of_queries), ("cu_seqlens_k", of_keys)):
        if starts.dtype != torch.int32:
            return f"{name} is {short_name(starts.dtype)}, not int32"
        if wrong := no_vector(name, starts, count + 1):
            return wrong
    return ""


@op(problem=VarlenProblem.of)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`attention` of each sequence by itself.

    Args:
        q: [total_q, H, Dqk], any float dtype.
        k: [total_k, KVH, Dqk], H a multiple of KVH.
        v: [total_k, KVH, Dv].
        cu_seqlens_q: [num_sequences + 1], int32: where the queries of each sequence start; the
            first is 0, the last total_q.
        cu_seqlens_k: the same of the keys; the last is total_k.
        sinks, scale, causal, window, softcap: as in `attention`.
        max_seqlen_q: no sequence has more queries.

    Returns:
        [total_q, H, Dv], contiguous, dtype of q.
    """
    seen = pairs_seen(q, k, cu_seqlens_q, cu_seqlens_k, causal, window)
    out: Tensor = attention.reference(
        *map(heads_first, (q, k, v)), seen, sinks, scale=scale, softcap=softcap, layout="bshd"
    )
    return tokens_first(out)


def pairs_seen(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: str,
    window: int | None,
) -> Tensor:
    """[1, 1, total_q, total_k], bool: the keys that each query of packed sequences sees."""
    query, key = (torch.arange(len(x), device=x.device) for x in (q, k))
    of_query = torch.searchsorted(cu_seqlens_q[1:].contiguous(), query, right=True)
    of_key = torch.searchsorted(cu_seqlens_k[1:].contiguous(), key, right=True)
    at, at_key = query - cu_seqlens_q[of_query], key - cu_seqlens_k[of_key]
    if causal == "bottom_right":
        at = at + (cu_seqlens_k.diff() - cu_seqlens_q.diff())[of_query]
    seen = of_query[:, None] == of_key
    if causal != "none":
        seen = seen & (at_key <= at[:, None])
    if window is not None:
        seen = seen & (at_key > at[:, None] - window)
    return seen[None, None]


def tokens_first(heads: Tensor) -> Tensor:
    """[1, H, total, D] as [total, H, D], contiguous."""
    return heads.squeeze(0).transpose(0, 1).contiguous()


def varlen_unsupported(problem: VarlenProblem, use: Use) -> str | None:
    """What the flash kernel does not take."""
    return problem.mismatch or flash_unsupported(problem.heads, use)


def wgmma_varlen_unsupported(problem: VarlenProblem, use: Use) -> str | None:
    """What the wgmma kernel does not take."""
    return problem.mismatch or wgmma_unsupported(problem.heads, use)


add_cuda(attention_varlen, "attention", refuse=wgmma_varlen_unsupported)
add_triton(attention_varlen, "attention", refuse=varlen_unsupported)
