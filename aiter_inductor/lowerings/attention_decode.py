"""Attention of one query a sequence: what the kernel that splits the keys among waves takes."""

from __future__ import annotations

from aiter_inductor.core.dtypes import HALF_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.attention_problem import (
    AttentionProblem,
    flash_unsupported,
    one_key,
    sdpa_unsupported,
)

VECTOR_BYTES = 16
MASK_DTYPES = ("bool", "bfloat16", "float16", "float32")


def one_query_unsupported(problem: AttentionProblem, use: Use) -> str | None:
    """What decode_attention.hip does not take."""
    if fixed(problem.num_queries) != 1:
        return f"S={problem.num_queries} queries; the kernel has one a sequence"
    if reason := flash_unsupported(problem, use):
        return reason
    if problem.dtype not in HALF_DTYPES:
        return f"q, k and v are {short_name(problem.dtype)}; it multiplies bf16 and fp16"
    vec = VECTOR_BYTES // problem.dtype.itemsize
    for name in ("qk_dim", "v_dim"):
        if (width := getattr(problem, name)) % vec:
            return f"{name}={width} is no multiple of the {vec} in 16 bytes"
    if problem.causal == "top_left":
        return "counted from the first key, one query sees no other"
    return _mask_unsupported(problem)


def sdpa_decodes_faster(problem: AttentionProblem, use: Use) -> str | None:
    """Where torch's cuDNN is faster on an H100: keys without a mask, a softcap or sinks.

    8 sequences of 4096 keys, 32 and 8 heads of 128, take 55.4 us and cuDNN 51.8; what Inductor
    makes of the plain formula takes 416. One sequence takes 14.3 and 13.3 (61).
    """
    if reason := one_key(problem, use):
        return reason
    if use.arch.name != "sm_90" or problem.mask != "none" or sdpa_unsupported(problem, use):
        return None
    return "8 sequences of 4096 keys take 55 us on sm_90 and torch's cuDNN 52"


def _mask_unsupported(problem: AttentionProblem) -> str | None:
    if problem.first_keys:
        return "it reads all keys that a mask shows, and the query names the first that it sees"
    if problem.mask == "none":
        return None
    if problem.mask not in MASK_DTYPES:
        return f"the mask is {problem.mask}, none of {', '.join(MASK_DTYPES)}"
    if len(problem.mask_shape) != 4 or problem.mask_shape[1:3] != (1, 1):
        return f"a mask of {problem.mask_shape} is not the same for all heads"
    if problem.window is not None:
        return f"window={problem.window} counts from the last key, which the mask may hide"
    return None
