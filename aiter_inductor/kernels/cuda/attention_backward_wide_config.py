"""How the backward kernels for wide heads divide their work, and the variants a problem needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import (
    KernelSignature,
    f32,
    i32,
    i64,
    pointer,
    tensor_map_of,
)
from aiter_inductor.kernels.cuda.attention_backward_config import QUERIES, Kind
from aiter_inductor.kernels.cuda.attention_config import ALIGNMENT_BYTES, COLUMN
from aiter_inductor.kernels.cuda.loading import cuda_module

KEYS = 64  # of a block that makes the gradients of keys and values
ROWS = 128  # queries of a block that makes theirs
COLUMN_BYTES = 64 * 128
BLOCK_BYTES = 232448  # of shared memory that a block may ask for
MAX_TILE_REGISTERS = 224
KEYS_STAGES = ((4, 4), (3, 3), (3, 2))
QUERIES_STAGES = ((3, 3), (2, 2), (2, 1))
BLOCKS_N = (128, 112, 96, 80, 64)
MAPS = ("q_map", "k_map", "v_map", "do_map")
HEADS = ("num_heads", "heads_per_kv")
LENGTHS = ("num_queries", "num_keys", "shift", "window")


@dataclass(frozen=True)
class KeysTiles:
    """Of a block of attention_backward_keys.cu.

    Attributes:
        k_kept, v_kept: columns of 64 elements of keys and values that stay in registers.
        q_stages, do_stages: blocks of queries, and of output gradients, in flight.
    """

    k_kept: int
    v_kept: int
    q_stages: int
    do_stages: int

    def shared_bytes(self, qk_dim: int, v_dim: int, *, fp16: bool) -> int:
        """As attention_backward_keys.cu lays it out; widths are padded."""
        held = (qk_dim + v_dim) // COLUMN - self.k_kept - self.v_kept
        queries = self.q_stages * (2 * qk_dim + 4) + self.do_stages * (2 * v_dim + 4)
        handed = 2 * KEYS * QUERIES * (4 if fp16 else 2)
        barriers = 16 * (1 + self.q_stages + self.do_stages)
        return ALIGNMENT_BYTES + held * COLUMN_BYTES + QUERIES * queries + handed + barriers


@dataclass(frozen=True)
class QueriesTiles:
    """Of a block of attention_backward_queries.cu.

    Attributes:
        block_n: keys of a tile, a multiple of 16.
        k_stages, v_stages: tiles of keys, and of values, in flight.
    """

    block_n: int
    k_stages: int
    v_stages: int

    def shared_bytes(self, qk_dim: int, v_dim: int) -> int:
        """As attention_backward_queries.cu lays it out; widths are padded."""
        rows = ROWS * (qk_dim + v_dim) * 2
        tiles = self.block_n * 2 * (self.k_stages * qk_dim + self.v_stages * v_dim)
        return ALIGNMENT_BYTES + rows + tiles + 16 * (1 + self.k_stages + self.v_stages)


@dataclass(frozen=True)
class WideTiles:
    """Of both kernels."""

    keys: KeysTiles
    queries: QueriesTiles

    @classmethod
    def default(cls, qk_dim: int, v_dim: int) -> WideTiles:
        """The largest that shared memory and registers hold; widths are padded."""
        return cls(_keys_tiles(qk_dim, v_dim), _queries_tiles(qk_dim, v_dim))


def _keys_tiles(qk_dim: int, v_dim: int) -> KeysTiles:
    """A sum of `width` columns leaves the registers 10 - width / 32 columns of keys."""
    k_kept = min(qk_dim // COLUMN, 10 - v_dim // 32)
    v_kept = min(v_dim // COLUMN, 10 - qk_dim // 32)
    for stages in KEYS_STAGES:
        found = KeysTiles(k_kept, v_kept, *stages)
        if found.shared_bytes(qk_dim, v_dim, fp16=True) <= BLOCK_BYTES:
            return found
    raise ValueError(f"no blocks of heads of {qk_dim} and {v_dim} fit {BLOCK_BYTES} bytes")


def _queries_tiles(qk_dim: int, v_dim: int) -> QueriesTiles:
    """The widest tile of narrow heads; of wide ones, whose sums leave less room, as many as fit.

    On an H100, 128 heads of 192 and 128, 1x4096 tokens, take 1651 us with 3 tiles of 64 keys and
    1749 with 2 of 96; 32 and 8 heads of 128, 2x4096, take 601 with 2 of 128 and 630 with 4 of 64.
    """
    for stages in QUERIES_STAGES if qk_dim > 2 * COLUMN else QUERIES_STAGES[1:]:
        for block_n in BLOCKS_N if qk_dim <= 2 * COLUMN else BLOCKS_N[-1:]:
            found = QueriesTiles(block_n, *stages)
            fits = found.shared_bytes(qk_dim, v_dim) <= BLOCK_BYTES
            # Beyond this many registers of scores, gradients and sums, ptxas serialises.
            if fits and block_n + block_n // 4 + qk_dim // 2 <= MAX_TILE_REGISTERS:
                return found
    raise ValueError(f"no tile of heads of {qk_dim} and {v_dim} fits {BLOCK_BYTES} bytes")


@dataclass(frozen=True)
class KeysVariant:
    """One compilation of attention_backward_keys.cu.

    Attributes:
        tiles: how a block divides its work.
        qk_dim, v_dim: elements a head, padded.
        kind: what all kernels of the problem have in common.
        softcap: whether scores are capped.
    """

    tiles: KeysTiles
    qk_dim: int
    v_dim: int
    kind: Kind
    softcap: bool

    @property
    def shared_bytes(self) -> int:
        """What a block asks for."""
        return self.tiles.shared_bytes(self.qk_dim, self.v_dim, fp16=self.kind.fp16)

    def module(self) -> Module:
        """attention_backward_keys.cu with these definitions."""
        return cuda_module(
            "attention_backward_keys",
            "attention_backward_keys.cu",
            QK_DIM=self.qk_dim,
            V_DIM=self.v_dim,
            K_KEPT=self.tiles.k_kept,
            V_KEPT=self.tiles.v_kept,
            Q_STAGES=self.tiles.q_stages,
            DO_STAGES=self.tiles.do_stages,
            SOFTCAP=self.softcap,
            **self.kind.definitions,
            SHARED_BYTES=self.shared_bytes,
        )

    def signature(self) -> KernelSignature:
        """attention_backward_keys's parameters."""
        order = ("key_blocks", "query_blocks", "together", "num_sequences", "from_end")
        strides = ("dk_batch", "dk_head", "dk_row", "dv_batch", "dv_head", "dv_row")
        return KernelSignature(
            "attention_backward_keys",
            (
                *map(tensor_map_of, MAPS),
                pointer("lse_log2", torch.float32, align=16),
                pointer("delta", torch.float32, align=16),
                pointer("dk", self.kind.dtype, align=16),
                pointer("dv", self.kind.dtype, align=16),
                pointer("q_starts", torch.int32, optional=True),
                pointer("k_starts", torch.int32, optional=True),
                pointer("first_keys", torch.int32, optional=True),
                *map(i32, (*HEADS, "all_kv_heads", *LENGTHS, *order, "qk_dim", "v_dim")),
                *map(f32, ("scale", "scale_log2", "cap_scale")),
                *map(i64, strides),
            ),
        )


