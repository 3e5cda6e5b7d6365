"""Entries of experts brought together in blocks; the Python side of moe_sort.hip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import KernelSignature, i32, pointer
from aiter_inductor.kernels.hip.loading import CPP_TYPES, arch_name, hip_module, load_kernel
from aiter_inductor.kernels.hip.rows import SMALL_BLOCK, LaunchPlan

ONE_CHUNK = 1024  # entries that every block of threads looks through by itself, in one launch
CHUNK = 512  # entries of each block of threads where there are more
PADDING_BLOCKS = 16  # blocks of threads that share the padding of one chunk
_ID_TYPES = {torch.int32: "i32", torch.int64: "i64"}
_WAVE = 64
_MAX_PLACES = 2**29
"""Numbers of places are 32 bits, and blocks of threads step over twice as many at once."""


@dataclass(frozen=True)
class SortVariant:
    """One kernel of one compilation of moe_sort.hip."""

    kernel: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    num_experts: int
    block_m: int
    single: bool

    @property
    def threads(self) -> int:
        """Of a block: one for each expert at least, whole waves."""
        return max(SMALL_BLOCK, -(-self.num_experts // _WAVE) * _WAVE)

    def module(self) -> Module:
        """moe_sort.hip with these definitions."""
        return hip_module(
            "moe_sort",
            "moe_sort.hip",
            ID=_ID_TYPES[self.dtype],
            W=CPP_TYPES[self.weight_dtype],
            EXPERTS=self.num_experts,
            BLOCK_M=self.block_m,
            CHUNK=ONE_CHUNK if self.single else CHUNK,
            SINGLE=self.single,
            THREADS=self.threads,
        )

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        experts, counts = pointer("experts", self.dtype), pointer("chunk_counts", torch.int32)
        parameters = {
            "moe_count_kernel": (experts, counts, i32("entries")),
            "moe_place_kernel": (
                experts,
                pointer("weights", self.weight_dtype),
                pointer("chunk_counts", torch.int32, optional=True),
                pointer("sorted_entries", torch.int32),
                pointer("sorted_weights", torch.float32),
                *(pointer(n, torch.int32) for n in ("block_experts", "counts", "num_sorted")),
                *(i32(n) for n in ("entries", "num_chunks", "num_blocks", "capacity")),
            ),
        }
        return KernelSignature(self.kernel, parameters[self.kernel], waits=True)


def moe_sort(
    experts: Tensor, weights: Tensor, *, num_experts: int, block_m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Order `experts` [num_tokens, topk] by expert; see the op of this name.

    Raises:
        ValueError: for inputs that are not contiguous or too many.
    """
    entries = experts.numel()
    capacity = min(entries * block_m, (entries + num_experts * (block_m - 1)) // block_m * block_m)
    if not (experts.is_contiguous() and weights.is_contiguous()):
        raise ValueError(f"experts {experts.stride()} or weights {weights.stride()} have gaps")
    if capacity > _MAX_PLACES:
        raise ValueError(f"{capacity} places exceed {_MAX_PLACES}")

    def integers(*shape: int) -> Tensor:
        return experts.new_empty(shape, dtype=torch.int32)

    out = Sorted(
        integers(capacity),
        weights.new_empty(capacity, dtype=torch.float32),
        integers(capacity // block_m),
        integers(num_experts),
        integers(1),
    )
    kernels = _kernels(experts, weights, num_experts, block_m)
    blocks = kernels.place.grid[0]
    chunk_counts = None
    if kernels.count is not None:
        chunk_counts = integers(blocks, num_experts)
        kernels.count.launch((blocks, 1), kernels.count.threads, 0, experts, chunk_counts, entries)
    sizes = (entries, blocks, blocks, capacity)
    place = kernels.place
    place.launch((blocks, 1), place.threads, 0, experts, weights, chunk_counts, *out, *sizes)
    return tuple(out)


class Sorted(NamedTuple):
    """What `moe_sort` returns."""

    sorted_entries: Tensor
    sorted_weights: Tensor
    block_experts: Tensor
    counts: Tensor
    num_sorted: Tensor


class _Kernels(NamedTuple):
    count: LaunchPlan | None
    place: LaunchPlan


_KERNELS: dict[object, _Kernels] = {}


def _kernels(experts: Tensor, weights: Tensor, num_experts: int, block_m: int) -> _Kernels:
    """One launch where all entries are one chunk, else one that counts and one that places."""
    arch, entries = arch_name(experts.device), experts.numel()
    style = (experts.dtype, weights.dtype, num_experts, block_m, entries <= ONE_CHUNK)
    key = (arch, experts.device.type, style, entries)
    found = _KERNELS.get(key)
    if found is None:
        single = style[-1]
        blocks = PADDING_BLOCKS if single else -(-entries // CHUNK)

        def plan(kernel: str) -> LaunchPlan:
            variant = SortVariant(kernel, *style)
            launch = load_kernel(variant, arch, experts.device.type).launch
            return LaunchPlan(launch, (blocks, 1), variant.threads, (), ())

        count = None if single else plan("moe_count_kernel")
        found = _KERNELS[key] = _Kernels(count, plan("moe_place_kernel"))
    return found
