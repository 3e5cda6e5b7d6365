"""How the fp8 products are cut into tiles: what can be built, is tried, and is the default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BLOCK_K = 128
"""Elements of K a stage; a scale of x or of a block of the weight is for as many."""
SHARED_BYTES = 232448
"""Shared memory of one block on sm_90."""
SM_BYTES = 233472
"""Of one multiprocessor, for all blocks that run there and the 1 KiB that CUDA keeps of each."""
FEW_ROWS = 128
TOKEN_TILES = (8, 16, 32, 64, 128)
"""Rows of x of a swapped tile by default; each size is a compilation of its own."""
BOX_M = 16
"""Rows of the result that one copy takes to memory: a warp's."""
_WARPS, _OUT_SLOTS = 8, 2
_SPLITS = (1, 2, 3, 4, 6, 8)
_RESERVED_BYTES = 1024
_BARRIER_BYTES = 16
_MOST_ACCUMULATORS = 208


@dataclass(frozen=True)
class GemmConfig:
    """Launch parameters of the products; each field is a column of the tuned table.

    Attributes:
        swap: 0 runs gemm_fp8_tiles.cu, for many rows. 1 runs gemm_fp8_tokens.cu, where the weight
            is the operand of 64 rows an instruction and the rows of x are its columns.
        block_m: rows of x a tile: 128 or 256; swapped, a multiple of 8 up to 128.
        block_n: columns of a tile: up to 256; swapped, 64 or 128.
        width: columns of one instruction, which divide block_n; swapped, unused.
        stages: tiles of 128 along K that are on their way or being read.
        cluster: neighbouring blocks that share each tile of the weight, 1 or 2; swapped, blocks
            among which K is cut and whose sums are added, 1 to 8.
        band: tiles along M that run side by side; swapped, unused.
        per_sm: swapped, blocks that run on one multiprocessor; else 1.
    """

    swap: int = 0
    block_m: int = 128
    block_n: int = 256
    width: int = 128
    stages: int = 4
    cluster: int = 1
    band: int = 8
    per_sm: int = 1

    @property
    def box_n(self) -> int:
        """Columns of the result that one copy takes to memory."""
        return next((n for n in (64, 32) if self.width % n == 0), 16)

    def shared_bytes(self, K: int) -> int:
        """Dynamic shared memory: the ring, results or partial sums, barriers and scales."""
        ring = self.stages * (self.block_m + self.block_n) * BLOCK_K
        barriers = self.stages * _BARRIER_BYTES
        if not self.swap:
            return ring + _WARPS * _OUT_SLOTS * BOX_M * self.box_n * 2 + barriers
        sums = self.block_m * (self.block_n + 4) * 4
        scales = _cdiv(_cdiv(K, BLOCK_K), self.cluster) * (self.block_m + 2) * 4
        return max(ring, sums) + barriers + scales

    def refuse(self, problem: Any) -> str | None:
        """Why the kernel cannot run `problem` so, or None."""
        if reason := self._misshapen():
            return reason
        most = SHARED_BYTES
        if self.swap:
            most = min(most, SM_BYTES // self.per_sm - _RESERVED_BYTES)
        if (taken := self.shared_bytes(problem.K)) > most:
            return f"{taken} bytes of shared memory exceed {most}"
        return None

    def _misshapen(self) -> str | None:
        tile = f"tiles of {self.block_m}x{self.block_n}"
        if self.stages < 2 or min(self.cluster, self.band, self.per_sm) < 1:
            return f"{self} has a parameter that is too small"
        if self.swap:
            if self.block_n not in (64, 128) or self.block_m % 8 or not 8 <= self.block_m <= 128:
                return f"{tile} are no whole swapped products"
            return f"K is cut into {self.cluster} > 8 parts" if self.cluster > 8 else None
        if self.block_m not in (128, 256) or self.block_n % self.width or self.width % 16:
            return f"{tile} by {self.width} are no whole products"
        if self.block_n > 256 or self.cluster > 2 or self.per_sm > 1:
            return f"{tile} for {self.cluster} blocks are no copies of TMA"
        parts = self.block_m // 128 * (self.block_n // self.width)
        if (held := self.width // 2 * (1 + parts)) > _MOST_ACCUMULATORS:
            return f"{held} accumulators a thread exceed {_MOST_ACCUMULATORS}"
        return None

    @classmethod
    def candidates(cls, problem: Any, arch: Any) -> Iterator[GemmConfig]:
        """What `tune` tries."""
        if problem.M <= 4 * FEW_ROWS:
            for block_n in (64, 128):
                for split in (s for s in _SPLITS if s <= max(1, _cdiv(problem.K, BLOCK_K))):
                    for per_sm in (1, 2):
                        yield from cls._swapped(problem, block_n, split, per_sm)
        if problem.M > FEW_ROWS // 2:
            for block_m, block_n, width, stages in _TILES:
                for cluster in (1, 2):
                    for band in (8, 16):
                        yield cls(0, block_m, block_n, width, stages, cluster, band)

    @classmethod
    def default(cls, problem: Any, num_sms: int) -> GemmConfig:
        """What is taken for a problem that nobody tuned."""
        if problem.M > FEW_ROWS:
            # On an H100 4096x24576x1536 takes 259 us in bands of 8 and 255 in bands of 16.
            return cls(band=16)
        block_n, most = cls._few_rows(problem, num_sms)
        for split in range(most, 9):
            for per_sm in (2, 1):
                if made := next(cls._swapped(problem, block_n, split, per_sm), None):
                    return made
        return cls()

    @staticmethod
    def _few_rows(problem: Any, num_sms: int) -> tuple[int, int]:
        """Columns of a swapped tile, and parts of K: up to a block a multiprocessor.

        Short parts of K pay only while a quarter of the chip would idle. Of 36 shapes tuned at 64
        rows on an H200 this gives tiles and parts of 25; most of the others differ by one part.
        """
        few, blocks_k = 3 * num_sms // 4, _cdiv(problem.K, BLOCK_K)
        block_n = 64 if _cdiv(problem.N, 64) * _SPLITS[-1] <= few else 128
        tiles = _cdiv(problem.N, block_n)
        parts = [
            split
            for split in _SPLITS
            if split <= blocks_k
            and tiles * split <= num_sms
            and (8 * split <= blocks_k or tiles * split <= few)
        ]
        return block_n, max(parts, default=1)

    @classmethod
    def _swapped(cls, problem: Any, block_n: int, split: int, per_sm: int) -> Iterator[GemmConfig]:
        """The swapped configuration with the most stages that fit and are used, if there is one."""
        rows = next(size for size in TOKEN_TILES if size >= min(problem.M, FEW_ROWS))
        for stages in range(min(8, max(2, _cdiv(_cdiv(problem.K, BLOCK_K), split))), 1, -1):
            made = cls(1, rows, block_n, 128, stages, split, 1, per_sm)
            if made.refuse(problem) is None:
                yield made
                return


_TILES = (
    (128, 256, 128, 4),
    (128, 128, 128, 6),
    (256, 128, 128, 4),
    (128, 192, 192, 4),
    (128, 160, 160, 5),
    (128, 112, 112, 6),
    (128, 64, 64, 6),
)
"""`(block_m, block_n, width, stages)`."""


def _cdiv(size: int, by: int) -> int:
    return -(-size // by)
