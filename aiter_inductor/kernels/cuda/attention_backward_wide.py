"""Gradients of flash attention of wide heads on Hopper.

The Python side of attention_backward_keys.cu and attention_backward_queries.cu, each of which owns
what it writes: nothing is added atomically, and results repeat to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aiter_inductor.kernels.cuda.attention import (
    Hiding,
    Packed,
    blocks_of,
    heads_map,
    scales_of,
    starts_of,
    together_of,
)
from aiter_inductor.kernels.cuda.attention_backward_config import QUERIES, THREADS, Kind
from aiter_inductor.kernels.cuda.attention_backward_wide_config import (
    KEYS,
    ROWS,
    KeysVariant,
    QueriesVariant,
    WideTiles,
)
from aiter_inductor.kernels.cuda.attention_config import padded
from aiter_inductor.kernels.cuda.loading import arch_name, load_kernel

L2_BYTES = 32 << 20  # of queries and gradients that heads of keys together may walk


@dataclass(frozen=True)
class WideBackward:
    """One problem: heads first, as TMA can read them; numbers of queries as `_rows` pads them."""

    kind: Kind
    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lse_log2: Tensor
    delta: Tensor
    scale: float
    hiding: Hiding
    softcap: float | None
    packed: Packed | None
    tiles: WideTiles

    def fill(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Fill the gradients of q, k and v."""
        self._keys(dk, dv)
        self._queries(dq)

    @property
    def _widths(self) -> tuple[int, int]:
        return padded(self.q.shape[-1]), padded(self.v.shape[-1])

    @property
    def _from_end(self) -> bool:
        return self.hiding.causal == "bottom_right"

    def _lengths(self) -> tuple[int, int, int, int]:
        num_queries, num_keys = self.q.shape[2], self.k.shape[2]
        shift = num_keys - num_queries if self._from_end else 0
        return num_queries, num_keys, shift, self.hiding.window or 0

    def _last(self) -> tuple[int, int]:
        """How many sequences are packed, and whether their last query stands at the last key."""
        return self.packed.num_sequences if self.packed else 0, int(self._from_end)

    def _keys(self, dk: Tensor, dv: Tensor) -> None:
        variant = KeysVariant(self.tiles.keys, *self._widths, self.kind, self.softcap is not None)
        num_heads, num_queries, qk_dim = self.q.shape[1:]
        batch, kv_heads, num_keys, v_dim = self.v.shape
        key_blocks = blocks_of(num_keys, KEYS, self.packed)
        walked = num_heads // kv_heads * num_queries * 2 * sum(self._widths)
        together = max(L2_BYTES // walked, 1)
        kernel = load_kernel(variant, arch_name(self.q.device), self.q.device.type)
        kernel.launch(
            batch * kv_heads * key_blocks,
            THREADS,
            variant.shared_bytes,
            *(heads_map(self.q, QUERIES), heads_map(self.k, KEYS)),
            *(heads_map(self.v, KEYS), heads_map(self.grad, QUERIES)),
            *(self.lse_log2, self.delta, dk, dv, *starts_of(self.packed), self.hiding.named_keys()),
            *(num_heads, num_heads // kv_heads, batch * kv_heads, *self._lengths(), key_blocks),
            *(self.lse_log2.shape[-1] // QUERIES, min(together, batch * kv_heads), *self._last()),
            *(qk_dim, v_dim, *scales_of(self.scale, self.softcap, gradients=True)),
            *(*dk.stride()[:3], *dv.stride()[:3]),
        )

    def _queries(self, dq: Tensor) -> None:
        tiles = self.tiles.queries
        variant = QueriesVariant(tiles, *self._widths, self.kind, self.softcap is not None)
        batch, num_heads, num_queries, qk_dim = self.q.shape
        row_blocks = blocks_of(num_queries, ROWS, self.packed)
        kernel = load_kernel(variant, arch_name(self.q.device), self.q.device.type)
        kernel.launch(
            batch * num_heads * row_blocks,
            THREADS,
            variant.shared_bytes,
            *(heads_map(self.q, 64), heads_map(self.k, tiles.block_n)),
            *(heads_map(self.v, tiles.block_n), heads_map(self.grad, 64)),
            *(self.lse_log2, self.delta, dq, *starts_of(self.packed), self.hiding.named_keys()),
            *(num_heads, num_heads // self.k.shape[1], batch * num_heads, *self._lengths()),
            *(row_blocks, self.lse_log2.shape[-1] // QUERIES),
            *(together_of(self.q, self.k, self.v), *self._last(), qk_dim),
            *(*scales_of(self.scale, self.softcap, gradients=True), *dq.stride()[:3]),
        )
