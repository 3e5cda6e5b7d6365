"""Copies of the caller's tensors with forbidden memory around each.

A kernel that runs past the end of one tensor must not land in another: each group of overlapping
tensors gets its own place in an arena, a guard apart from the next, at the same address modulo
256 (so that alignment assumptions neither gain nor lose).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdnasim.arguments import Extent, address, extent

GUARD_BYTES = 1 << 16
ALIGNMENT = 256
POISON_BYTE = 0xFF  # a NaN in bf16, f16, f32 and OCP fp8


@dataclass(frozen=True)
class Block:
    """`size` bytes of the caller at `origin`, copied to `copy`."""

    origin: int
    size: int
    copy: int


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Union of the byte ranges, as disjoint sorted ranges; ranges that only touch stay apart."""
    merged: list[Extent] = []
    for begin, end in sorted(extents):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > begin:
            merged.append((begin, end))
    return merged


class GuardedMemory:
    """The only global memory that a launch may touch, besides its code object and arguments."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        ranges = merge(extent(tensor) for tensor in tensors)
        total = sum(end - begin + GUARD_BYTES + 2 * ALIGNMENT for begin, end in ranges)
        self._arena = np.empty(total + GUARD_BYTES + ALIGNMENT, np.uint8)
        at = self._arena.ctypes.data + GUARD_BYTES
        self.blocks: list[Block] = []
        for begin, end in ranges:
            at += (begin - at) % ALIGNMENT
            self.blocks.append(Block(begin, end - begin, at))
            at += end - begin + GUARD_BYTES
        self.copy_in()

    def copy_in(self) -> None:
        """Copy the caller's bytes into the arena."""
        for block in self.blocks:
            ctypes.memmove(block.copy, block.origin, block.size)

    def copy_out(self) -> None:
        """Copy the arena's bytes back to the caller."""
        for block in self.blocks:
            ctypes.memmove(block.origin, block.copy, block.size)

    def locate(self, tensor: Any) -> int:
        """The address of the tensor's copy; of an empty tensor, its own address."""
        start = address(tensor)
        for block in self.blocks:
            if block.origin <= start < block.origin + block.size:
                return block.copy + start - block.origin
        return start

    def poison(self, tensor: Any) -> None:
        """Fill the copy of `tensor` with NaN bytes."""
        begin, end = extent(tensor)
        if end > begin:
            ctypes.memset(self.locate(tensor) + begin - address(tensor), POISON_BYTE, end - begin)

    def ranges(self) -> list[Extent]:
        """The byte ranges that a launch may touch."""
        return [(block.copy, block.copy + block.size) for block in self.blocks]
