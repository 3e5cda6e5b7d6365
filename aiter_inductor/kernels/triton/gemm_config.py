"""Launch parameters of the products of quantised operands, without Triton: tables hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

PROGRAMS = {True: 304, False: 132}
"""Programs that fill an MI300X (under ROCm) and an H200."""

MAX_SPLIT = 16
MOST_FEW = 4
"""Rows up to which a quantised weight is multiplied without matrix instructions."""
MAX_STEP = 128


@dataclass(frozen=True)
class GemmConfig:
    """Launch parameters of the product; a table holds them by these names.

    Attributes:
        block_m, block_n, block_k: the tile, powers of two, at least 16; `block_k` divides the
            elements of K that share a scale. With a `block_m` of 1, 2 or 4 so many rows are
            multiplied with a quantised weight without matrix instructions, by any stretch of K.
        split_k: parts into which K is cut, each summed by programs of its own.
        group_m: rows of tiles that advance together.
        num_warps: warps of 32 lanes; a chip with wider ones launches half as many.
        num_stages: tiles in flight.
        waves_per_eu: of AMD's compiler; 0 leaves it to choose.
        matrix_instr_nonkdim: 16 or 32, the matrix instruction's rows on CDNA; 0 leaves it.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0

    @classmethod
    def default(
        cls, M: Any, N: int, K: int, *, amd: bool, block_k: int = 128, batch: Any = 1
    ) -> GemmConfig:
        """Untuned choice for `batch` products; an M that is not an int is taken to be large."""
        rows = M if isinstance(M, int) else 4096
        # Hopper's matrix instruction takes 64 rows, CDNA's 16.
        least = 16 if amd else 64
        block_m = min(max(_power_above(rows), least), 128)
        block_n = 128 if N >= 128 else max(_power_above(N), 16)
        tiles = _cdiv(max(rows, 1), block_m) * _cdiv(max(N, 1), block_n)
        most = max(K // (4 * block_k), 1)
        tiles *= max(batch, 1) if isinstance(batch, int) else PROGRAMS[amd]
        split = min(PROGRAMS[amd] // tiles, most, MAX_SPLIT) if rows <= 256 else 1
        split_k = 1 << (max(split, 1).bit_length() - 1)
        return cls(
            block_m,
            block_n,
            block_k,
            split_k=split_k,
            num_warps=8 if block_m == 128 else 4,
            num_stages=2 if amd else 3,
        )

    @classmethod
    def default_weight_only(
        cls, M: Any, N: int, K: int, *, amd: bool, scale_k: int = 0
    ) -> GemmConfig:
        """Untuned choice where x is not quantised; `scale_k` columns share a scale, or all do."""
        if isinstance(M, int) and M <= MOST_FEW and not scale_k & (scale_k - 1):
            return cls(_power_above(M), 4, min(max(_power_above(K), 16), 1024), num_stages=2)
        return cls.default_weight_first(M, N, K, amd=amd, scale_k=scale_k)

    @classmethod
    def default_weight_first(
        cls, M: Any, N: int, K: int, *, amd: bool, scale_k: int = 0
    ) -> GemmConfig:
        """Untuned choice where the weight is the left operand of matrix instructions."""
        block_k = min(scale_k & -scale_k, MAX_STEP) if scale_k else MAX_STEP
        rows = M if isinstance(M, int) else 4096
        block_m = min(max(_power_above(rows), 16), 128)
        wide = block_m == 128 or _cdiv(N, 128) >= PROGRAMS[amd]
        block_n = 128 if wide else 64
        some = not amd and rows <= 256
        block_k = min(block_k, 64) if block_m == 128 and not some else block_k
        tiles = _cdiv(max(rows, 1), block_m) * _cdiv(max(N, 1), block_n)
        split = min(2 * PROGRAMS[amd] // tiles, max(K // (4 * block_k), 1), MAX_SPLIT)
        split_k = 1 << (max(split, 1).bit_length() - 1)
        num_warps = 8 if block_m == 128 else 4
        num_stages = 2 if amd else 3 if block_m == block_k == 128 else 4
        return cls(block_m, block_n, block_k, split_k, 8, num_warps, num_stages)

    @classmethod
    def candidates(cls, problem: Any, arch: Any) -> Iterator[GemmConfig]:
        """What `tune` tries: tiles of the problem's size class, and ways to cut K into parts."""
        amd = arch.wave_size == 64
        step = step_of(problem)
        weight_only = problem.scaling.startswith("weight")
        if weight_only and problem.M <= MOST_FEW:
            yield from cls._few(problem)
        tiles = (
            WEIGHT_FIRST
            if weight_only
            else FEW_ROWS
            if problem.M <= 32
            else SOME_ROWS
            if problem.M <= 128
            else MANY_ROWS
        )
        for block_m, block_n, block_k, num_warps, num_stages in tiles:
            made = cls(block_m, block_n, min(block_k, step), 1, 8, num_warps, num_stages)
            if block_k > step or (amd and num_stages > 2):
                made = replace(made, num_stages=2 if amd else num_stages)
            yield from made._cut(problem, arch)
            if amd and block_m >= 32:
                yield replace(made, matrix_instr_nonkdim=16, waves_per_eu=2)

    @classmethod
    def _few(cls, problem: Any) -> Iterator[GemmConfig]:
        """Without matrix instructions: 8 to 64 sums a lane, in one or several parts of K."""
        rows = _power_above(problem.M)
        for block_n in (1, 2, 4, 8):
            for block_k in (512, 1024, 2048):
                for num_warps in (4, 8):
                    sums = rows * block_n * block_k // (32 * num_warps)
                    for split_k in (1, 2, 4) if 8 <= sums <= 64 else ():
                        if split_k * block_k <= problem.K:
                            yield cls(rows, block_n, block_k, split_k, 8, num_warps, 2)

    def _cut(self, problem: Any, arch: Any) -> Iterator[GemmConfig]:
        """Itself, and cut along K while that fills the chip not more than four times over."""
        tiles = _cdiv(problem.M, self.block_m) * _cdiv(problem.N, self.block_n)
        split_k = 1
        while split_k == 1 or (
            tiles * split_k <= 4 * arch.compute_units
            and split_k <= MAX_SPLIT
            and 2 * split_k * self.block_k <= problem.K
            and problem.M <= 256
            and problem.dtype != torch.int8
        ):
            yield replace(self, split_k=split_k)
            split_k *= 2

    def refuse(self, problem: Any) -> str | None:
        """Why the kernel cannot run `problem` so, or None."""
        if self.block_m <= MOST_FEW:
            return self._refuse_few(problem)
        for field in ("block_m", "block_n", "block_k"):
            size = getattr(self, field)
            if size < 16 or size & (size - 1):
                return f"{field}={size} is no power of two of at least 16"
        if step_of(problem) % self.block_k:
            return f"block_k={self.block_k} does not divide {step_of(problem)}, the tile of a scale"
        positive = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) < 0]
        if positive or min(self.split_k, self.group_m, self.num_warps, self.num_stages) < 1:
            return f"{self} has a parameter that is not positive"
        return None

    def _refuse_few(self, problem: Any) -> str | None:
        """Of rows that are multiplied without matrix instructions."""
        if not problem.scaling.startswith("weight"):
            return f"block_m={self.block_m} is less than 16, the rows of a matrix instruction"
        sizes = {"block_m": self.block_m, "block_n": self.block_n, "block_k": self.block_k}
        group = problem.group_size or problem.block_k
        for field, size in (sizes | {"the columns of a scale": group}).items():
            if size & (size - 1):
                return f"{field}={size} is no power of two"
        least = min(self.block_m, self.block_n, self.split_k, self.num_warps, self.num_stages)
        if least < 1 or self.block_k < 16:
            return f"{self} has a parameter that is too small"
        return None

    def launch(self) -> dict[str, int]:
        """Keywords for the launch."""
        if not torch.version.hip:
            return {"num_warps": self.num_warps, "num_stages": self.num_stages}
        options = {"num_warps": max(self.num_warps // 2, 1), "num_stages": self.num_stages}
        chosen = {
            "waves_per_eu": self.waves_per_eu,
            "matrix_instr_nonkdim": self.matrix_instr_nonkdim,
        }
        return options | {name: value for name, value in chosen.items() if value}


FEW_ROWS = (
    (16, 64, 128, 4, 4),
    (16, 128, 128, 4, 4),
    (16, 32, 256, 4, 3),
    (16, 64, 256, 4, 3),
    (32, 64, 128, 4, 4),
    (64, 64, 128, 4, 4),
    (64, 128, 128, 4, 3),
)
SOME_ROWS = (
    (16, 64, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (32, 128, 128, 4, 4),
    (64, 64, 128, 4, 4),
    (64, 64, 256, 4, 3),
    (64, 128, 128, 4, 4),
    (64, 256, 128, 8, 3),
    (128, 64, 128, 4, 4),
    (128, 128, 128, 8, 3),
)
MANY_ROWS = (
    (64, 128, 128, 4, 4),
    (64, 256, 128, 8, 3),
    (128, 64, 128, 4, 4),
    (128, 128, 64, 4, 4),
    (128, 128, 128, 4, 3),
    (128, 128, 128, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 256, 128, 8, 3),
    (256, 128, 128, 8, 3),
)
"""`(block_m, block_n, block_k, num_warps, num_stages)` by the number of rows."""


WEIGHT_FIRST = (
    (16, 64, 128, 4, 4),
    (16, 64, 256, 4, 3),
    (16, 128, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (32, 128, 128, 4, 4),
    (64, 64, 128, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 128, 128, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 3),
    (64, 128, 128, 4, 4),
    (128, 64, 64, 4, 4),
)
"""Where the weight is the left operand: tokens, then features, as above."""


def scale_step(scaling: str, sizes: tuple[int, int, int]) -> int:
    """The widest tile along K, a power of two up to 128, within which no scale changes.

    `sizes`: elements of K a scale of x is for, rows and columns one of the weight is for.
    """
    if scaling == "block":
        return min(sizes[0] & -sizes[0], sizes[2] & -sizes[2], MAX_STEP)
    if scaling == "weight_group":
        return min(sizes[0] & -sizes[0], MAX_STEP)
    return min(sizes[2] & -sizes[2], MAX_STEP) if scaling == "weight_block" else MAX_STEP


def step_of(problem: Any) -> int:
    """`scale_step` of a problem; twice as wide where scales do not change along K at all."""
    if problem.scaling in ("row", "tensor", "weight_row"):
        return 2 * MAX_STEP
    sizes = (problem.group_size, problem.block_n, problem.block_k)
    return scale_step(problem.scaling, sizes)


def _power_above(size: int) -> int:
    return 1 << (max(size, 1) - 1).bit_length()


def _cdiv(size: int, by: int) -> int:
    return -(-size // by)
