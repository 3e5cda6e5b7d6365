"""Load an AMDGPU code object: segments into memory, symbols, kernel descriptors, metadata."""

from __future__ import annotations

import ctypes
import mmap
import struct
from dataclasses import dataclass
from typing import Any

from cdnasim import msgpack

EM_AMDGPU = 0xE0
PT_LOAD = 1
SHT_NOTE, SHT_DYNSYM, SHT_SYMTAB = 7, 11, 2
NT_AMDGPU_METADATA = 32

USER_SGPRS = (  # kernel descriptor bit, name, registers
    (0, "private_segment_buffer", 4),
    (1, "dispatch_ptr", 2),
    (2, "queue_ptr", 2),
    (3, "kernarg_segment_ptr", 2),
    (4, "dispatch_id", 2),
    (5, "flat_scratch_init", 2),
    (6, "private_segment_size", 1),
)


class CodeObjectError(ValueError):
    """The bytes are not a code object that can be executed; the message says why."""


@dataclass(frozen=True, kw_only=True)
class KernelDescriptor:
    """The 64-byte hardware descriptor of one kernel, decoded.

    Sizes are bytes. `vgprs` counts the whole unified register file of a lane, `accum_offset` is
    where its accumulation registers begin. `user_sgprs` maps the pointers that the command
    processor places in scalar registers to their first register.
    """

    lds_bytes: int
    scratch_bytes: int
    kernarg_bytes: int
    entry: int
    vgprs: int
    accum_offset: int
    float_mode: int
    num_user_sgprs: int
    user_sgprs: dict[str, int]
    group_id_enable: tuple[bool, bool, bool]
    preload_dwords: int
    preload_offset: int

    @property
    def agprs(self) -> int:
        """Accumulation registers of a lane."""
        return max(self.vgprs - self.accum_offset, 0)


@dataclass(frozen=True)
class Symbol:
    """An ELF symbol: address relative to the load base, size in bytes."""

    value: int
    size: int


def decode_descriptor(data: bytes) -> KernelDescriptor:
    """Decode a kernel descriptor (amdhsa_kernel_descriptor_t, gfx90a layout)."""
    lds, scratch, kernarg, _, entry = struct.unpack_from("<IIIIq", data, 0)
    rsrc3, rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIIHH", data, 44)
    user, register = {}, 0
    for bit, name, count in USER_SGPRS:
        if properties >> bit & 1:
            user[name] = register
            register += count
    preload_dwords = preload & 0x7F
    if preload_dwords:
        user["kernarg_preload"] = register
    return KernelDescriptor(
        lds_bytes=lds,
        scratch_bytes=scratch,
        kernarg_bytes=kernarg,
        entry=entry,
        vgprs=((rsrc1 & 0x3F) + 1) * 8,
        accum_offset=((rsrc3 & 0x3F) + 1) * 4,
        float_mode=rsrc1 >> 12 & 0xFF,
        num_user_sgprs=rsrc2 >> 1 & 0x1F,
        user_sgprs=user,
        group_id_enable=(bool(rsrc2 >> 7 & 1), bool(rsrc2 >> 8 & 1), bool(rsrc2 >> 9 & 1)),
        preload_dwords=preload_dwords,
        preload_offset=preload >> 7 & 0x1FF,
    )


class CodeObject:
    """A code object in memory.

    Attributes:
        base, size: where its segments lie in this process, bytes.
        symbols: name → Symbol.
        kernels: kernel name → KernelDescriptor.
        metadata: kernel name → its entry of `amdhsa.kernels`.

    Raises:
        CodeObjectError: not an ELF file for AMDGPU, or cut short.
    """

    def __init__(self, data: bytes) -> None:
        if data[:4] != b"\x7fELF":
            raise CodeObjectError(f"a code object starts with 7f454c46 (ELF), not {data[:4].hex()}")
        if len(data) < 64 or data[18] != EM_AMDGPU:
            raise CodeObjectError("the ELF file is not for AMDGPU (machine 0xe0)")
        try:
            self._load_segments(data)
            self._read_sections(data)
        except (struct.error, IndexError, ValueError) as error:
            raise CodeObjectError(
                f"the code object of {len(data)} bytes is cut short: {error}"
            ) from error
        self.kernels = {
            name[:-3]: decode_descriptor(bytes(self._memory[s.value : s.value + 64]))
            for name, s in self.symbols.items()
            if name.endswith(".kd")
        }

    def _load_segments(self, data: bytes) -> None:
        (offset,) = struct.unpack_from("<Q", data, 32)
        (count,) = struct.unpack_from("<H", data, 56)
        segments = []
        for i in range(count):
            kind, _, at, address, _, in_file, in_memory, _ = struct.unpack_from(
                "<IIQQQQQQ", data, offset + 56 * i
            )
            if kind == PT_LOAD:
                if at + in_file > len(data):
                    raise ValueError(f"a segment ends at byte {at + in_file}")
                segments.append((at, address, in_file, in_memory))
        if not segments:
            raise ValueError("it has no loadable segment (link the relocatable object first)")
        self.size = max(address + in_memory for _, address, _, in_memory in segments)
        self._memory = mmap.mmap(-1, self.size + mmap.PAGESIZE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for at, address, in_file, _ in segments:
            self._memory[address : address + in_file] = data[at : at + in_file]

    def _read_sections(self, data: bytes) -> None:
        (offset,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, offset + size * i) for i in range(count)]
        self.symbols: dict[str, Symbol] = {}
        self.metadata: dict[str, dict[str, Any]] = {}
        for header in headers:
            _, kind, _, _, at, length, link = header[:7]
            if kind in (SHT_DYNSYM, SHT_SYMTAB):
                strings = headers[link][4]
                for i in range(length // 24):
                    name, _, _, _, value, extent = struct.unpack_from("<IBBHQQ", data, at + 24 * i)
                    start = strings + name
                    text = data[start : data.index(b"\0", start)].decode()
                    if text:
                        self.symbols[text] = Symbol(value, extent)
            if kind == SHT_NOTE:
                self._read_note(data[at : at + length])

    def _read_note(self, note: bytes) -> None:
        name_size, content_size, kind = struct.unpack_from("<III", note, 0)
        if kind != NT_AMDGPU_METADATA:
            return
        start = 12 + (name_size + 3) // 4 * 4
        tree = msgpack.unpack(note[start : start + content_size])
        self.metadata = {kernel[".name"]: kernel for kernel in tree.get("amdhsa.kernels", [])}
