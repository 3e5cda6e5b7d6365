"""What a kernel takes, declared once: packed by the launcher, printed in refusals."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# kind: letter in the launcher's format, size and alignment in bytes
_KINDS = {
    "pointer": ("p", 8, 8),
    "i32": ("i", 4, 4),
    "i64": ("l", 8, 8),
    "f32": ("f", 4, 4),
    "f64": ("d", 8, 8),
    "tensor_map": ("m", 128, 64),
}


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter.

    Attributes:
        name: as refusals call it.
        kind: `pointer`, `i32`, `i64`, `f32`, `f64` or `tensor_map`.
        dtype: of the tensor behind a pointer; None takes any.
        optional: whether None may be passed, as a null pointer.
        align: bytes to which a pointer must be aligned.
    """

    name: str
    kind: str
    dtype: torch.dtype | None = None
    optional: bool = False
    align: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"{self.name} is of kind {self.kind!r}; kinds are {', '.join(_KINDS)}")
        if self.align & (self.align - 1) or self.align < 1:
            raise ValueError(f"{self.name} is aligned to {self.align}, not to a power of two")

    @property
    def letter(self) -> str:
        """The kind as one letter, upper-case where None may be passed."""
        letter = _KINDS[self.kind][0]
        return letter.upper() if self.optional else letter

    @property
    def size_bytes(self) -> int:
        """Bytes it takes in the argument buffer."""
        return _KINDS[self.kind][1]

    @property
    def slot_align(self) -> int:
        """Bytes to which its place in the argument buffer is aligned."""
        return _KINDS[self.kind][2]


@dataclass(frozen=True)
class KernelSignature:
    """A kernel as it is launched.

    Attributes:
        name: its symbol.
        parameters: in order.
        waits: whether the kernel waits by itself for the one before it in its stream before it
            touches memory, as simt.h's `begin` does. Where the chip can, its blocks are then placed
            while that one drains.
    """

    name: str
    parameters: tuple[Parameter, ...]
    waits: bool = False

    @property
    def letters(self) -> str:
        """One letter a parameter, as the launcher reads them."""
        return "".join(parameter.letter for parameter in self.parameters)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each parameter in the argument buffer, laid out as a C struct."""
        offsets, at = [], 0
        for parameter in self.parameters:
            at = -(-at // parameter.slot_align) * parameter.slot_align
            offsets.append(at)
            at += parameter.size_bytes
        return tuple(offsets)

    @property
    def size_bytes(self) -> int:
        """Size of the argument buffer without trailing padding."""
        return self.offsets[-1] + self.parameters[-1].size_bytes if self.parameters else 0


def pointer(
    name: str, dtype: torch.dtype | None = None, *, optional: bool = False, align: int = 1
) -> Parameter:
    """A tensor's address."""
    return Parameter(name, "pointer", dtype, optional, align)


def i32(name: str) -> Parameter:
    """A 32-bit signed integer."""
    return Parameter(name, "i32")


def i64(name: str) -> Parameter:
    """A 64-bit signed integer."""
    return Parameter(name, "i64")


def f32(name: str) -> Parameter:
    """A single-precision number."""
    return Parameter(name, "f32")


def tensor_map_of(name: str) -> Parameter:
    """A TMA descriptor passed by value: `tensor_map(...)`, or that, a tensor and an offset."""
    return Parameter(name, "tensor_map")
