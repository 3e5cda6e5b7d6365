"""Gradients of flash attention on Hopper; the Python side of attention_backward.cu."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import (
    KernelSignature,
    f32,
    i32,
    i64,
    pointer,
    tensor_map_of,
)
from aiter_inductor.kernels.cuda.attention import heads_map, readable, refuse_extras
from aiter_inductor.kernels.cuda.loading import arch_name, cuda_module, load_kernel

WIDTH = 128  # of heads in shared memory
KEYS, QUERIES = 128, 64  # of a block, and that it takes at a time
STAGES = 2
L2_BYTES = 64 << 20  # of queries, gradients and sums of dq that heads of keys together may walk
MIN_TOGETHER = 4  # fewer leave multiprocessors idle at the end of each group
THREADS = 384
ROW_THREADS = 256  # of the kernels before and after
BARRIER_BYTES = 16 * (1 + 2 * STAGES)
SHARED_BYTES = (
    1024  # lost to alignment
    + 2 * KEYS * WIDTH * 2  # keys and values
    + 2 * STAGES * QUERIES * (WIDTH * 2 + 4)  # queries and output gradients, a number for each
    + 2 * KEYS * QUERIES * 2  # gradients of scores
    + BARRIER_BYTES
)


@dataclass(frozen=True)
class BackwardVariant:
    """One kernel of one compilation of attention_backward.cu.

    Attributes:
        kernel: `attention_backward`, or the same followed by `_rows` or `_dq`.
        causal, window: whether queries see no later keys, and only so many.
        fp16: whether all but the sums is fp16 rather than bf16.
    """

    kernel: str
    causal: bool
    window: bool
    fp16: bool

    def module(self) -> Module:
        """attention_backward.cu with these definitions."""
        return cuda_module(
            "attention_backward",
            "attention_backward.cu",
            CAUSAL=self.causal,
            WINDOW=self.window,
            FP16=self.fp16,
            SHARED_BYTES=SHARED_BYTES,
        )

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        dtype = torch.float16 if self.fp16 else torch.bfloat16
        fp32 = torch.float32
        if self.kernel.endswith("_rows"):
            of_out = ("out_batch", "out_head", "out_row", "grad_batch", "grad_head", "grad_row")
            parameters = (
                pointer("out", dtype, align=4),
                pointer("grad", dtype, align=4),
                pointer("lse", fp32),
                pointer("grad_lse", fp32, optional=True),
                pointer("lse_log2", fp32),
                pointer("delta", fp32),
                *map(i32, ("num_heads", "num_queries", "all_rows", "v_dim")),
                *map(i64, of_out),
            )
        elif self.kernel.endswith("_dq"):
            parameters = (
                pointer("parts", fp32, align=16),
                pointer("dq", dtype, align=16),
                *map(i32, ("num_queries", "qk_dim")),
                f32("scale"),
            )
        else:
            sizes = ("num_heads", "heads_per_kv", "all_kv_heads", "num_queries", "num_keys")
            order = ("shift", "window", "together", "qk_dim", "v_dim")
            parameters = (
                *map(tensor_map_of, ("q_map", "k_map", "v_map", "do_map")),
                pointer("lse_log2", fp32, align=16),
                pointer("delta", fp32, align=16),
                pointer("parts", fp32, align=16),
                pointer("dk", dtype, align=16),
                pointer("dv", dtype, align=16),
                *map(i32, (*sizes, *order)),
                f32("scale"),
                f32("scale_log2"),
            )
        return KernelSignature(self.kernel, parameters)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks; see the op of this name. Heads of up to 128 elements.

    The parts of dq are added up in fp32 in no fixed order: its last bit may differ between runs.
    """
    refuse_extras(mask, softcap)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse = lse.contiguous()
    if q.numel() == 0 or k.numel() == 0:
        dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks
    grad, q, k, v, out = map(readable, (grad, q, k, v, out))
    kinds = causal != "none", window is not None, q.dtype == torch.float16
    lse_log2, delta = _rows(kinds, grad, out, lse, grad_lse)
    parts = lse_log2.new_zeros(*lse_log2.shape, WIDTH)
    num_heads, num_queries, qk_dim = q.shape[1:]
    kv_heads, num_keys, v_dim = v.shape[1:]
    all_kv_heads = q.shape[0] * kv_heads
    shift = num_keys - num_queries if causal == "bottom_right" else 0
    together = _together(num_heads // kv_heads * num_queries, all_kv_heads)
    _launch(
        BackwardVariant("attention_backward", *kinds),
        (all_kv_heads * -(-num_keys // KEYS), THREADS, SHARED_BYTES),
        *(heads_map(q, QUERIES), heads_map(k, KEYS), heads_map(v, KEYS), heads_map(grad, QUERIES)),
        *(lse_log2, delta, parts, dk, dv),
        *(num_heads, num_heads // kv_heads, all_kv_heads, num_queries, num_keys),
        *(shift, window or 0, together, qk_dim, v_dim),
        *(scale, scale * math.log2(math.e)),
    )
    grid = parts.numel() // (QUERIES * WIDTH)
    variant = BackwardVariant("attention_backward_dq", *kinds)
    _launch(variant, (grid, ROW_THREADS, 0), parts, dq, num_queries, qk_dim, scale)
    return dq, dk, dv, q.new_empty(0) if sinks is None else _of_sinks(sinks, lse, delta)


def _rows(
    kinds: tuple[bool, bool, bool], grad: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[B, H, S up to whole blocks], fp32: log-sum-exp times log2(e), and what `grad` takes."""
    batch, num_heads, num_queries, v_dim = out.shape
    padded = -(-num_queries // QUERIES) * QUERIES
    lse_log2, delta = (lse.new_empty(batch, num_heads, padded) for _ in range(2))
    _launch(
        BackwardVariant("attention_backward_rows", *kinds),
        (-(-lse_log2.numel() // (ROW_THREADS // 32)), ROW_THREADS, 0),
        *(out, grad, lse, None if grad_lse is None else grad_lse.contiguous(), lse_log2, delta),
        *(num_heads, num_queries, lse_log2.numel(), v_dim),
        *(*out.stride()[:3], *grad.stride()[:3]),
    )
    return lse_log2, delta


def _together(rows: int, all_kv_heads: int) -> int:
    """Heads of keys, each walking `rows` queries, that advance side by side: a power of two.

    H200, 32 and 8 heads: 2x4096 tokens take 1443 us with 4 of them, 1710 with 2 and 1648 with 6;
    4x1024 take 282 with 16 and 353 with 4.
    """
    fit = max(L2_BYTES // (rows * WIDTH * (2 + 2 + 4)), MIN_TOGETHER)
    return min(1 << (fit.bit_length() - 1), all_kv_heads)


def _of_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[H]: what the sinks took from every query."""
    share = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -math.inf, 0.0)
    return -(share * delta[..., : lse.shape[-1]]).sum((0, 2)).to(sinks.dtype)


def _launch(variant: BackwardVariant, shape: tuple[int, int, int], *args: object) -> None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    device = tensors[0].device
    load_kernel(variant, arch_name(device), device.type).launch(*shape, *args)
