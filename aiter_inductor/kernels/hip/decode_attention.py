"""The variants of decode_attention.hip: one token a sequence, cached tokens split among waves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aiter_inductor.core.arch import KNOWN
from aiter_inductor.core.dtypes import ROW_DTYPES
from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import KernelSignature, Parameter, f32, i32, i64, pointer
from aiter_inductor.kernels.hip.loading import CPP_TYPES, hip_module, wave_size

VECTOR_BYTES = 16
MAX_CACHE_BYTES = VECTOR_BYTES * 2**32
_LEAST_VALUE_BYTES = 4
_TILE_BYTES, _MOST_WAVES = 16384, 4
_COLUMNS = {32: 8, 64: 16}
LENGTHS_THREADS = 256
_MASK_TYPES = {torch.bool: "u8", **{dtype: CPP_TYPES[dtype] for dtype in ROW_DTYPES}}


def _eights(vectors: int) -> int:
    return -(-vectors // 8) * 8


@dataclass(frozen=True)
class DecodeStyle:
    """What is compiled in.

    Attributes:
        dtype: of queries and results, bf16 or fp16.
        cache_dtype: of keys and values.
        head_dim, v_head_dim: elements of a key and of a value.
        group: query heads that share a head of keys.
        page_size: tokens of a page; None for rows of tokens without a table.
        packed: the layout is `packed`, else `paged`.
        softcap: scores are capped.
        mask_dtype: of a mask over tokens, or None.
    """

    dtype: torch.dtype
    cache_dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    group: int
    page_size: int | None
    packed: bool
    softcap: bool
    mask_dtype: torch.dtype | None = None

    @property
    def pack(self) -> int:
        """Elements of the cache in 16 bytes."""
        return VECTOR_BYTES // self.cache_dtype.itemsize

    def value_vec(self, wave: int) -> int:
        """Elements of a value in the paged layout that a lane reads at once."""
        vec, least = self.pack, max(_LEAST_VALUE_BYTES // self.cache_dtype.itemsize, 2)
        while vec > least and vec * wave // 4 > self.v_head_dim:
            vec //= 2
        return vec

    def tile_bytes(self, tile: int) -> int:
        """Shared memory of a tile on NVIDIA, as decode_shared.h and decode_packed.h count it."""
        if self.packed:
            packs = tile * (self.head_dim // self.pack) + 4 * -(-self.v_head_dim // 16) * 16
            return (packs + 1) * VECTOR_BYTES
        keys = tile * _eights(-(-self.head_dim // (4 * self.pack)) * 4)
        values = tile * _eights(self.v_head_dim // self.pack)
        return (keys + values) * VECTOR_BYTES


@dataclass(frozen=True)
class DecodeConfig:
    """How the chip is filled.

    Attributes:
        tile: tokens that a wave attends to at a time.
        stages: tiles that it has under way; one on AMD, where registers hold them.
        waves: of a block.
        blocks: of a compute unit.
        least_tiles: of a wave, as far as there are fewer than waves.
    """

    tile: int
    stages: int
    waves: int
    blocks: int = 1
    least_tiles: int = 2

    @classmethod
    def default(cls, arch: str, style: DecodeStyle) -> DecodeConfig:
        """Tiles of about 16 KiB, as many under way as the chip has shared memory for.

        On AMD 32 tokens in vLLM's layout, which leave each SIMD two waves: 232 registers of 512.
        """
        on_amd = wave_size(arch) == 64
        token_bytes = (style.head_dim + style.v_head_dim) * style.cache_dtype.itemsize
        tile = min(max(_TILE_BYTES // token_bytes // 32 * 32, 32), 32 if on_amd else 64)
        if style.packed:
            tile = 4 * style.pack
        if on_amd:
            return cls(tile, 1, 4, blocks=2)
        room = KNOWN[arch].lds_bytes // style.tile_bytes(tile)
        waves = max(min(room // 2, _MOST_WAVES), 1)
        return cls(tile, max(min(room // waves, 4), 2), waves)


@dataclass(frozen=True)
class AttendVariant:
    """One compilation of decode_attention.hip."""

    style: DecodeStyle
    config: DecodeConfig
    wave: int

    @property
    def head_blocks(self) -> int:
        """Blocks of query heads that a wave has."""
        return 2 if self.wave == 32 and self.style.group > _COLUMNS[self.wave] else 1

    @property
    def units(self) -> int:
        """Waves that share a head of keys because its query heads are too many for one."""
        return -(-self.style.group // (self.head_blocks * _COLUMNS[self.wave]))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        if self.wave == 64:
            return 0
        tile_bytes = self.style.tile_bytes(self.config.tile)
        return tile_bytes * self.config.stages * self.config.waves

    def module(self) -> Module:
        """decode_attention.hip with these definitions."""
        style = self.style
        return hip_module(
            "decode_attention",
            "decode_attention.hip",
            Q=CPP_TYPES[style.dtype],
            CACHE=CPP_TYPES[style.cache_dtype],
            D=style.head_dim,
            DV=style.v_head_dim,
            GROUP=style.group,
            HEAD_BLOCKS=self.head_blocks,
            PAGE=style.page_size or 1,
            DENSE=style.page_size is None,
            PACKED=style.packed,
            SOFTCAP=style.softcap,
            MASKED=style.mask_dtype is not None,
            MASK=_MASK_TYPES[style.mask_dtype or torch.bool],
            VALUE_VEC=style.value_vec(self.wave),
            TILE=self.config.tile,
            STAGES=self.config.stages,
            BLOCK_WAVES=self.config.waves,
            LEAST_TILES=self.config.least_tiles,
        )

    def signature(self) -> KernelSignature:
        """decode_attend's parameters."""
        dtype, fp32, ints = self.style.dtype, torch.float32, torch.int32
        return KernelSignature(
            "decode_attend",
            (
                Parameter("q", "pointer", dtype, align=8),
                Parameter("keys", "pointer", self.style.cache_dtype, align=VECTOR_BYTES),
                Parameter("values", "pointer", self.style.cache_dtype, align=VECTOR_BYTES),
                pointer("tables", ints, optional=True),
                pointer("lengths", ints, optional=True),
                pointer("key_scale", fp32, optional=True),
                pointer("value_scale", fp32, optional=True),
                pointer("sinks", dtype, optional=True),
                pointer("mask", self.style.mask_dtype, optional=True),
                pointer("out", dtype),
                pointer("workspace", fp32, align=VECTOR_BYTES),
                f32("scale"),
                f32("softcap"),
                *(i32(n) for n in ("num_seqs", "longest", "window", "num_kv_heads", "ranges")),
                *(i64(n) for n in ("q_seq", "q_head", "tables_seq", "mask_seq", "mask_token")),
                *(i64(n) for n in ("key_head", "value_head")),
                *(i32(n) for n in ("key_page", "key_token", "key_chunk")),
                *(i32(n) for n in ("value_page", "value_token", "value_chunk")),
            ),
            waits=True,
        )


