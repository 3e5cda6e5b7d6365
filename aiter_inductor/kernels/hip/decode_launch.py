"""Launches of decode_attention.hip, prepared once for all calls that differ in addresses only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aiter_inductor.core.arch import KNOWN, arch_of
from aiter_inductor.kernels.hip.decode_attention import (
    LENGTHS_THREADS,
    AttendVariant,
    CacheView,
    DecodeConfig,
    DecodeStyle,
    LengthsVariant,
    ReduceVariant,
)
from aiter_inductor.kernels.hip.loading import Variant, arch_name, load_kernel, wave_size
from aiter_inductor.kernels.prepared import Plans, facts_of, same_memory

_REDUCE_WAVES, _MOST_REDUCE_WAVES = 4, 16
_MANY_PARTS = 8
_QUERY_VECTOR = 4


class DecodeTensors(NamedTuple):
    """What the kernel reads.

    Attributes:
        q: [num_seqs, num_heads, head_dim], or with one token a sequence between the last two.
        keys, values: the cache.
        tables: [num_seqs, max_pages], int32; None where pages are sequences.
        lengths: [num_seqs], int32; None where all sequences have as many tokens.
        key_scale, value_scale: one number, or None.
        sinks: [num_heads], dtype of q, or None.
        mask: over tokens, True where one is seen or added to scores, or None.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor | None
    lengths: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None


class DecodeHow(NamedTuple):
    """What else shapes a launch.

    Attributes:
        layout: `paged`, `packed` or `transposed`; `rows` of tokens without a table.
        window: the last so many tokens are seen; 0 for all.
        softcap: whether scores are capped.
        config: None for the default.
    """

    layout: str
    window: int
    softcap: bool
    config: DecodeConfig | None = None


@dataclass(frozen=True)
class Described:
    """A call in the kernel's terms.

    Attributes:
        taken: the tensors as the kernel takes them; some may be copies.
        style: what is compiled in.
        num_kv_heads: heads of keys.
        keys, values: how the cache is addressed.
        longest: tokens of the longest sequence; read where there are no lengths.
        mask_strides: between sequences and between tokens.
    """

    taken: DecodeTensors
    style: DecodeStyle
    num_kv_heads: int
    keys: CacheView
    values: CacheView
    longest: int
    mask_strides: tuple[int, int] = (0, 0)


Describe = Callable[[DecodeTensors, DecodeHow], Described]


def decode(
    given: DecodeTensors, how: DecodeHow, describe: Describe, *, scale: float, softcap: float
) -> Tensor:
    """Attend from each query.

    Args:
        describe: says what `given` are to the kernel; it reads facts only.

    Returns:
        As q, with the elements of a value for those of a key.

    Raises:
        ValueError: for strides or sizes that the kernel does not take.
    """
    key = describe, how, facts_of(*given)
    plan = _PLANS.get(key) or _PLANS.keep(key, DecodePlan.of(given, how, describe))
    if plan.copies:
        given = describe(given, how).taken
    return plan.run(given, scale, softcap)


