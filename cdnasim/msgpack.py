"""Decode MessagePack, the format of code object metadata: maps, arrays, strings, integers."""

from __future__ import annotations

import struct
from typing import Any

FIXED = {
    0xCA: ">f", 0xCB: ">d",
    0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
LENGTHS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
COUNTS = {0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def map(self, count: int) -> dict[Any, Any]:
        return {self.value(): self.value() for _ in range(count)}

    def array(self, count: int) -> list[Any]:
        return [self.value() for _ in range(count)]

    def value(self) -> Any:
        tag = self.number(">B")
        if tag < 0x80:
            return tag
        if tag < 0x90:
            return self.map(tag & 15)
        if tag < 0xA0:
            return self.array(tag & 15)
        if tag < 0xC0:
            return self.take(tag & 31).decode()
        if tag >= 0xE0:
            return tag - 256
        if tag in FIXED:
            return self.number(FIXED[tag])
        if tag in LENGTHS:
            content = self.take(self.number(LENGTHS[tag]))
            return content if tag < 0xD0 else content.decode()
        if tag in COUNTS:
            count = self.number(COUNTS[tag])
            return self.array(count) if tag < 0xDE else self.map(count)
        if tag in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[tag]
        raise ValueError(f"MessagePack tag {tag:#x} at byte {self.at - 1} is not used in metadata")


def unpack(data: bytes) -> Any:
    """The value that `data` encodes.

    Raises:
        ValueError: a tag that code object metadata does not use.
    """
    return _Reader(data).value()