@dataclass(frozen=True)
class ReduceVariant:
    """One compilation of decode_reduce.hip; `waves` of a block share a sequence's parts."""

    style: DecodeStyle
    config: DecodeConfig
    num_heads: int
    waves: int

    def module(self) -> Module:
        """decode_reduce.hip with these definitions."""
        return hip_module(
            "decode_reduce",
            "decode_reduce.hip",
            Q=CPP_TYPES[self.style.dtype],
            DV=self.style.v_head_dim,
            HEADS=self.num_heads,
            BLOCK_WAVES=self.waves,
            TILE=self.config.tile,
            DENSE=self.style.page_size is None,
            LEAST_TILES=self.config.least_tiles,
        )

    def signature(self) -> KernelSignature:
        """decode_reduce's parameters."""
        fp32, ints = torch.float32, torch.int32
        return KernelSignature(
            "decode_reduce",
            (
                pointer("workspace", fp32, align=VECTOR_BYTES),
                pointer("lengths", ints, optional=True),
                pointer("sinks", self.style.dtype, optional=True),
                pointer("out", self.style.dtype),
                *(i32(n) for n in ("num_seqs", "longest", "window", "ranges")),
            ),
            waits=True,
        )


@dataclass(frozen=True)
class LengthsVariant:
    """One compilation of decode_lengths.hip."""

    mask_dtype: torch.dtype

    def module(self) -> Module:
        """decode_lengths.hip with these definitions."""
        mask = _MASK_TYPES[self.mask_dtype]
        return hip_module(
            "decode_lengths", "decode_lengths.hip", MASK=mask, THREADS=LENGTHS_THREADS
        )

    def signature(self) -> KernelSignature:
        """decode_lengths's parameters."""
        mask, lengths = pointer("mask", self.mask_dtype), pointer("lengths", torch.int32)
        strides = i64("mask_seq"), i64("mask_token")
        parameters = mask, lengths, i32("longest"), *strides
        return KernelSignature("decode_lengths", parameters, waits=True)


@dataclass(frozen=True)
class CacheView:
    """Keys or values as a wave addresses them; strides in elements.

    Attributes:
        tensor: the cache.
        page: between pages, or between sequences where there is no table.
        token: between tokens of a page, or between packs of tokens of packed values.
        head: between heads.
        chunk: between packs of elements of packed keys, or elements of packed values; else 0.
    """

    tensor: Tensor
    page: int
    token: int
    head: int
    chunk: int

    def in_vectors(self) -> tuple[int, int, int]:
        """`page`, `token` and `chunk` as the kernel takes them."""
        return self.vectors(self.page), self.vectors(self.token), self.vectors(self.chunk)

    def vectors(self, stride: int) -> int:
        """A stride in vectors of 16 bytes.

        Raises:
            ValueError: if it is no whole number of them, or more than 32 bits hold.
        """
        size = stride * self.tensor.element_size()
        if size % VECTOR_BYTES:
            raise ValueError(f"a stride of {size} bytes is no multiple of {VECTOR_BYTES}")
        if not 0 <= size // VECTOR_BYTES < 2**31:
            raise ValueError(f"a stride of {size} bytes is outside 0 to {VECTOR_BYTES * 2**31}")
        return size // VECTOR_BYTES
