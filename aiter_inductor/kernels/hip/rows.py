"""How rows are laid over threads: the Python side of rows.h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aiter_inductor.core.launch import Parameter, i64
from aiter_inductor.core.rows import RowNest, row_nest
from aiter_inductor.kernels.hip.loading import CPP_TYPES

VECTOR_BYTES = 16
MAX_THREADS = 1024
SMALL_BLOCK = 256  # threads of a block that holds several rows
CHUNK_BLOCK = 64  # threads of a block that holds a chunk of a row
BUSY_VECTORS = 1 << 20  # vectors in all that occupy every lane of a chip several times
FULL_VECTORS, SOME_VECTORS = 3 << 17, 3 << 15  # that do so once or twice, and hardly
ROW_BLOCK = 128  # threads of a block that holds one row, until a thread would hold too much
FEW_ROWS = 256  # fewer do not fill a chip: latency counts, not registers
SPLIT_ROWS, SPLIT_VECTORS = 64, 2048  # at most so many rows of at least so many vectors are halved
MAX_ROW = 65536  # 64 fp32 registers in each of 1024 threads

QUANT_MODES = ("none", "token", "group", "static")


@dataclass(frozen=True)
class RowLayout:
    """A division of rows among threads.

    Attributes:
        threads: of a block.
        lanes: threads of a row; fewer than `threads` where a block holds several rows.
        vectors: that a thread holds.
        vec: elements of a vector; a power of two.
        exact: each block holds one row, or chunk of a row, with nothing to spare or to mask.
        blocks: that share a row which is reduced over, a cluster; 1 where the chip has none.
        nested: two loops visit the rows, not one.
    """

    threads: int
    lanes: int
    vectors: int
    vec: int
    exact: bool = False
    blocks: int = 1
    nested: bool = True

    @classmethod
    def choose(
        cls,
        num_rows: int,
        N: int,
        vec: int,
        wave: int,
        *,
        least_lanes: int,
        whole: bool,
        inputs: int = 1,
        most_vectors: int = 8,
        clusters: bool = False,
    ) -> RowLayout:
        """The default layout.

        Few threads with many loads in flight each beat many with one: on an H200, 16384 x 8192
        RMSNorm + fp8 takes 120 us with 128 threads of 8 vectors, 143 with 256 of 4 and 261 with
        1024 of 1; with a residual 4 vectors are best, 228 us against 233 and 287. A few rows do
        not fill a chip, and want half as many: 64 x 7168 RMSNorm + fp8 takes an H100 3.09 us with
        224 threads of 4 and 3.21 with 448 of 2, with a residual 4.15 and 3.89. Half as many of long
        rows do not even occupy every multiprocessor: 64 x 18432 SiLU * up + fp8 takes an H100 4.89
        us in one block a row and 4.46 in two.

        Args:
            N: elements of a row, a multiple of `vec`.
            wave: lanes of a wave.
            least_lanes: lanes that reduce together, a power of two up to `wave`.
            whole: a row stays within one block, because something is reduced over all of it.
            inputs: row tensors that are read.
            most_vectors: that a thread holds of all inputs together.
            clusters: whether blocks can share a row.
        """
        num_vectors = N // vec
        if num_vectors <= wave:
            lanes = max(1 << (num_vectors - 1).bit_length(), least_lanes)
            return cls(SMALL_BLOCK, lanes, 1, vec)
        if not whole:
            return cls._chunks(num_rows, num_vectors, vec, inputs)
        few = num_rows <= FEW_ROWS
        halved = clusters and num_rows <= SPLIT_ROWS and num_vectors >= SPLIT_VECTORS
        blocks = 2 if halved else 1
        of_block = -(-num_vectors // blocks)
        vectors = min(-(-of_block // ROW_BLOCK), (4 if few else most_vectors) // inputs)
        vectors = max(vectors, -(-of_block // MAX_THREADS))
        threads = -(-of_block // (vectors * wave)) * wave
        exact = threads * vectors * blocks == num_vectors
        return cls(threads, threads, vectors, vec, exact=exact, blocks=blocks)

    @classmethod
    def _chunks(cls, num_rows: int, num_vectors: int, vec: int, inputs: int) -> RowLayout:
        """Rows cut into chunks: small blocks, with several loads a thread once all are busy.

        Group quantisation of 4096 x 18432 on an H200: 67 us with 64 threads of 4 vectors, 82 with
        128 of 1, 81 with 256 of 2. SiLU * up of 4096 x 14336, which reads twice as much, takes an
        H100 121.3 us with 128 threads of 2 vectors and 121.8 with 64; quantised in groups, 4096 x
        18432 130.2 and 130.6. With 64 rows of 18432 it takes 3.76 with 64 threads of one vector
        each, and 3.97 with 256.
        """
        in_all = num_rows * num_vectors
        threads, vectors = CHUNK_BLOCK, 1
        if inputs == 1 and in_all >= SOME_VECTORS:
            threads, vectors = cls._chunk_of_one_input(in_all, num_vectors)
        elif in_all >= BUSY_VECTORS:
            threads, vectors = CHUNK_BLOCK * inputs, 4 // inputs
        return cls(threads, threads, vectors, vec, exact=num_vectors % (threads * vectors) == 0)

    @staticmethod
    def _chunk_of_one_input(in_all: int, num_vectors: int) -> tuple[int, int]:
        """Threads of a chunk and vectors of each, by group quantisation on an H100 in microseconds.

        rows x N          64 of 1  128 of 1  64 of 2  64 of 3  128 of 2  64 of 4
        64 x 7168            1.71      1.73     1.88     2.09      1.93     2.28
        128 x 7168           2.50      2.17     2.36     2.62      2.60     2.71
        512 x 4096           5.41      3.23     3.63     4.14      3.58     3.93
        128 x 18432          6.51      3.49     3.86     4.09      3.82     4.29
        4096 x 1024         10.78      5.60     5.41     5.81      6.79     6.43
        1024 x 4096         10.78      5.60     5.45     5.59      5.16     5.63
        4096 x 1536         15.86     10.82    10.74     6.98      7.28     7.48
        1024 x 7168         18.59      9.76     9.60     8.23      8.13     8.71
        4096 x 3072         30.89     15.97    16.00    12.60     14.06    13.88
        4096 x 7168         70.77     36.25    36.15    32.64     32.56    32.94
        """
        if in_all < FULL_VECTORS:
            return 2 * CHUNK_BLOCK, 1
        if num_vectors <= 2 * CHUNK_BLOCK:
            return CHUNK_BLOCK, 2
        if num_vectors % (4 * CHUNK_BLOCK) and num_vectors % (3 * CHUNK_BLOCK) == 0:
            return CHUNK_BLOCK, 3
        return (CHUNK_BLOCK, 4) if in_all >= BUSY_VECTORS else (2 * CHUNK_BLOCK, 2)

    def over(self, nest: RowNest) -> RowLayout:
        """This layout of the rows of `nest`."""
        return replace(self, nested=nest.inner != 1)

    def grid(self, num_rows: int, N: int) -> tuple[int, int]:
        """Blocks over the rows, and chunks of a row."""
        rows_a_block = self.threads // self.lanes
        if self.blocks > 1:
            return num_rows * self.blocks, 1
        chunks = -(-(N // self.vec) // (self.lanes * self.vectors))
        return -(-num_rows // rows_a_block), chunks

    def defines(self) -> dict[str, int]:
        """As rows.h names them."""
        return {
            "THREADS": self.threads,
            "LANES": self.lanes,
            "VECTORS": self.vectors,
            "VEC": self.vec,
            "EXACT": int(self.exact),
            "BLOCKS": self.blocks,
            "NESTED": int(self.nested),
        }


class Quantisation(NamedTuple):
    """How rows are stored.

    Attributes:
        mode: `none`, `token`, `group` or `static`.
        out_dtype: of the rows written.
        group_size: elements that share a scale, where the mode is `group`.
    """

    mode: str
    out_dtype: torch.dtype
    group_size: int = 1

    @classmethod
    def dynamic(cls, dtype: torch.dtype, group_size: int | None) -> Quantisation:
        """One scale a row, or one a group."""
        if group_size is None:
            return cls("token", dtype)
        return cls("group", dtype, group_size)

    def defines(self) -> dict[str, object]:
        """As rows.h names them."""
        return {
            "QUANT": QUANT_MODES.index(self.mode),
            "GROUP": self.group_size,
            "OUT": CPP_TYPES[self.out_dtype],
        }


def scales_for(x: Tensor, group_size: int | None) -> Tensor:
    """[*, 1] or [*, N / group_size], fp32, to be written."""
    groups = 1 if group_size is None else x.shape[-1] // group_size
    return x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


def nest_of(*tensors: Tensor) -> RowNest:
    """The two loops over the rows of `tensors`.

    Raises:
        ValueError: if the last stride of one is not 1, or if the rows need more than two loops.
    """
    for tensor in tensors:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"rows of shape {tuple(tensor.shape)}, strides {tensor.stride()} are not contiguous"
            )
    nest = row_nest(*tensors)
    if nest is None:
        strides = ", ".join(str(tensor.stride()) for tensor in tensors)
        raise ValueError(f"rows of shape {tuple(tensors[0].shape)} with strides {strides} need "
                         "more than two loops")  # fmt: skip
    return nest


def stride_parameters(*names: str) -> tuple[Parameter, ...]:
    """`<name>_outer` and `<name>_inner` for each tensor, in elements."""
    return tuple(i64(f"{name}_{loop}") for name in names for loop in ("outer", "inner"))


def widest_vector(
    N: int, itemsize: int, strides: tuple[tuple[Any, Any], ...], accessed: tuple[Tensor, ...]
) -> int:
    """Elements that one access may hold: 16 bytes, if N, strides and addresses are multiples.

    Args:
        itemsize: bytes of an element of the input that decides.
        strides: outer and inner ones of the row tensors, in elements.
        accessed: tensors read and written by vectors.
    """
    vec = VECTOR_BYTES // itemsize
    counts = [N, *(stride for pair in strides for stride in pair)]
    while vec > 1:
        fits = all(count % vec == 0 for count in counts)
        if fits and all(_is_aligned(tensor, vec) for tensor in accessed):
            return vec
        vec //= 2
    return 1


def _is_aligned(tensor: Tensor, vec: int) -> bool:
    bytes_moved = min(vec * tensor.element_size(), VECTOR_BYTES)
    return tensor.data_ptr() % bytes_moved == 0


@dataclass(frozen=True)
class LaunchPlan:
    """All that a launch needs beside its tensors and its floating-point arguments."""

    launch: Callable[..., None]
    grid: tuple[int, int]
    threads: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def check_row(N: int, group_size: int, vec: int, wave: int) -> None:
    """Refuse what the row kernels do not take.

    Raises:
        ValueError: a sentence with the values.
    """
    if not 0 < N <= MAX_ROW:
        raise ValueError(f"N={N} is outside 1 to {MAX_ROW}, the rows one block holds")
    if group_size & (group_size - 1) or N % group_size:
        raise ValueError(f"group_size={group_size} is not a power of two that divides N={N}")
    if group_size > vec * wave:
        raise ValueError(
            f"group_size={group_size} exceeds {vec * wave}, what {wave} lanes hold in vectors of "
            f"{vec} elements"
        )


def flat_strides(nest: RowNest, present: tuple[bool, ...]) -> tuple[int, ...]:
    """The nest's strides in the order of the parameters, zeros for tensors that are absent."""
    given = iter(nest.strides)
    return tuple(stride for here in present for stride in (next(given) if here else (0, 0)))
