"""How attention.cu divides its work, and the variant of it that a problem needs."""

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
from aiter_inductor.kernels.cuda.loading import cuda_module

SHARED_BYTES = 231424  # of a block's 232448: the tiles were measured with a KiB less
ALIGNMENT_BYTES = 1024  # lost to aligning its start
COLUMN = 64  # elements of a head in one 128-byte row of shared memory
WARPGROUP_ROWS = 64
WIDTHS = (64, 128, 192, 256)  # of heads, after rounding up to whole columns
BLOCKS_N = (128, 112, 96, 80, 64)
# Scores, their 16-bit copies and the output of a thread: beyond this, ptxas spills or serialises.
MAX_TILE_REGISTERS = 196
FULL_BLOCKS = 2048  # queries from which a third warpgroup has enough of them


def padded(width: int) -> int:
    """Elements of a head in whole columns of shared memory; TMA fills the rest with zeros."""
    return -(-width // COLUMN) * COLUMN


@dataclass(frozen=True)
class AttentionConfig:
    """The tiles of one block.

    Attributes:
        block_n: keys of a tile, a multiple of 16.
        warpgroups: 64 queries each; they share the tiles.
        stages: tiles of keys, and of values, in flight.
    """

    block_n: int
    warpgroups: int = 2
    stages: int = 2

    @classmethod
    def default(
        cls, qk_dim: int, v_dim: int, num_queries: int, *, packed: bool = False
    ) -> AttentionConfig:
        """The widest tile that shared memory and registers hold.

        Narrow heads leave registers for a third warpgroup, which pays where queries fill it: 2x4096
        tokens of 64 and 8 heads of 64 take 625 us on an H100, and 644 with two that share tiles of
        192.

        Args:
            qk_dim, v_dim: elements a head, one of `WIDTHS`.
            num_queries: of a sequence.
            packed: whether those are of several sequences, or name the first keys that they see;
                registers of a third warpgroup spill.
        """
        if qk_dim == v_dim == COLUMN and num_queries >= FULL_BLOCKS and not packed:
            return cls(128, warpgroups=3)
        for block_n in BLOCKS_N:
            config = cls(block_n)
            registers = block_n // 2 + block_n // 4 + v_dim // 2
            fits = config.shared_bytes(qk_dim, v_dim, packed=True) <= SHARED_BYTES
            if fits and registers <= MAX_TILE_REGISTERS:
                return config
        raise ValueError(f"no tile of heads of {qk_dim} and {v_dim} fits {SHARED_BYTES} bytes")

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return WARPGROUP_ROWS * self.warpgroups

    @property
    def threads(self) -> int:
        """Of a block: the warpgroups that multiply, and the one that copies."""
        return 128 * (self.warpgroups + 1)

    def shared_bytes(self, qk_dim: int, v_dim: int, *, packed: bool = False) -> int:
        """As attention_work.h lays it out; `qk_dim` and `v_dim` are padded."""
        items = 2 * (32 if packed else 16)
        tiles = self.stages * self.block_n * (qk_dim + v_dim) * 2
        barriers = 16 * self.warpgroups + 2 * 16 * self.stages + 32
        return ALIGNMENT_BYTES + self.rows * qk_dim * 2 + tiles + barriers + items


@dataclass(frozen=True)
class AttentionVariant:
    """One compilation of attention.cu.

    Attributes:
        qk_dim, v_dim: elements a head, padded.
        causal, window: whether queries see no later keys, and only so many.
        softcap: whether scores are capped.
        packed: whether sequences lie one after the other in one batch.
        fp16: whether inputs and output are fp16 rather than bf16.
        first_keys: whether each query names the first key that it sees.
        shared_columns: last columns of queries and keys that come from tensors of their own, the
            keys from one head for all.
    """

    config: AttentionConfig
    qk_dim: int
    v_dim: int
    causal: bool
    window: bool
    softcap: bool
    packed: bool
    fp16: bool
    shared_columns: int = 0
    first_keys: bool = False

    @property
    def shared_bytes(self) -> int:
        """What a block asks for."""
        return self.config.shared_bytes(self.qk_dim, self.v_dim, packed=self.packed)

    def module(self) -> Module:
        """attention.cu with these definitions."""
        return cuda_module(
            "attention",
            "attention.cu",
            QK_DIM=self.qk_dim,
            V_DIM=self.v_dim,
            BLOCK_N=self.config.block_n,
            WARPGROUPS=self.config.warpgroups,
            STAGES=self.config.stages,
            CAUSAL=self.causal,
            WINDOW=self.window,
            FIRST_KEYS=self.first_keys,
            SOFTCAP=self.softcap,
            PACKED=self.packed,
            FP16=self.fp16,
            SHARED_COLUMNS=self.shared_columns,
            SHARED_BYTES=self.shared_bytes,
        )

    def signature(self) -> KernelSignature:
        """attention_kernel's parameters."""
        sizes = ("num_heads", "heads_per_kv", "all_heads", "num_queries", "num_keys")
        order = ("shift", "window", "row_blocks", "heads_together", "num_sequences", "from_end")
        return KernelSignature(
            "attention_kernel",
            (
                *map(tensor_map_of, ("q_map", "k_map", "v_map", "q_rest_map", "k_rest_map")),
                pointer("out", torch.float16 if self.fp16 else torch.bfloat16, align=16),
                pointer("lse", torch.float32, optional=True),
                pointer("sinks", torch.float32, optional=True),
                pointer("counter", torch.int32, optional=True),
                pointer("q_starts", torch.int32, optional=True),
                pointer("k_starts", torch.int32, optional=True),
                pointer("first_keys", torch.int32, optional=True),
                *map(i32, (*sizes, *order, "v_dim")),
                *map(f32, ("scale", "scale_log2", "cap_scale")),
                *map(i64, ("batch_stride", "head_stride", "row_stride")),
            ),
        )
