"""What an attention is asked to compute, and which of it torch's own SDPA does well."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import HALF_DTYPES, ROW_DTYPES, short_name
from aiter_inductor.core.op import OPS, Use
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.arguments import apart, misshapen, no_vector

MAX_HEAD_DIM = 256
"""Columns of the widest head whose tiles the chips' shared memory holds."""

MIN_PAIRS = 128 * 128
"""Queries times keys from which widening the values pays on the CPU."""


@dataclass(frozen=True)
class AttentionProblem:
    """One attention, [B, H, S, Dqk] against [B, KVH, T, Dqk] and [B, KVH, T, Dv].

    Attributes:
        mask: `none`, `bool` or the dtype of an additive mask.
        mask_shape: its sizes; empty without one, and for one [B, 1, S, T].
        mismatch: why the arguments do not fit together, or empty.
        asked: `out`, `out and lse` or `gradients`.
        first_keys: whether each query names the first key that it sees.
    """

    batch: Dim
    num_heads: Dim
    num_kv_heads: Dim
    num_queries: Dim
    num_keys: Dim
    qk_dim: Dim
    v_dim: Dim
    dtype: torch.dtype
    causal: str
    window: int | None
    softcap: float | None
    scale: float
    mask: str
    mask_shape: tuple[Dim, ...]
    sinks: bool
    layout: str
    mismatch: str = ""
    asked: str = "out"
    first_keys: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
        first_keys: Tensor | None = None,
        *,
        scale: float,
        causal: str = "none",
        window: int | None = None,
        softcap: float | None = None,
        layout: str = "bhsd",
    ) -> AttentionProblem:
        """The problem behind the arguments of `attention`."""
        batch, num_heads, num_queries, qk_dim = map(dim, q.shape)
        return cls(
            batch=batch,
            num_heads=num_heads,
            num_kv_heads=dim(k.shape[1]),
            num_queries=num_queries,
            num_keys=dim(k.shape[2]),
            qk_dim=qk_dim,
            v_dim=dim(v.shape[-1]),
            dtype=q.dtype,
            causal=causal,
            window=window,
            softcap=softcap,
            scale=scale,
            mask="none" if mask is None else short_name(mask.dtype),
            mask_shape=() if mask is None else tuple(map(dim, mask.shape)),
            sinks=sinks is not None,
            layout=layout,
            mismatch=mismatch_of(q, k, v)
            or misshapen("k", k, (batch, k.shape[1], k.shape[2], qk_dim))
            or no_vector("sinks", sinks, num_heads)
            or _unfit_first_keys(first_keys, q)
            or apart(q, k, v, mask, sinks, first_keys),
            first_keys=first_keys is not None,
        )

    @classmethod
    def of_training(cls, *tensors: Tensor | None, **kwargs: Any) -> AttentionProblem:
        """The problem behind the arguments of `attention_with_lse`."""
        return replace(cls.of(*tensors, **kwargs), asked="out and lse")  # type: ignore[arg-type]

    @classmethod
    def of_backward(
        cls,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
        grad_lse: Tensor | None = None,
        first_keys: Tensor | None = None,
        *,
        scale: float,
        causal: str = "none",
        window: int | None = None,
        softcap: float | None = None,
    ) -> AttentionProblem:
        """The problem behind the arguments of `attention_backward`."""
        forward = cls.of(
            *(q, k, v, mask, sinks, first_keys),
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
        )
        *rows, v_dim = *map(dim, q.shape[:-1]), forward.v_dim
        mismatch = (
            forward.mismatch
            or misshapen("the gradient", grad, (*rows, v_dim))
            or misshapen("the result", out, (*rows, v_dim))
            or misshapen("its log-sum-exp", lse, rows)
            or misshapen("the log-sum-exp's gradient", grad_lse, rows)
            or apart(q, grad, out, lse, grad_lse)
        )
        return replace(forward, asked="gradients", mismatch=mismatch)

    def bytes_moved(self) -> Dim:
        """Query, keys, values and mask read once, the result written once.

        Backward, the result and its gradient are read and three gradients are written.
        """
        rows = self.batch * self.num_heads * self.num_queries
        widths = self.qk_dim + self.v_dim
        keys = self.batch * self.num_kv_heads * self.num_keys * widths
        read = (rows * widths + keys) * self.dtype.itemsize
        if self.asked == "gradients":
            read = 2 * read
        if self.asked != "out":
            read = read + rows * torch.float32.itemsize
        if self.mask == "none":
            return read
        return read + math.prod(self.mask_shape) * getattr(torch, self.mask).itemsize

    def flops(self) -> Dim:
        """Two products over the pairs of query and key that are seen; five backward."""
        widths = self.qk_dim + self.v_dim
        if self.asked == "gradients":
            widths = 3 * self.qk_dim + 2 * self.v_dim
        return 2 * self.batch * self.num_heads * self._pairs() * widths

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random heads; a bool mask hides one pair in four."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: Dim) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        q = normal(self.batch, self.num_heads, self.num_queries, self.qk_dim).to(self.dtype)
        k = normal(self.batch, self.num_kv_heads, self.num_keys, self.qk_dim).to(self.dtype)
        v = normal(self.batch, self.num_kv_heads, self.num_keys, self.v_dim).to(self.dtype)
        mask = None
        if self.mask != "none":
            shape = self.mask_shape or (self.batch, 1, self.num_queries, self.num_keys)
            drawn = normal(*shape)
            mask = drawn > -0.67 if self.mask == "bool" else drawn.to(getattr(torch, self.mask))
        sinks = normal(self.num_heads).to(self.dtype) if self.sinks else None
        first_keys = self._sample_first_keys(generator, device) if self.first_keys else None
        names = ("scale", "causal", "window", "softcap", "layout")
        kwargs = {name: getattr(self, name) for name in names}
        if self.asked != "gradients":
            return (q, k, v, mask, sinks, first_keys), kwargs
        forward = OPS["attention_with_lse"].reference
        out, lse = forward(q, k, v, mask, sinks, first_keys, **kwargs)
        grad = normal(*out.shape).to(self.dtype)
        del kwargs["layout"]
        return (grad, q, k, v, out, lse, mask, sinks, None, first_keys), kwargs

    def _sample_first_keys(self, generator: torch.Generator, device: str) -> Tensor:
        """[B, S], int32: one query in eight starts a document at the key of its own number."""
        at = torch.arange(self.num_queries, dtype=torch.int32, device=device)
        drawn = torch.rand(self.batch, self.num_queries, generator=generator, device=device)
        starts = torch.where(drawn < 0.125, at, 0)
        return starts.cummax(-1).values if starts.numel() else starts

    def _pairs(self) -> Dim:
        """Pairs of query and key that are seen; every pair where sizes are not known."""
        S, T = self.num_queries, self.num_keys
        if self.causal == "none" or not (isinstance(S, int) and isinstance(T, int)):
            return S * T
        shift = T - S if self.causal == "bottom_right" else 0
        ends = (min(max(i + shift + 1, 0), T) for i in range(S))
        return sum(end if self.window is None else min(end, self.window) for end in ends)


