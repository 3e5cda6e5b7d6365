"""What the wgmma attention kernels take on sm_90, and where torch's own are faster."""

from __future__ import annotations

from aiter_inductor.core.dtypes import HALF_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.attention_problem import (
    MAX_HEAD_DIM,
    AttentionProblem,
    flash_unsupported,
    one_key,
    sdpa_unsupported,
)

FEW_QUERIES = 16
"""Queries below which a block's rows, 64 for each warpgroup, are mostly empty."""
MANY_QUERIES = 4096
NARROW, WIDE = 64, 256
SHORT_WINDOW = 256
FEW_TRAINED = 512
WIDEST_ADDED = 128
"""Elements of a head whose gradients are made in one walk; wider ones take two, without sums."""


def wgmma_unsupported(problem: AttentionProblem, use: Use) -> str | None:
    """What the forward kernel does not take."""
    if reason := flash_unsupported(problem, use):
        return reason
    if problem.dtype not in HALF_DTYPES:
        return f"q, k and v are {short_name(problem.dtype)}; wgmma multiplies bf16 and fp16 here"
    if problem.mask != "none":
        return f"the kernel reads no mask, and there is a {problem.mask} one"
    for name in ("qk_dim", "v_dim"):
        if (width := fixed(getattr(problem, name))) is None or width % 8:
            return f"{name}={width} is not a multiple of 8 up to {MAX_HEAD_DIM}: 16-byte rows"
    return None


def others_attend_faster(problem: AttentionProblem, use: Use) -> str | None:
    """Where torch's cuDNN or, for short windows, the Triton kernel is faster on an H200.

    One query of 4096 keys, 8 sequences of 32 and 8 heads, takes 97 us against 37. Without a causal
    mask 4x1024 tokens of 16 heads of 128 take 63 against 60, and 2x8192 1655 against 1726. 64 and
    8 heads of 64 take 18.5 against 16.1 at 1x512 tokens and 602 against 639 at 2x4096; with a
    window of 256 98 against Triton's 95, with one of 512 128 against 135.
    """
    if reason := one_key(problem, use):
        return reason
    S = fixed(problem.num_queries)
    if problem.window is not None and problem.window <= SHORT_WINDOW and problem.v_dim == NARROW:
        return f"window={problem.window} of {NARROW}: 128 take 82 us on sm_90 and with Triton 74"
    if S is None or sdpa_unsupported(problem, use):
        return None
    if S < FEW_QUERIES:
        return f"S={S} queries: one of 4096 keys takes 97 us on sm_90 and torch's cuDNN 37"
    if problem.causal == "none" and S < MANY_QUERIES:
        return f"S={S} queries of all keys: 4x1024 take 63 us on sm_90 and torch's cuDNN 60"
    if problem.qk_dim == NARROW and S < MANY_QUERIES:
        return f"S={S} queries of {NARROW}: 1x512 take 18.5 us on sm_90 and torch's cuDNN 16.1"
    if problem.v_dim == WIDE:
        return f"2x4096 queries of {WIDE} take 464 us on sm_90 and torch's cuDNN 455"
    return None


def sdpa_trains_faster(problem: AttentionProblem, use: Use) -> str | None:
    """Where torch's cuDNN is faster backward, which takes most of the time, on an H100.

    2x4096 tokens, causal: 32 and 8 heads of 128 take 1461 us against 1638, 64 and 8 of 64 take 1664
    against 1994, 16 of 256 take 1543 against 2076; of all keys, 16 of 128 take 1387 against 1401
    and 32 of 64 take 1596 against 1620. 1x4096 of 128 heads of 192 and 128 take 3849 against 4302,
    1x16384 of 32 and 8 heads 9350 against 9881. Fewer of all keys, 4x2048 of 16 heads of 128, take
    816 against 722; 1x512 of 32 and 8 heads 183 against 104: launches, which are three here.
    """
    if sdpa_unsupported(problem, use):
        return None
    if reason := wgmma_unsupported(problem, use):
        return f"{reason}; others take 2953 us on sm_90 where torch's cuDNN takes 1653"
    S = fixed(problem.num_queries)
    narrow = max(problem.qk_dim, problem.v_dim) <= WIDEST_ADDED
    if narrow and problem.causal == "none" and (S is None or S < MANY_QUERIES):
        return f"S={S} queries of all keys: 4x2048 take 816 us backward on sm_90, with cuDNN 722"
    if S is not None and S <= FEW_TRAINED:
        return f"S={S} queries: 1x512 take 183 us backward on sm_90 and torch's cuDNN 104"
    return None
