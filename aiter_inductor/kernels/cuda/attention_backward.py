"""Gradients of flash attention on Hopper; the Python side of attention_backward.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aiter_inductor.core.heads import heads_first
from aiter_inductor.kernels.cuda.attention import (
    Hiding,
    Packed,
    blocks_of,
    heads_map,
    readable,
    refuse_mask,
    starts_of,
)
from aiter_inductor.kernels.cuda.attention_backward_config import (
    KEYS,
    PIECE,
    QUERIES,
    THREADS,
    WIDEST,
    BackwardTiles,
    BackwardVariant,
    Kind,
    RowsVariant,
)
from aiter_inductor.kernels.cuda.attention_backward_wide import WideBackward
from aiter_inductor.kernels.cuda.attention_backward_wide_config import WideTiles
from aiter_inductor.kernels.cuda.attention_config import padded
from aiter_inductor.kernels.cuda.loading import Variant, arch_name, load_kernel

L2_BYTES = 64 << 20  # of queries, gradients and sums of dq that heads of keys together may walk
MIN_TOGETHER = 128  # blocks of keys; fewer leave multiprocessors idle at the end of a group
ROW_THREADS = 256  # of the kernels before and after


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
    config: WideTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks; see the op of this name.

    The parts of dq of heads of up to 128 elements are added up in fp32 in no fixed order: its last
    bit may differ between runs, unless `torch.use_deterministic_algorithms` asks for the kernels
    of wide heads.
    """
    refuse_mask(mask)
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    inputs = (grad, q, k, v, out, lse.contiguous(), grad_lse)
    hiding = Hiding(causal, window, first_keys)
    sums = _fill(gradients, inputs, scale, hiding, softcap, None, config)
    return *gradients, _of_sinks(sinks, q, sums)


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
    config: WideTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients within packed sequences; see the op of this name."""
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grad, of_q, k, v, out = map(heads_first, (grad, q, k, v, out))
    inputs = (grad, of_q, k, v, out, lse.contiguous().unsqueeze(0), grad_lse)
    packed = Packed(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    dq, dk, dv = map(heads_first, gradients)
    hiding = Hiding(causal, window)
    sums = _fill((dq, dk, dv), inputs, scale, hiding, softcap, packed, config)
    return *gradients, _of_sinks(sinks, q, sums)


def _fill(
    gradients: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    scale: float,
    hiding: Hiding,
    softcap: float | None,
    packed: Packed | None,
    config: WideTiles | None,
) -> tuple[Tensor, Tensor] | None:
    """Fill those of q, k and v, heads first; what `_rows` gives, or None where there is nothing."""
    dq, dk, _ = gradients
    *heads, lse, grad_lse = inputs
    if dq.numel() == 0 or dk.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return None
    grad, q, k, v, out = map(readable, heads)
    kind = Kind.of(hiding, packed=packed is not None, fp16=q.dtype == torch.float16)
    widths = padded(q.shape[-1]), padded(v.shape[-1])
    blocks = blocks_of(q.shape[2], QUERIES, packed)
    summed = widths[0] if config is None and _adds_up(widths, softcap) else 0
    lse_log2, delta, parts = _rows(kind, grad, out, lse, grad_lse, summed, blocks, packed)
    numbers = lse_log2, delta
    if parts is None:
        tiles = config or WideTiles.default(*widths)
        given = (kind, grad, q, k, v, *numbers, scale, hiding, softcap, packed, tiles)
        WideBackward(*given).fill(*gradients)
    else:
        _add_up(gradients, (grad, q, k, v, *numbers, parts), kind, scale, hiding, packed)
    return numbers


def _adds_up(widths: tuple[int, int], softcap: float | None) -> bool:
    """Whether the kernel that adds up dq in no fixed order is to be taken, in one walk, not two."""
    repeats = torch.are_deterministic_algorithms_enabled()
    return max(widths) <= WIDEST and softcap is None and not repeats


def _add_up(
    gradients: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, ...],
    kind: Kind,
    scale: float,
    hiding: Hiding,
    packed: Packed | None,
) -> None:
    """Fill the gradients of q, k and v in one walk over all pairs."""
    dq, dk, dv = gradients
    grad, q, k, v, lse_log2, delta, parts = inputs
    (batch, num_heads, num_queries, qk_dim), (kv_heads, num_keys, v_dim) = q.shape, v.shape[1:]
    sequences = packed.num_sequences if packed else 0
    blocks = lse_log2.shape[-1] // QUERIES
    key_blocks, all_kv_heads = blocks_of(num_keys, KEYS, packed), batch * kv_heads
    from_end = hiding.causal == "bottom_right"
    walked = num_heads // kv_heads * num_queries * (4 * padded(qk_dim) + 2 * (qk_dim + v_dim))
    tiles = BackwardTiles.default(padded(qk_dim), padded(v_dim))
    _launch(
        BackwardVariant(tiles, kind),
        (all_kv_heads * key_blocks, THREADS, tiles.shared_bytes),
        *(heads_map(q, QUERIES), heads_map(k, KEYS), heads_map(v, KEYS)),
        *(heads_map(grad, QUERIES), lse_log2, delta, parts, dk, dv, *starts_of(packed)),
        hiding.named_keys(),
        *(num_heads, num_heads // kv_heads, all_kv_heads, num_queries, num_keys),
        *(num_keys - num_queries if from_end else 0, hiding.window or 0, key_blocks, blocks),
        *(_together(walked, key_blocks, all_kv_heads), sequences, int(from_end), qk_dim, v_dim),
        *(scale, scale * math.log2(math.e), *dk.stride()[:3], *dv.stride()[:3]),
    )
    grid = batch * num_heads * blocks, padded(qk_dim) // (2 * PIECE)
    _launch(
        RowsVariant("dq", kind),
        (grid, ROW_THREADS, 0),
        *(parts, starts_of(packed)[0], dq, num_heads, num_queries, blocks, sequences),
        *(qk_dim, padded(qk_dim), scale, *dq.stride()[:3]),
    )


def _rows(
    kind: Kind,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    summed: int,
    blocks: int,
    packed: Packed | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B, H, blocks * QUERIES], fp32: log-sum-exp times log2(e), and what `grad` takes.

    Last, `summed` zeros for each, or None if that is 0.
    """
    batch, num_heads, num_queries, v_dim = out.shape
    lse_log2, delta = (lse.new_empty(batch, num_heads, blocks * QUERIES) for _ in range(2))
    parts = lse_log2.new_empty(lse_log2.numel() * summed) if summed else None
    _launch(
        RowsVariant("rows", kind),
        (-(-lse_log2.numel() // (ROW_THREADS // 16)), ROW_THREADS, 0),
        *(out, grad, lse, None if grad_lse is None else grad_lse.contiguous()),
        *(starts_of(packed)[0], lse_log2, delta, parts, num_heads, num_queries, blocks),
        *(packed.num_sequences if packed else 0, lse_log2.numel(), v_dim, summed),
        *(*out.stride()[:3], *grad.stride()[:3]),
    )
    return lse_log2, delta, parts


def _together(size_bytes: int, key_blocks: int, all_kv_heads: int) -> int:
    """Heads of keys, each walking so many bytes, that advance side by side: a power of two.

    As many as the L2 holds, or as fill the multiprocessors. H100: 2x4096 tokens of 32 and 8 heads
    take 1456 us with 4 of them and 1722 with 1, 1x16384 take 10479 and 10237; an H200 takes 282 us
    for 4x1024 with 16 and 353 with 4.
    """
    fit = max(L2_BYTES // size_bytes, MIN_TOGETHER // key_blocks, 1)
    return min(1 << (fit.bit_length() - 1), all_kv_heads)


def _of_sinks(sinks: Tensor | None, q: Tensor, sums: tuple[Tensor, Tensor] | None) -> Tensor:
    """[H]: what the sinks took from every query; an infinite log-sum-exp leaves them nothing."""
    if sinks is None:
        return q.new_empty(0)
    if sums is None:
        return torch.zeros_like(sinks)
    lse_log2, delta = sums
    share = torch.exp2(sinks.float()[:, None] * math.log2(math.e) - lse_log2)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)


def _launch(variant: Variant, shape: tuple[object, int, int], *args: object) -> None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    device = tensors[0].device
    load_kernel(variant, arch_name(device), device.type).launch(*shape, *args)
