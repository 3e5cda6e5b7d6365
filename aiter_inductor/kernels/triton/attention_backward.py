"""Gradients of flash attention; the host side of attention_backward_kernel.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.attention import head_sizes, innermost, spread
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
    *,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    config: AttentionBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks; see the op of this name."""
    grad, q, k, v = innermost(grad), innermost(q), innermost(k), innermost(v)
    lse = lse.contiguous()
    batch, num_heads, S, qk_dim = q.shape
    num_kv_heads, T, v_dim = k.shape[1], k.shape[2], v.shape[-1]
    delta = (grad.float() * out.float()).sum(-1)
    delta = (delta if grad_lse is None else delta - grad_lse).contiguous()
    if sinks is None:
        dsinks = q.new_empty(0)
    else:
        share = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    if config is None:
        amd = torch.version.hip is not None
        config = AttentionBackwardConfig.default(qk_dim, q.element_size(), amd=amd)
    mask, mask_strides = spread(mask, batch, num_heads, S, T)
    shared = {
        "CAUSAL": causal != "none",
        "FROM_END": causal == "bottom_right",
        **head_sizes(qk_dim, v_dim),
        **config.launch(),
    }
    given = (grad, q, k, v, mask, lse, delta)
    numbers = (scale, softcap, window, num_heads, num_heads // num_kv_heads, S, T)
    strides = tuple(stride for x in (grad, q, k, v) for stride in x.stride()[:3])
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    programs = (triton.cdiv(T, config.keys_n) * batch * num_kv_heads,)
    launchable(attention_backward_keys_kernel)[programs](
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
    programs = (triton.cdiv(S, config.queries_m) * batch * num_heads,)
    launchable(attention_backward_queries_kernel)[programs](
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
    return dq, dk, dv, dsinks