def readable_queries(q: Tensor) -> Tensor:
    """Copied where the kernel cannot load four elements of a head at once."""
    strides = q.stride()[:2]
    whole = all(stride % _QUERY_VECTOR == 0 for stride in strides)
    if q.stride(-1) == 1 and whole and q.data_ptr() % (_QUERY_VECTOR * q.element_size()) == 0:
        return q
    return q.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class DecodePlan:
    """All of a call but its addresses and its scales.

    Attributes:
        out_shape: of the result.
        workspace: floats that waves leave for the reduction.
        copies: whether the kernel takes copies of some tensors.
        lengths: the launch that reads them off a mask, and how many; None without a mask.
        attend, reduce: the two launches; None where there are no sequences.
        attend_numbers, reduce_numbers: their last arguments.
    """

    out_shape: tuple[int, ...]
    workspace: int = 0
    copies: bool = False
    lengths: tuple[Callable[..., None], int] | None = None
    attend: Callable[..., None] | None = None
    reduce: Callable[..., None] | None = None
    attend_numbers: tuple[int, ...] = ()
    reduce_numbers: tuple[int, ...] = ()

    @classmethod
    def of(cls, given: DecodeTensors, how: DecodeHow, describe: Describe) -> DecodePlan:
        """The plan of all calls with these facts."""
        call = describe(given, how)
        q, style = call.taken.q, call.style
        num_seqs, num_heads = q.shape[:2]
        out_shape = (*q.shape[:-1], style.v_head_dim)
        if num_seqs == 0:
            return cls(out_shape)
        arch = arch_name(q.device)
        config = how.config or DecodeConfig.default(arch, style)
        attend = AttendVariant(style, config, wave_size(arch))
        heads = call.num_kv_heads * attend.units
        waves = _compute_units(arch, q.device) * config.blocks * config.waves
        ranges = max(waves // heads, 1)
        blocks = -(-ranges * heads // config.waves)
        many = ranges >= _MANY_PARTS * num_seqs
        reduce_waves = _MOST_REDUCE_WAVES if many else _REDUCE_WAVES
        reduce = ReduceVariant(style, config, num_heads, reduce_waves)
        longest = num_seqs, call.longest, how.window
        tables = call.taken.tables
        strides = *q.stride()[:2], 0 if tables is None else tables.stride(0), *call.mask_strides
        views = call.keys, call.values
        return cls(
            out_shape,
            2 * ranges * num_heads * (style.v_head_dim + 1) + num_seqs + 1,
            not same_memory(given, call.taken),
            _reading_lengths(call),
            _launch(attend, q, blocks, config.waves * attend.wave, attend.shared_bytes),
            _launch(reduce, q, num_seqs * num_heads, reduce_waves * attend.wave, 0),
            (
                *(*longest, call.num_kv_heads, ranges, *strides, *(view.head for view in views)),
                *(size for view in views for size in view.in_vectors()),
            ),
            (*longest, ranges),
        )

    def run(self, taken: DecodeTensors, scale: float, softcap: float) -> Tensor:
        """Launch for tensors of the plan's facts; `taken` are copies where it says so."""
        q = taken.q
        out = q.new_empty(self.out_shape)
        if self.attend is None or self.reduce is None:
            return out
        workspace = q.new_empty(self.workspace, dtype=torch.float32)
        lengths = taken.lengths
        if self.lengths is not None:
            read, num_seqs = self.lengths
            lengths = q.new_empty(num_seqs, dtype=torch.int32)
            read(taken.mask, lengths)
        self.attend(
            *(q, taken.keys, taken.values, taken.tables, lengths, taken.key_scale),
            *(taken.value_scale, taken.sinks, taken.mask, out, workspace, scale, softcap),
            *self.attend_numbers,
        )
        self.reduce(workspace, lengths, taken.sinks, out, *self.reduce_numbers)
        return out


_PLANS = Plans[DecodePlan]()


def _launch(
    variant: Variant, like: Tensor, blocks: int, threads: int, shared_bytes: int
) -> Callable[..., None]:
    kernel = load_kernel(variant, arch_name(like.device), like.device.type)
    return partial(kernel.launch, (blocks, 1), threads, shared_bytes)


def _reading_lengths(call: Described) -> tuple[Callable[..., None], int] | None:
    """What finds the last token that a mask shows of each sequence."""
    mask = call.taken.mask
    if mask is None:
        return None
    num_seqs = call.taken.q.shape[0]
    launch = _launch(LengthsVariant(mask.dtype), mask, num_seqs, LENGTHS_THREADS, 0)

    def read(mask: Tensor, lengths: Tensor) -> None:
        launch(mask, lengths, call.longest, *call.mask_strides)

    return read, num_seqs


def _compute_units(arch: str, device: torch.device) -> int:
    if device.type == "cuda":
        return arch_of(device).compute_units
    return KNOWN[arch].compute_units if arch in KNOWN else 1
