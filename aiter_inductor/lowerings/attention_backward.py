"""Attention in training: the forward pass that keeps its log-sum-exp, and the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.op import op
from aiter_inductor.lowerings.attention import attention, capped_scores, in_layout, masked
from aiter_inductor.lowerings.attention_hopper import (
    sdpa_trains_faster,
    wgmma_unsupported,
)
from aiter_inductor.lowerings.attention_problem import (
    AttentionProblem,
    flash_unsupported,
    sdpa_is_faster,
)
from aiter_inductor.lowerings.providers import add_cuda, add_triton

SAVED = ("q", "k", "v", "mask", "sinks", "first_keys")


@op(problem=AttentionProblem.of_training)
def attention_with_lse(
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
) -> tuple[Tensor, Tensor]:
    """`attention`, and what its gradients need to compute the probabilities anew.

    Args:
        q, k, v, mask, sinks, first_keys, scale, causal, window, softcap, layout: as in
            `attention`.

    Returns:
        out: [B, H, S, Dv], as `attention` returns it.
        lse: [B, H, S], fp32 (fp64 for fp64): the logarithm of the sum of a query's exponentials,
            its sink's included; minus infinity where it sees nothing.
    """
    scores = masked(capped_scores(q, k, scale, softcap), mask, causal, window, first_keys)
    logits = scores
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        logits = torch.cat((scores, sink), -1)
    lse = _log_sum_exp(logits)
    p = _probabilities(scores, lse.unsqueeze(-1))
    p = p.unflatten(1, (v.shape[1], q.shape[1] // v.shape[1]))
    out = (p @ v.to(scores.dtype).unsqueeze(2)).flatten(1, 2).to(q.dtype)
    return in_layout(out, layout), lse


@op(problem=AttentionProblem.of_backward)
def attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_with_lse`.

    Args:
        grad: [B, H, S, Dv], the gradient of `out`.
        q, k, v, mask, sinks, first_keys, scale, causal, window, softcap: as given to
            `attention_with_lse`.
        out, lse: its results.
        grad_lse: [B, H, S], the gradient of `lse`, or None.

    Returns:
        dq: [B, H, S, Dqk], dk: [B, KVH, T, Dqk], dv: [B, KVH, T, Dv], each contiguous.
        dsinks: [H], dtype of the sinks; empty without them.
    """
    scores = capped_scores(q, k, scale, softcap)
    seen = masked(scores, mask, causal, window, first_keys)
    p = _probabilities(seen, lse.unsqueeze(-1))
    acc, groups = scores.dtype, (k.shape[1], q.shape[1] // k.shape[1])
    delta = _delta(grad, out, grad_lse, acc)
    of_grad = grad.to(acc).unflatten(1, groups)
    dp = (of_grad @ v.to(acc).unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    ds = p * (dp - delta.unsqueeze(-1)) * scale
    if softcap is not None:
        ds = ds * (1 - (scores / softcap).square())
    of_ds = ds.unflatten(1, groups)
    dq = (of_ds @ k.to(acc).unsqueeze(2)).flatten(1, 2)
    dk = (of_ds.transpose(-1, -2) @ q.to(acc).unflatten(1, groups)).sum(2)
    dv = (p.unflatten(1, groups).transpose(-1, -2) @ of_grad).sum(2)
    dsinks = q.new_empty(0)
    if sinks is not None:
        share = _probabilities(sinks.to(acc)[:, None], lse)
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    dq, dk, dv = (d.to(q.dtype).contiguous() for d in (dq, dk, dv))
    return dq, dk, dv, dsinks


def _log_sum_exp(logits: Tensor) -> Tensor:
    """`torch.logsumexp(logits, -1)`, also where the batch has a size that only the run knows.

    torch's own asks whether it is zero.
    """
    if logits.shape[-1] == 0:
        return logits.sum(-1) - torch.inf
    largest = logits.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    return (logits - largest).exp().sum(-1).log() + largest.squeeze(-1)


def _probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    """`exp(logits - lse)`; zeros in the rows that see nothing."""
    return torch.exp(logits - lse).masked_fill(lse == -torch.inf, 0.0)


def _delta(grad: Tensor, out: Tensor, grad_lse: Tensor | None, acc: torch.dtype) -> Tensor:
    """[B, H, S]: what the normalisation takes from the gradient of every probability."""
    delta = (grad.to(acc) * out.to(acc)).sum(-1)
    return delta if grad_lse is None else delta - grad_lse.to(acc)


def _mask_gradient(
    inputs: Mapping[str, Any], out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> Tensor:
    """The gradient of an additive mask, summed over what it was broadcast to.

    All pairs of query and key are written out: no kernel computes it.
    """
    q, k, v, mask = (inputs[name] for name in ("q", "k", "v", "mask"))
    scores = capped_scores(q, k, inputs["scale"], inputs["softcap"])
    hiding = (mask, inputs["causal"], inputs["window"], inputs["first_keys"])
    p = _probabilities(masked(scores, *hiding), lse.unsqueeze(-1))
    acc, groups = scores.dtype, (k.shape[1], q.shape[1] // k.shape[1])
    of_grad = grad.to(acc).unflatten(1, groups)
    dp = (of_grad @ v.to(acc).unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    ds = p * (dp - _delta(grad, out, grad_lse, acc).unsqueeze(-1))
    found: Tensor = ds.sum_to_size(mask.shape).to(mask.dtype)
    return found


def _gradients(
    inputs: Mapping[str, Any], out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> Mapping[str, Tensor | None]:
    """By name, those of attention's inputs."""
    how = {name: inputs[name] for name in ("scale", "causal", "window", "softcap")}
    q, k, v, mask, sinks, first_keys = (inputs[name] for name in SAVED)
    dq, dk, dv, dsinks = attention_backward(
        grad, q, k, v, out, lse, mask, sinks, grad_lse, first_keys, **how
    )
    found = {"q": dq, "k": dk, "v": dv, "sinks": dsinks}
    if inputs["needed"].get("mask"):
        found["mask"] = _mask_gradient(inputs, out, lse, grad, grad_lse)
    return found


@attention_with_lse.backward(*SAVED, "output_0", "output_1", zeros=False)
def _(
    inputs: Mapping[str, Any], grad: Tensor | None, grad_lse: Tensor | None
) -> Mapping[str, Tensor | None]:
    out, lse = inputs["output_0"], inputs["output_1"]
    grad = torch.zeros_like(out) if grad is None else grad
    return _gradients(inputs, out, lse, grad, grad_lse)


@attention.backward(*SAVED)
def _(inputs: Mapping[str, Any], grad: Tensor) -> Mapping[str, Tensor | None]:
    """Attention called for its result alone runs forward once more."""
    names = (*SAVED, "scale", "causal", "window", "softcap", "layout")
    out, lse = attention_with_lse(**{name: inputs[name] for name in names})
    return _gradients(inputs, out, lse, grad, None)


add_cuda(attention_with_lse, "attention", refuse=wgmma_unsupported, decline=sdpa_trains_faster)
add_triton(attention_with_lse, "attention", refuse=flash_unsupported, decline=sdpa_is_faster)
add_cuda(attention_backward, "attention_backward", refuse=wgmma_unsupported)
add_triton(attention_backward, "attention_backward", refuse=flash_unsupported)
