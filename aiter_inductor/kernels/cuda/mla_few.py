"""Latent attention over so few keys that a block has one tile; the Python side of mla_few.cu."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
from aiter_inductor.kernels.cuda.loading import arch_name, cuda_module, load_kernel
from aiter_inductor.kernels.cuda.mla_plan import KEYS, ROWS, FewPlan

_RANK, _SLABS, _SLAB_BYTES = 512, 8, ROWS * 128
_WARPGROUP = 128
_ATTEND_THREADS, _REDUCE_THREADS = 3 * _WARPGROUP, 2 * _WARPGROUP
_QUAD_COLUMNS = 8  # in which a thread of a warpgroup holds four sums


@dataclass(frozen=True)
class FewVariant:
    """`mla_few` for clusters of `blocks` blocks of 64 rows times `key_blocks` tiles of keys."""

    blocks: int
    key_blocks: int

    @property
    def shared_bytes(self) -> int:
        """Queries, a tile, columns and weights of other tiles, two numbers a row, barriers."""
        others, key_blocks = self.key_blocks - 1, self.key_blocks
        slabs = 2 * (_SLABS + 1) + others * (_SLABS // key_blocks + 1)
        return slabs * _SLAB_BYTES + key_blocks * ROWS * 8 + 8 * (3 + 2 * key_blocks)

    def module(self) -> jit.Module:
        """mla_few.cu."""
        sizes = {"BLOCKS": self.blocks, "KEY_BLOCKS": self.key_blocks}
        return cuda_module("mla_few", "mla_few.cu", FP8=False, PAGE=0, **sizes)

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        maps = map(tensor_map_of, ("q_latent", "q_rope", "latent", "rotated"))
        sizes = map(i32, ("rows", "kv_len"))
        return KernelSignature("mla_few", (*maps, *_PARTS, *_OUT, f32("scale"), *sizes), waits=True)


@dataclass(frozen=True)
class FewReduceVariant:
    """`mla_few_reduce`, which adds the parts of rows that clusters of that form leave."""

    blocks: int
    key_blocks: int

    def module(self) -> jit.Module:
        """mla_few_reduce.cu."""
        sizes = {"BLOCKS": self.blocks, "KEY_BLOCKS": self.key_blocks}
        return cuda_module("mla_few_reduce", "mla_few_reduce.cu", **sizes)

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        sizes = map(i32, ("rows", "groups", "clusters"))
        return KernelSignature("mla_few_reduce", (*_PARTS, *_OUT, *sizes), waits=True)


_PARTS: tuple[Parameter, ...] = (
    pointer("sums", torch.float16, align=8),
    pointer("scales", torch.float32, align=8),
)
_OUT: tuple[Parameter, ...] = (
    pointer("out", torch.bfloat16, align=4),
    i64("out_sequence"),
    i64("out_row"),
)


@dataclass(frozen=True)
class FewLaunches:
    """`mla_few`, and `mla_few_reduce` where rows have parts, but for addresses and the scale.

    Attributes:
        copies: whether the kernels take copies of some operands.
        maps: of both parts of queries and both of the cache.
        attend, reduce: the kernels; no reduction where a sequence has one cluster.
        pieces: sequences, groups, clusters that leave parts, blocks of one, halves.
        columns: of a piece.
        strides: of sequences and rows of the result.
        attend_numbers, reduce_numbers: last arguments.
    """

    copies: bool
    maps: tuple[bytes, bytes, bytes, bytes]
    attend: Callable[..., None]
    reduce: Callable[..., None] | None
    pieces: tuple[int, int, int, int, int]
    columns: int
    strides: tuple[int, int]
    attend_numbers: tuple[int, int]
    reduce_numbers: tuple[int, int, int]

    @classmethod
    def of(
        cls,
        q_latent: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        rotated: Tensor,
        out: Tensor,
        plan: FewPlan,
        *,
        copies: bool,
    ) -> FewLaunches:
        """Of all calls whose operands and result have these facts.

        Args:
            q_latent: [batch, rows, 512], bf16.
            q_rope: [batch, rows, 64], bf16.
            latent: [batch, kv_len, 512], bf16.
            rotated: [batch, kv_len, 64], bf16.
            out: as `q_latent`.
        """
        sequences, rows, _ = out.shape
        arch, device_type = arch_name(out.device), out.device.type
        variant = FewVariant(plan.blocks, plan.key_blocks)
        columns = _RANK // plan.key_blocks // 2
        grid = plan.cluster_blocks * plan.clusters, plan.groups, sequences
        attend = load_kernel(variant, arch, device_type)
        reduce = None
        if plan.clusters > 1:
            each = columns // _QUAD_COLUMNS, 2 * plan.cluster_blocks, plan.groups * sequences
            kernel = load_kernel(FewReduceVariant(plan.blocks, plan.key_blocks), arch, device_type)
            reduce = partial(kernel.launch, each, _REDUCE_THREADS, 0)
        of_q, of_rope = (
            tensor_map(q, (1, ROWS // plan.key_blocks, 64)) for q in (q_latent, q_rope)
        )
        of_latent, of_rotated = (
            tensor_map(k, (1, KEYS // plan.blocks, 64)) for k in (latent, rotated)
        )
        clusters = plan.clusters if plan.clusters > 1 else 0
        return cls(
            copies,
            (of_q, of_rope, of_latent, of_rotated),
            partial(attend.launch, grid, _ATTEND_THREADS, variant.shared_bytes),
            reduce,
            (sequences, plan.groups, clusters, plan.cluster_blocks, 2),
            columns,
            (out.stride(0), out.stride(1)),
            (rows, latent.shape[1]),
            (rows, plan.groups, plan.clusters),
        )

    def run(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        rotated: Tensor,
        out: Tensor,
        scale: float,
    ) -> None:
        """Fill `out`; `scale` is positive."""
        quads = self.columns // _QUAD_COLUMNS
        parts = (
            out.new_empty(*self.pieces, quads, _WARPGROUP, 4, dtype=torch.float16),
            out.new_empty(*self.pieces, ROWS, 2, dtype=torch.float32),
        )
        given = q_latent, q_rope, latent, rotated
        self.attend(
            *((described, x, 0) for described, x in zip(self.maps, given, strict=True)),
            *(*parts, out, *self.strides, scale * math.log2(math.e), *self.attend_numbers),
        )
        if self.reduce is not None:
            self.reduce(*parts, out, *self.strides, *self.reduce_numbers)
