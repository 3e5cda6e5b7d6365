"""Packed attention in training: the forward pass that keeps its log-sum-exp, and the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.heads import heads_first
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.attention_backward import attention_backward, attention_with_lse
from aiter_inductor.lowerings.attention_varlen import (
    VarlenProblem,
    attention_varlen,
    pairs_seen,
    tokens_first,
    varlen_unsupported,
    wgmma_varlen_unsupported,
)
from aiter_inductor.lowerings.providers import add_cuda, add_triton

SAVED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "sinks")
HOW = ("max_seqlen_q", "scale", "causal", "window", "softcap")


@op(problem=VarlenProblem.of_training)
def attention_varlen_with_lse(
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
) -> tuple[Tensor, Tensor]:
    """`attention_varlen`, and what its gradients need to compute the probabilities anew.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, max_seqlen_q, scale, causal, window, softcap: as
            in `attention_varlen`.

    Returns:
        out: [total_q, H, Dv], as `attention_varlen` returns it.
        lse: [H, total_q], fp32 (fp64 for fp64), as `attention_with_lse` has it.
    """
    seen = pairs_seen(q, k, cu_seqlens_q, cu_seqlens_k, causal, window)
    out, lse = attention_with_lse.reference(
        *map(heads_first, (q, k, v)), seen, sinks, scale=scale, softcap=softcap
    )
    return tokens_first(out), lse.squeeze(0)


@op(problem=VarlenProblem.of_backward)
def attention_varlen_backward(
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
    *,
    max_seqlen_q: int,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_varlen_with_lse`.

    Args:
        grad: [total_q, H, Dv], the gradient of `out`.
        q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, max_seqlen_q, scale, causal, window, softcap: as
            given to `attention_varlen_with_lse`.
        out, lse: its results.
        grad_lse: [H, total_q], the gradient of `lse`, or None.

    Returns:
        dq: [total_q, H, Dqk], dk: [total_k, KVH, Dqk], dv: [total_k, KVH, Dv], each contiguous.
        dsinks: [H], dtype of the sinks; empty without them.
    """
    seen = pairs_seen(q, k, cu_seqlens_q, cu_seqlens_k, causal, window)
    *found, dsinks = attention_backward.reference(
        *map(heads_first, (grad, q, k, v, out)),
        lse.unsqueeze(0),
        seen,
        sinks,
        None if grad_lse is None else grad_lse.unsqueeze(0),
        scale=scale,
        softcap=softcap,
    )
    dq, dk, dv = map(tokens_first, found)
    return dq, dk, dv, dsinks


def _gradients(
    inputs: Mapping[str, Any], out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> Mapping[str, Tensor | None]:
    """By name, those of the inputs that are not counts."""
    q, k, v, *starts, sinks = (inputs[name] for name in SAVED)
    how = {name: inputs[name] for name in HOW}
    found = attention_varlen_backward(grad, q, k, v, out, lse, *starts, sinks, grad_lse, **how)
    return dict(zip(("q", "k", "v", "sinks"), found, strict=True))


@attention_varlen_with_lse.backward(*SAVED, "output_0", "output_1", zeros=False)
def _(
    inputs: Mapping[str, Any], grad: Tensor | None, grad_lse: Tensor | None
) -> Mapping[str, Tensor | None]:
    out, lse = inputs["output_0"], inputs["output_1"]
    grad = torch.zeros_like(out) if grad is None else grad
    return _gradients(inputs, out, lse, grad, grad_lse)


@attention_varlen.backward(*SAVED)
def _(inputs: Mapping[str, Any], grad: Tensor) -> Mapping[str, Tensor | None]:
    """Attention called for its result alone runs forward once more."""
    out, lse = attention_varlen_with_lse(**{name: inputs[name] for name in (*SAVED, *HOW)})
    return _gradients(inputs, out, lse, grad, None)


add_cuda(attention_varlen_with_lse, "attention", refuse=wgmma_varlen_unsupported)
add_triton(attention_varlen_with_lse, "attention", refuse=varlen_unsupported)
add_cuda(attention_varlen_backward, "attention_backward", refuse=wgmma_varlen_unsupported)
add_triton(attention_varlen_backward, "attention_backward", refuse=varlen_unsupported)