def sdpa_unsupported(problem: AttentionProblem, use: Use) -> str | None:
    """What `scaled_dot_product_attention` cannot be asked for without building a mask."""
    if problem.mismatch:
        return problem.mismatch
    extras = {"window": problem.window, "softcap": problem.softcap}
    for name, given in extras.items():
        if given is not None:
            return f"SDPA has no {name}, and {name}={given:g} is asked for"
    if problem.sinks:
        return "SDPA has no attention sinks"
    if problem.first_keys:
        return "SDPA hides other documents by a mask of all pairs only"
    if problem.causal == "bottom_right":
        S, T = problem.num_queries, problem.num_keys
        return f"SDPA counts S={S} queries from the first of T={T} keys, not from the last"
    if reason := _open_heads(problem):
        return reason
    if problem.causal != "none" and problem.mask != "none":
        return f"SDPA takes causal={problem.causal} or a mask, not both"
    return None


def flash_unsupported(problem: AttentionProblem, use: Use) -> str | None:
    """What the flash kernels do not take."""
    if problem.mismatch:
        return problem.mismatch
    if problem.dtype not in ROW_DTYPES:
        return f"q, k and v are {short_name(problem.dtype)}; sums are kept in fp32"
    for name in ("qk_dim", "v_dim"):
        width = fixed(getattr(problem, name))
        if width is None or not 0 < width <= MAX_HEAD_DIM:
            return f"{name}={getattr(problem, name)} is not a number from 1 to {MAX_HEAD_DIM}"
    if reason := _open_heads(problem):
        return reason
    if problem.scale <= 0:
        return f"scale={problem.scale:g} is not positive, and maxima are taken of raw scores"
    return None


