"""New keys and values written into a cache of pages, in vLLM's and in AITER's layout.

Alone, or with the rotary embedding of q and k before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import FP8_DTYPES, QUANT_DTYPES, accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.kv_cache_problem import (
    KvCacheProblem,
    kv_cache_unsupported,
    pack_of,
    page_size_of,
)
from aiter_inductor.lowerings.providers import add_hip
from aiter_inductor.lowerings.quant import cast_to
from aiter_inductor.lowerings.rope import rope_qk
from aiter_inductor.lowerings.rope_kv_problem import (
    RopeKvCacheProblem,
    rope_kv_cache_unsupported,
)


@op(problem=KvCacheProblem.of, mutates=("key_cache", "value_cache"))
def kv_cache_write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    layout: str = "paged",
) -> None:
    """Store the rows of each token at its slot.

    Slot s is place `s % page_size` of page `s // page_size`. A contiguous cache [batch, max_tokens,
    num_kv_heads, head_dim] is one whose pages are sequences. A cache of latent rows, [num_pages,
    page_size, 1, R + rope], is written by one call too: `latent` as key into `cache[..., :R]`,
    `k_rope` as value into `cache[..., R:]`.

    Args:
        key: [num_tokens, num_kv_heads, head_dim], any float dtype.
        value: [num_tokens, num_kv_heads, v_head_dim], dtype of `key`.
        key_cache: of the layout below; any float dtype, or fp8 where scales are given.
        value_cache: the same for values.
        slots: [num_tokens], int32 or int64. A token whose slot is outside the cache, such as the
            -1 of padding, is not stored; of two tokens with one slot either is.
        key_scale: [] or [1], fp32: `key ≈ stored * key_scale`; None stores `key` itself.
        value_scale: the same for values.
        layout: `paged` is vLLM's: both [num_pages, page_size, num_kv_heads, head_dim]. `packed` is
            AITER's: keys [num_pages, num_kv_heads, head_dim / x, page_size, x], values
            [num_pages, num_kv_heads, page_size / x, v_head_dim, x] with x elements in 16 bytes.
            `transposed` has the same keys, and values [num_pages, num_kv_heads, v_head_dim,
            page_size], as AITER's `paged_attention_rocm` reads them.
    """
    if key.shape[0] == 0:
        return
    page_size = page_size_of(key_cache, layout)
    num_slots = key_cache.shape[0] * page_size
    stored = (slots >= 0) & (slots < num_slots)
    # Without sizes that depend on values: a token that is not stored repeats the first that is.
    first = stored.to(torch.int32).argmax()
    source = torch.where(stored, torch.arange(key.shape[0], device=key.device), first)
    slot = torch.where(stored.any(), slots[source].long(), 0)
    page, offset = slot // page_size, slot % page_size
    for x, scale, cache, is_key in (
        (key, key_scale, key_cache, True),
        (value, value_scale, value_cache, False),
    ):
        rows = _bytes(_as_stored(x[source], scale, cache.dtype))
        places = _bytes(cache)
        index: tuple[Tensor, ...] = (page, offset)
        if layout != "paged" and is_key:
            rows = rows.unflatten(-1, (-1, pack_of(cache)))
            places = places.permute(0, 3, 1, 2, 4)
        elif layout == "packed":
            pack = pack_of(cache)
            places = places.permute(0, 2, 4, 1, 3)
            index = (page, offset // pack, offset % pack)
        elif layout == "transposed":
            places = places.permute(0, 3, 1, 2)
        places.index_put_(index, torch.where(stored.any(), rows, places[index]))


def _as_stored(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return x.to(dtype)
    y = x.to(accumulate_dtype(x.dtype)) / scale
    return cast_to(y, dtype) if dtype in QUANT_DTYPES else y.to(dtype)


def _bytes(x: Tensor) -> Tensor:
    """fp8 as bytes: few ATen kernels move fp8."""
    return x.view(torch.uint8) if x.dtype in FP8_DTYPES else x


add_hip(kv_cache_write, "kv_cache", refuse=kv_cache_unsupported)


@op(problem=RopeKvCacheProblem.of_rope, mutates=("key_cache", "value_cache"))
def rope_kv_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    layout: str = "paged",
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
) -> Tensor:
    """Rotate `q` and `k`, rounding to their dtype, and store k and v as `kv_cache_write` does.

    Args:
        q: [num_tokens, num_heads, head_dim], any float dtype.
        k: [num_tokens, num_kv_heads, head_dim], dtype of `q`.
        v: [num_tokens, num_kv_heads, head_dim], dtype of `q`.
        cos: [num_tokens, rotary_dim or half of it], or [num_positions, ...] with `positions`.
        sin: like `cos`.
        positions: [num_tokens], int64: the row of cos and sin of each token; None is one a token.
        key_cache, value_cache, slots, key_scale, value_scale, layout: as in `kv_cache_write`.
        interleaved_in, interleaved_out, rotary_dim: as in `rope`.

    Returns:
        The rotated q, [num_tokens, num_heads, head_dim], contiguous.
    """
    rotated: tuple[Tensor, Tensor]
    cos, sin = ((x if positions is None else x[positions]).unsqueeze(1) for x in (cos, sin))
    rotated = rope_qk.reference(
        q,
        k,
        cos,
        sin,
        interleaved_in=interleaved_in,
        interleaved_out=interleaved_out,
        rotary_dim=rotary_dim,
        out_dtype=q.dtype,
    )
    kv_cache_write.reference(
        rotated[1], v, key_cache, value_cache, slots, key_scale, value_scale, layout=layout
    )
    return rotated[0].contiguous()


add_hip(rope_kv_cache_write, "rope_kv", refuse=rope_kv_cache_unsupported)
