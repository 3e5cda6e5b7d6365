"""Code objects: which chip they are for, and which kernels, registers and memory they hold."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aiter_inductor.core.errors import AiterInductorError
from aiter_inductor.core.msgpack import decode

_EM_CUDA, _EM_AMDGPU = 190, 224
_NT_AMDGPU_METADATA = 32
_SHT_PROGBITS, _SHT_SYMTAB, _SHT_NOTE, _SHT_NOBITS = 1, 2, 7, 8
# `.nv.info` is a list of (format, attribute, value); this format carries a sized payload, and this
# attribute a symbol index and its register count.
_NV_SIZED, _NV_REGISTERS = 0x04, 0x2F
# What CUDA 13 counts to a kernel's shared memory beside what it declares: the driver's own part.
_CUDA_13_SHARED_BYTES = 1024
# e_flags: https://llvm.org/docs/AMDGPUUsage.html#amdgpu-ef-amdgpu-mach-table
_AMD_MACHINES = {0x03F: "gfx90a", 0x04C: "gfx942", 0x04F: "gfx950"}


class CodeObjectError(AiterInductorError, ValueError):
    """Bytes that are no code object, or one for another chip."""


@dataclass(frozen=True)
class KernelFacts:
    """What the compiler recorded about one kernel.

    Attributes:
        name: symbol by which it is launched.
        vgprs: vector registers a lane (all registers, on NVIDIA).
        sgprs: scalar registers a wave; 0 on NVIDIA.
        agprs: accumulation registers a lane; 0 on NVIDIA.
        spills: vector and scalar registers spilled; 0 on NVIDIA, whose cubins do not say.
        lds_bytes: shared memory that a workgroup declares.
        scratch_bytes: private memory a lane.
        kernarg_bytes: size of the argument buffer, hidden arguments included; 0 if not recorded.
        max_threads: largest workgroup it was compiled for; 0 if not recorded.
    """

    name: str
    vgprs: int = 0
    sgprs: int = 0
    agprs: int = 0
    spills: int = 0
    lds_bytes: int = 0
    scratch_bytes: int = 0
    kernarg_bytes: int = 0
    max_threads: int = 0


@dataclass(frozen=True)
class CodeObject:
    """A loadable binary, and the facts of its kernels by name."""

    content: bytes
    arch: str
    sha256: str
    kernels: Mapping[str, KernelFacts]

    @classmethod
    def parse(cls, content: bytes, arch: str) -> CodeObject:
        """Read an AMD code object or an NVIDIA cubin and check that it is for `arch`.

        Raises:
            CodeObjectError: if it is truncated, no such file, or for another chip.
        """
        try:
            elf = _Elf(content)
            found, kernels = _amd(elf) if elf.machine == _EM_AMDGPU else _nvidia(elf)
        except (struct.error, IndexError, KeyError, UnicodeDecodeError, StopIteration) as error:
            raise CodeObjectError(
                f"{len(content)} bytes are no whole code object for {arch}: {error}"
            ) from error
        if found != arch:
            raise CodeObjectError(f"the code object is for {found}, not for {arch}")
        return cls(content, arch, hashlib.sha256(content).hexdigest(), kernels)


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


class _Elf:
    """The header and sections of a 64-bit little-endian ELF file."""

    def __init__(self, content: bytes) -> None:
        if content[:6] != b"\x7fELF\x02\x01":
            raise CodeObjectError(
                f"{len(content)} bytes that start {content[:4]!r} are no ELF file"
            )
        self.content = content
        (self.machine,) = struct.unpack_from("<H", content, 18)
        (table,) = struct.unpack_from("<Q", content, 40)
        (self.flags,) = struct.unpack_from("<I", content, 48)
        size, count, names_index = struct.unpack_from("<HHH", content, 58)
        raw = [struct.unpack_from("<IIQQQQIIQQ", content, table + size * i) for i in range(count)]
        names = raw[names_index][4]
        self.sections = [
            _Section(self.text(names + name), kind, offset, length, link)
            for name, kind, _, _, offset, length, link, _, _, _ in raw
        ]
        for section in self.sections:
            if section.kind != _SHT_NOBITS and section.offset + section.size > len(content):
                raise CodeObjectError(
                    f"section {section.name} ends at byte {section.offset + section.size} of a "
                    f"file of {len(content)}"
                )

    def text(self, offset: int) -> str:
        """The NUL-terminated string at `offset`."""
        return self.content[offset:].split(b"\0", 1)[0].decode()

    def notes(self) -> Iterator[tuple[int, bytes]]:
        """Type and description of every note."""
        for section in self.sections:
            at, end = section.offset, section.offset + section.size
            while section.kind == _SHT_NOTE and at < end:
                name_size, size, kind = struct.unpack_from("<III", self.content, at)
                start = at + 12 + _round_up(name_size, 4)
                yield kind, self.content[start : start + size]
                at = start + _round_up(size, 4)


def _amd(elf: _Elf) -> tuple[str, dict[str, KernelFacts]]:
    machine = elf.flags & 0xFF
    arch = _AMD_MACHINES.get(machine, f"AMD machine {machine:#x}")
    for kind, description in elf.notes():
        if kind == _NT_AMDGPU_METADATA:
            metadata = decode(description)
            facts = [_amd_facts(kernel) for kernel in metadata["amdhsa.kernels"]]
            return arch, {kernel.name: kernel for kernel in facts}
    raise CodeObjectError(f"the code object for {arch} has no kernel metadata")


def _amd_facts(kernel: dict[str, Any]) -> KernelFacts:
    return KernelFacts(
        name=kernel[".name"],
        vgprs=kernel[".vgpr_count"],
        sgprs=kernel[".sgpr_count"],
        agprs=kernel.get(".agpr_count", 0),
        spills=kernel.get(".vgpr_spill_count", 0) + kernel.get(".sgpr_spill_count", 0),
        lds_bytes=kernel[".group_segment_fixed_size"],
        scratch_bytes=kernel[".private_segment_fixed_size"],
        kernarg_bytes=kernel[".kernarg_segment_size"],
        max_threads=kernel.get(".max_flat_workgroup_size", 0),
    )


def _nvidia(elf: _Elf) -> tuple[str, dict[str, KernelFacts]]:
    if elf.machine != _EM_CUDA:
        raise CodeObjectError(f"ELF machine {elf.machine} is neither AMD's 224 nor NVIDIA's 190")
    # CUDA 13 moved the chip's number from the lowest byte of the flags to the next one.
    since_cuda_13 = (elf.flags >> 8) & 0xFF
    chip = since_cuda_13 or elf.flags & 0xFF
    kept = _CUDA_13_SHARED_BYTES if since_cuda_13 else 0
    sizes = {section.name: section.size for section in elf.sections}
    registers = _nvidia_registers(elf)
    kernels = {}
    for section in elf.sections:
        if section.kind == _SHT_PROGBITS and section.name.startswith(".text."):
            name = section.name.removeprefix(".text.")
            lds_bytes = max(sizes.get(f".nv.shared.{name}", 0) - kept, 0)
            kernels[name] = KernelFacts(name, vgprs=registers.get(name, 0), lds_bytes=lds_bytes)
    return f"sm_{chip}", kernels


def _nvidia_registers(elf: _Elf) -> dict[str, int]:
    symbols = next(section for section in elf.sections if section.kind == _SHT_SYMTAB)
    strings = elf.sections[symbols.link].offset
    counts = {}
    for section in elf.sections:
        at, end = section.offset, section.offset + section.size
        while section.name == ".nv.info" and at < end:
            layout, attribute, size = struct.unpack_from("<BBH", elf.content, at)
            if (layout, attribute) == (_NV_SIZED, _NV_REGISTERS):
                symbol, count = struct.unpack_from("<II", elf.content, at + 4)
                (name,) = struct.unpack_from("<I", elf.content, symbols.offset + 24 * symbol)
                counts[elf.text(strings + name)] = count
            at += 4 + (size if layout == _NV_SIZED else 0)
    return counts


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
