"""Attention over pages with the tokens of a sequence split among programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.launch import launchable
from aiter_inductor.kernels.triton.paged_attention_kernel import (
    paged_reduce_kernel,
    paged_split_kernel,
)

MAX_SPLITS, OPEN_SPLITS = 64, 16
PACK_BYTES = 16
WANTED_PROGRAMS = 1024  # an MI355X has 256 compute units, an MI300X 304, an H200 132
_TILE_BYTES = 16384


@dataclass(frozen=True)
class PagedConfig:
    """What one program handles.

    Attributes:
        block_m: query heads, at least 16 for the matrix instructions.
        block_n: tokens at a time.
        part: tokens of a split, more where a sequence is longer than `splits` of these.
        splits: parts that run side by side; as many as the longest sequence may need.
        num_warps: warps of 32 lanes; a chip with wider ones launches half as many.
        num_stages: tiles under way at once; one on AMD.
    """

    block_m: int
    block_n: int
    part: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def default(
        cls,
        blocks: int | torch.SymInt,
        group: int,
        row_bytes: int,
        capacity: int | torch.SymInt,
        *,
        packed: bool = False,
        fp8: bool = False,
    ) -> PagedConfig:
        """Tiles of 16 KiB, and parts until every compute unit has some.

        On an H100, 64 sequences of 1000 to 8000 tokens, 32 and 8 heads of 128 in pages of 16: four
        warps are within 1 % of the best for bf16 in vLLM's layout; two need 0.57 of four's time in
        AITER's, and 0.80 in fp8.

        Args:
            blocks: sequences times heads of keys; OPEN_SPLITS splits where it or `capacity` is
                not known.
            group: query heads that share one of these.
            row_bytes: a key of one head.
            capacity: tokens that a table can hold.
            packed: keys and values are in AITER's layout.
            fp8: they are fp8, of which two tiles under way are better than three.
        """
        block_m = min(max(triton.next_power_of_2(group), 16), 64)
        block_n = min(max(triton.next_power_of_2(_TILE_BYTES // row_bytes), 16), 64)
        splits, part = OPEN_SPLITS, 256
        if isinstance(blocks, int) and isinstance(capacity, int):
            wanted = triton.cdiv(WANTED_PROGRAMS, max(blocks, 1))
            fair = triton.cdiv(triton.cdiv(max(capacity, 1), wanted), block_n) * block_n
            part = min(max(fair, 2 * block_n), 512)
            splits = min(triton.cdiv(capacity + block_n, part), MAX_SPLITS)
        warps = 2 if torch.version.cuda and (packed or fp8) else 4
        return cls(block_m, block_n, part, max(splits, 1), warps, 2 if fp8 else 3)

    def launch(self) -> dict[str, int]:
        """Keywords for the launch."""
        if torch.version.hip:
            return {"num_warps": max(self.num_warps // 2, 1), "num_stages": 1}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    layout: str = "paged",
    window: int | None = None,
    softcap: float = 0.0,
    config: PagedConfig | None = None,
) -> Tensor:
    """Attend to the tokens of pages; see the op of this name."""
    keys, values = _Pages.of(key_cache, layout, True), _Pages.of(value_cache, layout, False)
    num_seqs, num_heads, head_dim = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()
    block_tables = block_tables if block_tables.stride(-1) == 1 else block_tables.contiguous()
    lengths, group = seq_lens.contiguous(), num_heads // keys.num_heads
    if config is None:
        capacity = block_tables.shape[1] * keys.page_size
        capacity = capacity if window is None else _least(capacity, window)
        row_bytes, fp8 = head_dim * key_cache.element_size(), key_cache.element_size() == 1
        blocks, packed = num_seqs * keys.num_heads, layout != "paged"
        config = PagedConfig.default(blocks, group, row_bytes, capacity, packed=packed, fp8=fp8)
    key_scale, value_scale, per_token = _scales(key_scale, value_scale)
    splits, num_rows = config.splits, num_seqs * num_heads
    out = q.new_empty(num_seqs, num_heads, values.head_dim)
    if isinstance(num_rows, int) and num_rows == 0:
        return out
    parts = splits if splits > 1 else 0
    partial = q.new_empty(parts, num_rows, values.head_dim, dtype=torch.float32)
    lse = q.new_empty(parts, num_rows, dtype=torch.float32)
    shared = {"NUM_HEADS": num_heads, "WINDOW": window or 0, "V": values.head_dim}
    shared |= {"PART": config.part, "BLOCK_N": config.block_n}
    shared["BLOCK_V"] = max(triton.next_power_of_2(values.head_dim), 16)
    grid = (keys.num_heads * triton.cdiv(group, config.block_m), splits, num_seqs)
    launchable(paged_split_kernel)[grid](
        q,
        key_cache,
        value_cache,
        block_tables,
        lengths,
        key_scale,
        value_scale,
        sinks,
        out,
        partial,
        lse,
        scale,
        softcap,
        num_seqs,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        *keys.strides,
        *values.strides,
        *(keys.num_heads * keys.page_size, keys.page_size),
        GROUP=group,
        D=head_dim,
        PAGE=keys.page_size,
        PACK=keys.pack,
        SOFTCAP=softcap != 0.0,
        PER_TOKEN=per_token,
        ONE_SPLIT=splits == 1,
        BLOCK_M=config.block_m,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        **shared,
        **config.launch(),
    )
    if parts:
        launchable(paged_reduce_kernel)[(num_rows,)](
            partial,
            lse,
            lengths,
            sinks,
            out,
            num_rows,
            splits,
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            num_warps=2,
            **shared,
        )
    return out


def _scales(
    key_scale: Tensor | None, value_scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Both, and whether they are of each token and head."""
    if key_scale is None or value_scale is None or key_scale.numel() == 1:
        return key_scale, value_scale, False
    return key_scale.contiguous(), value_scale.contiguous(), True


@dataclass(frozen=True)
class _Pages:
    """How a cache is addressed.

    Attributes:
        num_heads: heads a token has.
        page_size: tokens of a page.
        head_dim: elements of a head.
        pack: elements side by side in the `packed` layout; 0 in the other.
        strides: of page, token, head and chunk. A chunk of packed keys is the next `pack` elements
            and one of packed or transposed values the next `pack` tokens, whose `token` is an
            element.
    """

    num_heads: int
    page_size: int
    head_dim: int
    pack: int
    strides: tuple[int, int, int, int]

    @classmethod
    def of(cls, cache: Tensor, layout: str, is_key: bool) -> _Pages:
        stride = cache.stride()
        if layout == "paged":
            _, size, heads, head_dim = cache.shape
            return cls(heads, size, head_dim, 0, (stride[0], stride[1], stride[2], 0))
        if layout == "transposed" and not is_key:
            _, heads, head_dim, size = cache.shape
            pack = PACK_BYTES // cache.element_size()
            return cls(heads, size, head_dim, pack, (stride[0], stride[2], stride[1], pack))
        pack = cache.shape[4]
        strides = stride[0], stride[3], stride[1], stride[2]
        if is_key:
            _, heads, chunks, size, _ = cache.shape
            return cls(heads, size, chunks * pack, pack, strides)
        _, heads, chunks, head_dim, _ = cache.shape
        return cls(heads, chunks * pack, head_dim, pack, strides)


def _least(capacity: int | torch.SymInt, window: int) -> int | torch.SymInt:
    return min(capacity, window) if isinstance(capacity, int) else window
