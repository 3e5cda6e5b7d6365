"""How attention_backward.cu divides its work, and the kernels that a problem needs."""

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
from aiter_inductor.kernels.cuda.attention import Hiding
from aiter_inductor.kernels.cuda.attention_config import ALIGNMENT_BYTES, SHARED_BYTES
from aiter_inductor.kernels.cuda.loading import cuda_module

KEYS, QUERIES = 128, 64  # of a block, and that it takes at a time
PIECE = 32  # columns of dq that are kept together
THREADS = 384
WIDEST = 128  # elements of a head, sums of whose dk and dv registers hold beside the scores
STAGES = ((3, 3), (3, 2), (2, 2))


@dataclass(frozen=True)
class BackwardTiles:
    """Of a block of attention_backward.cu.

    Attributes:
        qk_dim, v_dim: elements a head, padded to whole columns of shared memory.
        q_stages, do_stages: blocks of queries, and of output gradients, in flight.
    """

    qk_dim: int
    v_dim: int
    q_stages: int
    do_stages: int

    @classmethod
    def default(cls, qk_dim: int, v_dim: int) -> BackwardTiles:
        """The deepest that shared memory holds; widths are padded."""
        for stages in STAGES:
            found = cls(qk_dim, v_dim, *stages)
            if found.shared_bytes <= SHARED_BYTES:
                return found
        raise ValueError(f"no tile of heads of {qk_dim} and {v_dim} fits {SHARED_BYTES} bytes")

    @property
    def shared_bytes(self) -> int:
        """As attention_backward_work.h lays it out."""
        keys = KEYS * (self.qk_dim + self.v_dim + 2 * QUERIES) * 2
        queries = self.q_stages * (self.qk_dim * 2 + 4) + self.do_stages * (self.v_dim * 2 + 4)
        barriers = 16 * (1 + self.q_stages + self.do_stages)
        return ALIGNMENT_BYTES + keys + QUERIES * queries + barriers


@dataclass(frozen=True)
class Kind:
    """What all kernels of one problem have in common.

    Attributes:
        causal, window: whether queries see no later keys, and only so many.
        packed: whether sequences lie one after the other in one batch.
        fp16: whether all but the sums is fp16 rather than bf16.
        first_keys: whether each query names the first key that it sees.
    """

    causal: bool
    window: bool
    packed: bool
    fp16: bool
    first_keys: bool = False

    @classmethod
    def of(cls, hiding: Hiding, *, packed: bool, fp16: bool) -> Kind:
        """The kernels that hide so."""
        window, first_keys = hiding.window is not None, hiding.first_keys is not None
        return cls(hiding.causal != "none", window, packed, fp16, first_keys)

    @property
    def dtype(self) -> torch.dtype:
        """Of all but the sums."""
        return torch.float16 if self.fp16 else torch.bfloat16

    @property
    def definitions(self) -> dict[str, bool]:
        """As the sources read them."""
        return {
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "FIRST_KEYS": self.first_keys,
            "PACKED": self.packed,
            "FP16": self.fp16,
        }


@dataclass(frozen=True)
class BackwardVariant:
    """One compilation of attention_backward.cu."""

    tiles: BackwardTiles
    kind: Kind

    def module(self) -> Module:
        """attention_backward.cu with these definitions."""
        return cuda_module(
            "attention_backward",
            "attention_backward.cu",
            QK_DIM=self.tiles.qk_dim,
            V_DIM=self.tiles.v_dim,
            Q_STAGES=self.tiles.q_stages,
            DO_STAGES=self.tiles.do_stages,
            **self.kind.definitions,
            SHARED_BYTES=self.tiles.shared_bytes,
        )

    def signature(self) -> KernelSignature:
        """attention_backward's parameters."""
        fp32, dtype = torch.float32, self.kind.dtype
        sizes = ("num_heads", "heads_per_kv", "all_kv_heads", "num_queries", "num_keys")
        order = ("shift", "window", "key_blocks", "query_blocks", "together")
        last = ("num_sequences", "from_end", "qk_dim", "v_dim")
        strides = ("dk_batch", "dk_head", "dk_row", "dv_batch", "dv_head", "dv_row")
        return KernelSignature(
            "attention_backward",
            (
                *map(tensor_map_of, ("q_map", "k_map", "v_map", "do_map")),
                pointer("lse_log2", fp32, align=16),
                pointer("delta", fp32, align=16),
                pointer("parts", fp32, align=16),
                pointer("dk", dtype, align=16),
                pointer("dv", dtype, align=16),
                pointer("q_starts", torch.int32, optional=True),
                pointer("k_starts", torch.int32, optional=True),
                pointer("first_keys", torch.int32, optional=True),
                *map(i32, (*sizes, *order, *last)),
                f32("scale"),
                f32("scale_log2"),
                *map(i64, strides),
            ),
        )


@dataclass(frozen=True)
class RowsVariant:
    """One kernel of attention_backward_rows.cu, `rows` or `dq`."""

    step: str
    kind: Kind

    def module(self) -> Module:
        """attention_backward_rows.cu with these definitions."""
        return cuda_module(
            "attention_backward_rows",
            "attention_backward_rows.cu",
            PACKED=self.kind.packed,
            FP16=self.kind.fp16,
        )

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        fp32, dtype = torch.float32, self.kind.dtype
        sizes = ("num_heads", "num_queries", "blocks", "num_sequences")
        starts = pointer("starts", torch.int32, optional=True)
        if self.step == "rows":
            strides = ("out_batch", "out_head", "out_row", "grad_batch", "grad_head", "grad_row")
            parameters = (
                pointer("out", dtype, align=16),
                pointer("grad", dtype, align=16),
                pointer("lse", fp32),
                pointer("grad_lse", fp32, optional=True),
                starts,
                pointer("lse_log2", fp32),
                pointer("delta", fp32),
                pointer("parts", fp32, align=16, optional=True),
                *map(i32, (*sizes, "all_rows", "v_dim", "padded_dim")),
                *map(i64, strides),
            )
        else:
            parameters = (
                pointer("parts", fp32, align=16),
                starts,
                pointer("dq", dtype, align=16),
                *map(i32, (*sizes, "qk_dim", "padded_dim")),
                f32("scale"),
                *map(i64, ("batch_stride", "head_stride", "row_stride")),
            )
        return KernelSignature(f"attention_backward_{self.step}", parameters)
