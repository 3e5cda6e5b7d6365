"""Latent attention with the projections absorbed, on Hopper; the Python side of mla.cu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from aiter_inductor.core import jit
from aiter_inductor.core.launch import (
    KernelSignature,
    Parameter,
    f32,
    i32,
    i64,
    pointer,
    tensor_map,
    tensor_map_of,
)
from aiter_inductor.kernels.cuda import mla_clusters
from aiter_inductor.kernels.cuda.loading import arch_name, cuda_module, load_kernel
from aiter_inductor.kernels.cuda.mla_clusters import by_rows, mappable, reduce

RANK, ROPE = 512, 64
_ROWS, _KEYS, _THREADS, _STAGES = 64, 32, 256, 5
_ALIGN_BYTES = 16

_TILE_BYTES = _KEYS * (RANK + ROPE) * 2
_EXCHANGE_BYTES = 2 * _THREADS * 64
_SHARED_BYTES = 1024 + _STAGES * _TILE_BYTES + _EXCHANGE_BYTES + _ROWS * ROPE * 2 + _STAGES * 8

# From so many blocks of 64 rows on, the kernel whose clusters share the keys: on an H100, 128 heads
# and 4096 keys take it 48 us at batch 16 where this one takes 58, and 18 where 17 at batch 1.
CLUSTER_BLOCKS = 32

_MAX_SPLITS = 64
_TILE_US, _START_US, _REDUCE_US, _PARTIAL_BYTES_PER_US = 0.65, 2.5, 2.5, 4e6


@dataclass(frozen=True)
class MlaVariant:
    """`mla_attend`, the kernel of mla.cu."""

    def module(self) -> jit.Module:
        """mla.cu."""
        return cuda_module("mla", "mla.cu", STAGES=_STAGES)

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        return KernelSignature(
            "mla_attend",
            (
                tensor_map_of("latent"),
                tensor_map_of("rotated"),
                *_rows_parameters("q_latent"),
                *_rows_parameters("q_rope"),
                *_rows_parameters("out"),
                pointer("partial", torch.float32),
                pointer("lse", torch.float32),
                f32("scale"),
                i32("rows"),
                i32("kv_len"),
            ),
        )


def _rows_parameters(name: str) -> tuple[Parameter, ...]:
    """A tensor of rows, the stride of sequences and that of rows."""
    start = pointer(name, torch.bfloat16, align=_ALIGN_BYTES)
    return start, i64(f"{name}_sequence"), i64(f"{name}_row")


@lru_cache(maxsize=4096)
def best_splits(blocks: int, num_rows: int, kv_len: int, processors: int) -> int:
    """Parts of the cache that are estimated to finish first.

    A block of 64 rows takes a processor for `_START_US` and `_TILE_US` a tile; parts are written
    and read back by the reduction.

    Args:
        blocks: of rows, over all sequences.
        num_rows: rows over all sequences.
        kv_len: keys of each sequence.
        processors: that hold one block each.
    """
    tiles = math.ceil(kv_len / _KEYS)

    def estimate_us(splits: int) -> float:
        waves = math.ceil(blocks * splits / processors)
        attend = waves * (_START_US + math.ceil(tiles / splits) * _TILE_US)
        partial_bytes = 2 * num_rows * splits * RANK * 4
        return attend + (splits > 1) * (_REDUCE_US + partial_bytes / _PARTIAL_BYTES_PER_US)

    return min(range(1, max(min(tiles, _MAX_SPLITS), 1) + 1), key=estimate_us)


def mla_decode(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    mask: Tensor | None,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """Attention over bf16 latent rows without a mask; see the op of this name."""
    num_heads, nope = q_nope.shape[1], q_nope.shape[-1]
    weight = kv_b_weight.unflatten(0, (num_heads, -1))
    q_latent = torch.einsum("bhsd,hdr->bhsr", q_nope, weight[:, :nope])
    out = attend(q_latent, q_rope, latent, k_rope, scale)
    return torch.einsum("bhsr,hdr->bhsd", out, weight[:, nope:]).contiguous()


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    """Attention of absorbed queries [batch, heads, q_len, 512]: sums of latent rows, same shape.

    Args:
        q_latent: bf16, as all tensors.
        q_rope: [batch, heads, q_len, 64].
        latent: [batch, kv_len, 512].
        k_rope: [batch, kv_len, 64].
        scale: factor on the scores.
        splits: parts of the cache that run side by side; None chooses.
    """
    q_latent, q_rope = _with_rows(q_latent), _with_rows(q_rope)
    latent, k_rope = mappable(latent), mappable(k_rope)
    batch_size, num_heads, q_len, _ = q_latent.shape
    kv_len, rows = latent.shape[1], num_heads * q_len
    out = torch.empty_like(q_latent)
    num_rows = batch_size * rows
    if num_rows == 0 or kv_len == 0:
        return out.zero_()
    row_blocks = math.ceil(rows / _ROWS)
    if scale < 0:
        q_latent, q_rope, scale = -q_latent, -q_rope, -scale
    if splits is None and row_blocks % 2 == 0 and batch_size * row_blocks >= CLUSTER_BLOCKS:
        mla_clusters.attend(q_latent, q_rope, latent, k_rope, out, scale)
        return out
    if splits is None:
        processors = _processors(q_latent.device)
        splits = best_splits(batch_size * row_blocks, num_rows, kv_len, processors)
    parts = splits if splits > 1 else 0
    partial = q_latent.new_empty(parts, num_rows, RANK, dtype=torch.float32)
    lse = q_latent.new_empty(parts, num_rows, dtype=torch.float32)
    slabs = latent.unflatten(-1, (-1, 64)).transpose(1, 2)
    arch, device_type = arch_name(q_latent.device), q_latent.device.type
    load_kernel(MlaVariant(), arch, device_type).launch(
        (row_blocks, splits, batch_size),
        _THREADS,
        _SHARED_BYTES,
        tensor_map(slabs, (1, RANK // 64, _KEYS, 64)),
        tensor_map(k_rope, (1, _KEYS, ROPE)),
        *by_rows(q_latent),
        *by_rows(q_rope),
        *by_rows(out),
        partial,
        lse,
        scale * math.log2(math.e),
        rows,
        kv_len,
    )
    if parts:
        reduce(partial, lse, None, out, splits, 1)
    return out


def _with_rows(x: Tensor) -> Tensor:
    """[batch, heads, q_len, D], copied where heads and tokens are not rows of one stride."""
    batch, head, token, last = x.stride()
    aligned = all(s > 0 and 2 * s % _ALIGN_BYTES == 0 for s in (batch, head, token))
    one_stride = x.shape[2] == 1 or head == x.shape[2] * token
    if last == 1 and aligned and one_stride and x.data_ptr() % _ALIGN_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