def sdpa_has_nothing_to_add(problem: AttentionProblem, use: Use) -> str | None:
    """Where the program's own call is as good.

    A fused kernel reads its mask already. Values widened for the CPU's flash kernel are a copy of
    them all: 16 heads of 48 and 32 in fp32 take 0.48 × the speed of the unfused product at one
    query of 1024 keys and 0.77 × at 64 of 64, but 2.1 × at 256 of 256 and 12 × at 16 of 1024.
    """
    S, T = problem.num_queries, problem.num_keys
    if use.arch.device_type == "cpu" and _is_less(problem.v_dim, problem.qk_dim):
        if S == 1 or (isinstance(S, int) and isinstance(T, int) and S * T < MIN_PAIRS):
            return f"S={S} queries of T={T} keys do not pay for widening v to the heads of q"
        return None
    if problem.mask == "none":
        return None
    return f"the {problem.mask} mask is read either way: the program's own code is as fast"


def _open_heads(problem: AttentionProblem) -> str | None:
    for name in ("num_heads", "num_kv_heads"):
        if fixed(getattr(problem, name)) is None:
            return f"{name}={getattr(problem, name)} is not known when compiling"
    return None


def mismatch_of(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why they do not fit together, or nothing; heads are the second dimension of each."""
    if not q.dtype == k.dtype == v.dtype:
        names = ", ".join(short_name(t.dtype) for t in (q, k, v))
        return f"q, k and v are {names}, not of one dtype"
    heads, kv_heads = dim(q.shape[1]), dim(k.shape[1])
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % max(kv_heads, 1):
        return f"{heads} query heads do not divide into {kv_heads} groups"
    return misshapen("v", v, (*k.shape[:-1], v.shape[-1]))


def _unfit_first_keys(first_keys: Tensor | None, q: Tensor) -> str:
    if first_keys is None:
        return ""
    found, wanted = tuple(map(dim, first_keys.shape)), (dim(q.shape[0]), dim(q.shape[2]))
    if found != wanted or first_keys.dtype != torch.int32:
        kinds = short_name(first_keys.dtype)
        return f"first keys are {kinds}{list(found)}, not int32{list(wanted)}"
    return ""


def _is_less(left: Dim, right: Dim) -> bool:
    return isinstance(left, int) and isinstance(right, int) and left < right


def one_key(problem: AttentionProblem, use: Use) -> str | None:
    """Of one key, without a cache, the program's own softmax is cheaper than any kernel.

    All kernels of Gemma-2-9b's four layers, 64x1 tokens, take an H100 1563 us with Triton's among
    them and 1508 without.
    """
    if use.arch.name != "sm_90" or fixed(problem.num_keys) != 1:
        return None
    return "T=1 key: Gemma-2-9b's kernels take 1563 us with one on sm_90 and 1508 without"


def sdpa_is_faster(problem: AttentionProblem, use: Use) -> str | None:
    """Where what torch calls, cuDNN on Hopper, is preferred to the Triton kernel.

    On one H100, 1x4096 tokens of 128 heads of 192 and 128 take 1419 us against 1167, 2x4096 of 32
    and 8 heads of 128 take 584 against 486. With a mask that both read, DeepSeek-V3's layer of
    1x4096 tokens takes 7.55 ms on an H200 against 6.60. In float32 the kernel spills 1.9 KB of
    registers, as Triton 3.7 compiles it.
    """
    if reason := one_key(problem, use):
        return reason
    if use.arch.name != "sm_90" or sdpa_unsupported(problem, use):
        return None
    if problem.dtype not in HALF_DTYPES:
        return f"{short_name(problem.dtype)} spills registers on sm_90; torch has kernels for it"
    if problem.mask != "none":
        return "DeepSeek-V3's layer takes 7.55 ms with a mask on sm_90 and with torch's own 6.60"
    return "2x4096 tokens of 32 and 8 heads take 584 us on sm_90 and torch's cuDNN 486"
