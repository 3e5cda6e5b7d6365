"""How row kernels walk their rows, and the launch parameters they share.

A row lies in registers as `chunks` blocks of `block` elements each. Wide chunks need fewer
instructions; narrow ones that divide N leave no lane idle (7168 is 7 chunks of 1024, but only
seven eighths of a block of 8192).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from aiter_inductor.core.rows import RowNest

VECTOR_BYTES = 16
MAX_BLOCK = 16384
EXACT_BLOCK = 1024
"""Chunks without idle lanes: an H200 normalises and quantises 4096 rows of 7168 in 27.4 µs by seven
of them and in 30.9 by one of 8192. With a residual it is the other way round, 69.1 and 62.4."""


@dataclass(frozen=True)
class RowConfig:
    """Launch parameters of a row kernel.

    Attributes:
        block: elements a chunk of a row, a power of two.
        rows: rows a tile, a power of two; more than 1 for short rows.
        num_warps: warps of 32 lanes; a chip with wider ones launches as many fewer.
        programs: most programs in the grid, each walking over tiles; None for one a tile.
        num_stages: tiles in flight in a program that walks over several.
        late: weight and bias are loaded after the row's reductions, and not held in registers
            meanwhile.
    """

    block: int
    rows: int
    num_warps: int
    programs: int | None = None
    num_stages: int = 1
    late: bool = False

    @classmethod
    def default(
        cls,
        N: int,
        itemsize: int,
        *,
        num_rows: Any,
        group_size: int = 1,
        reduces_alone: bool = False,
        centres: bool = False,
    ) -> RowConfig:
        """Untuned choice.

        Args:
            N: elements a row.
            itemsize: bytes an element of the widest input.
            num_rows: an int, or a SymInt, which is taken to be large.
            group_size: elements that share a scale; a chunk holds whole groups.
            reduces_alone: whether a row is normalised, and read from one tensor only.
            centres: whether its mean is subtracted. Then weight and bias are loaded late: 4096 x
                7168 LayerNorm + fp8 takes an H100 35.8 µs so, and 48.8 with all loads first.
        """
        whole = triton.next_power_of_2(N)
        if whole <= 1024:
            rows = max(2048 // whole, 1)
            return cls(whole, rows, num_warps=4 if rows * whole >= 1024 else 1)
        block = max(min(whole, MAX_BLOCK), group_size)
        few = isinstance(num_rows, int) and num_rows <= 256
        if reduces_alone and group_size == 1 and not few and whole != N and N % EXACT_BLOCK == 0:
            return cls(EXACT_BLOCK, 1, num_warps=4, late=centres)
        lanes = block * itemsize // VECTOR_BYTES
        warps = min(max(lanes // 128, 4), 16)
        return cls(block, 1, num_warps=warps, late=centres and not few)

    def chunks(self, N: int) -> int:
        """Chunks a row of N elements takes."""
        return triton.cdiv(N, self.block)

    def grid(self, num_rows: Any) -> tuple[Any]:
        """Programs for `num_rows` rows; none for none."""
        tiles = (num_rows + self.rows - 1) // self.rows
        if self.programs is None:
            return (tiles,)
        if isinstance(tiles, int):
            return (min(tiles, self.programs),)
        return (torch.sym_min(tiles, self.programs),)

    def launch(self) -> dict[str, int]:
        """Keywords for the launch."""
        warps = self.num_warps // 2 if torch.version.hip else self.num_warps
        return {"num_warps": max(warps, 1), "num_stages": self.num_stages}


def strides_of(nest: RowNest, names: tuple[str, ...]) -> dict[str, Any]:
    """Kernel arguments `<name>_outer` and `<name>_inner`, in elements."""
    found = {}
    for name, (outer, inner) in zip(names, nest.strides, strict=True):
        found[f"{name}_outer"], found[f"{name}_inner"] = outer, inner
    return found


@triton.jit
def row_offsets(rows, inner, outer_stride, inner_stride, NESTED: tl.constexpr):
    """Offsets in elements, int64, of rows counted through both loops."""
    if NESTED:
        outer_part = (rows // inner).to(tl.int64) * outer_stride
        offsets = outer_part + (rows % inner).to(tl.int64) * inner_stride
    else:
        offsets = rows.to(tl.int64) * outer_stride
    return offsets


@triton.jit
def chunk_mask(live, cols, N: tl.constexpr, EVEN: tl.constexpr):
    """Which elements of a chunk exist; a constant where all columns do."""
    if EVEN:
        mask = live
    else:
        mask = live & (cols < N)
    return mask


@triton.jit
def live_rows(rows, num_rows, ROWS: tl.constexpr):
    """Which rows of a tile exist; with one row a tile, all do."""
    if ROWS == 1:
        live = tl.full([1, 1], 1, tl.int1)
    else:
        live = rows < num_rows
    return live


@triton.jit
def load_vector(ptr, cols, N: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """A [N] vector as a tuple of chunks [1, BLOCK], as stored; nothing for no pointer."""
    chunks = ()
    if ptr is not None:
        for c in tl.static_range(CHUNKS):
            part = cols + c * BLOCK
            mask = chunk_mask(tl.full([1, 1], 1, tl.int1), part, N, N == BLOCK * CHUNKS)
            chunks = chunks + (tl.load(ptr + part, mask, 0, eviction_policy="evict_last"),)
    return chunks