@dataclass(frozen=True)
class QueriesVariant:
    """One compilation of attention_backward_queries.cu; attributes are those of KeysVariant."""

    tiles: QueriesTiles
    qk_dim: int
    v_dim: int
    kind: Kind
    softcap: bool

    @property
    def shared_bytes(self) -> int:
        """What a block asks for."""
        return self.tiles.shared_bytes(self.qk_dim, self.v_dim)

    def module(self) -> Module:
        """attention_backward_queries.cu with these definitions."""
        return cuda_module(
            "attention_backward_queries",
            "attention_backward_queries.cu",
            QK_DIM=self.qk_dim,
            V_DIM=self.v_dim,
            BLOCK_N=self.tiles.block_n,
            K_STAGES=self.tiles.k_stages,
            V_STAGES=self.tiles.v_stages,
            SOFTCAP=self.softcap,
            **self.kind.definitions,
            SHARED_BYTES=self.shared_bytes,
        )

    def signature(self) -> KernelSignature:
        """attention_backward_queries's parameters."""
        order = ("row_blocks", "query_blocks", "heads_together", "num_sequences", "from_end")
        return KernelSignature(
            "attention_backward_queries",
            (
                *map(tensor_map_of, MAPS),
                pointer("lse_log2", torch.float32),
                pointer("delta", torch.float32),
                pointer("dq", self.kind.dtype, align=16),
                pointer("q_starts", torch.int32, optional=True),
                pointer("k_starts", torch.int32, optional=True),
                pointer("first_keys", torch.int32, optional=True),
                *map(i32, (*HEADS, "all_heads", *LENGTHS, *order, "qk_dim")),
                *map(f32, ("scale", "scale_log2", "cap_scale")),
                *map(i64, ("batch_stride", "head_stride", "row_stride")),
            ),
        )
