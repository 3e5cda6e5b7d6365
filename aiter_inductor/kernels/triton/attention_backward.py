"""Gradients of flash attention; the host side of attention_backward_kernel.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aiter_inductor.core.heads import heads_first
from aiter_inductor.kernels.triton.attention import (
    contiguous,
    head_sizes,
    innermost,
    spread,
)
from aiter_inductor.kernels.triton.attention_backward_kernel import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
)
from aiter_inductor.kernels.triton.launch import launchable


@dataclass(frozen=True)
class AttentionBackwardConfig:
    """What the programs of both kernels handle; each field is a column of the tuned table.

    Attributes:
        keys_n: keys a program of the first kernel owns.
        keys_m: queries it reads at a time.
        queries_m: queries a program of the second kernel owns.
        queries_n: keys it reads at a time.
        num_warps: warps of 32 lanes; a chip with wider ones launches half as many.
        num_stages: tiles in flight.
    """

    keys_n: int
    keys_m: int
    queries_m: int
    queries_n: int
    num_warps: int = 8
    num_stages: int = 2

    @classmethod
    def default(cls, qk_dim: int, itemsize: int, *, amd: bool) -> AttentionBackwardConfig:
        """Untuned choice.

        Args:
            qk_dim: elements a head of queries and keys.
            itemsize: bytes an element.
            amd: whether tiles must fit 64 KiB, the LDS of a gfx942.
        """
        if itemsize > 2:
            return cls(32, 32, 32, 32, num_warps=4 if qk_dim <= 128 else 8, num_stages=1)
        if amd or qk_dim > 192:
            few = 32 if qk_dim > 128 else 64
            return cls(64, few, 64, few, num_warps=8, num_stages=1)
        return cls(128, 64, 128, 64, num_warps=8, num_stages=2 if qk_dim <= 128 else 1)

    def launch(self) -> dict[str, int]:
        """Keywords for the launch."""
        warps = max(self.num_warps // 2, 1) if torch.version.hip else self.num_warps
        return {"num_warps": warps, "num_stages": self.num_stages}


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
    config: AttentionBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks; see the op of this name."""
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = _delta(grad, out, grad_lse)
    inputs = (grad, q, k, v, mask, lse.contiguous(), delta, contiguous(first_keys))
    _fill(gradients, inputs, scale, causal, window, softcap, config)
    return *gradients, _of_sinks(sinks, q, lse, delta)


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
    config: AttentionBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients within packed sequences; see the op of this name."""
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grad, of_q, k, v, out = map(heads_first, (grad, q, k, v, out))
    lse = lse.contiguous().unsqueeze(0)
    delta = _delta(grad, out, None if grad_lse is None else grad_lse.unsqueeze(0))
    inputs = (grad, of_q, k, v, None, lse, delta, None)
    starts = (cu_seqlens_q, cu_seqlens_k)
    of_heads = tuple(map(heads_first, gradients))
    _fill(of_heads, inputs, scale, causal, window, softcap, config, starts)
    return *gradients, _of_sinks(sinks, q, lse, delta)


def _delta(grad: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """[B, H, S], contiguous: what the normalisation takes from every probability's gradient."""
    delta = (grad.float() * out.float()).sum(-1)
    return (delta if grad_lse is None else delta - grad_lse).contiguous()


def _of_sinks(sinks: Tensor | None, q: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[H]: what the sinks took from every query."""
    if sinks is None:
        return q.new_empty(0)
    share = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)


def _fill(
    gradients: tuple[Tensor, ...],
    inputs: tuple[Tensor | None, ...],
    scale: float,
    causal: str,
    window: int | None,
    softcap: float | None,
    config: AttentionBackwardConfig | None,
    packed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill those of q, k and v.

    Args:
        gradients: those of q, k and v, heads first.
        inputs: the gradient of the result, q, k, v, a mask or None, log-sum-exp, `_delta`, and
            first keys or None.
        packed: where each sequence starts among queries and keys, with the end of the last; None if
            sequences are the batch.
    """
    dq, dk, dv = gradients
    grad, q, k, v = (innermost(x) for x in inputs[:4] if x is not None)
    batch, num_heads, S, qk_dim = q.shape
    num_kv_heads, T, v_dim = k.shape[1], k.shape[2], v.shape[-1]
    if config is None:
        amd = torch.version.hip is not None
        config = AttentionBackwardConfig.default(qk_dim, q.element_size(), amd=amd)
    mask, mask_strides = spread(inputs[4], batch, num_heads, S, T)
    shared = {
        "CAUSAL": causal != "none",
        "FROM_END": causal == "bottom_right",
        **head_sizes(qk_dim, v_dim),
        **config.launch(),
    }
    num_sequences = 0 if packed is None else packed[0].shape[0] - 1
    starts = (*(packed or (None, None)), num_sequences)
    given = (grad, q, k, v, mask, *inputs[5:], *starts)
    numbers = (scale, softcap, window, num_heads, num_heads // num_kv_heads, S, T)
    strides = tuple(stride for x in (grad, q, k, v) for stride in x.stride()[:3])
    blocks = T // config.keys_n + num_sequences if packed else triton.cdiv(T, config.keys_n)
    launchable(attention_backward_keys_kernel)[(blocks * batch * num_kv_heads,)](
        *given,
        dk,
        dv,
        *numbers,
        *strides,
        *dk.stride()[:3],
        *dv.stride()[:3],
        *mask_strides,
        BLOCK_M=config.keys_m,
        BLOCK_N=config.keys_n,
        **shared,
    )
    blocks = S // config.queries_m + num_sequences if packed else triton.cdiv(S, config.queries_m)
    launchable(attention_backward_queries_kernel)[(blocks * batch * num_heads,)](
        *given,
        dq,
        *numbers,
        *strides,
        *dq.stride()[:3],
        *mask_strides,
        BLOCK_M=config.queries_m,
        BLOCK_N=config.queries_n,
        **shared,
    )
