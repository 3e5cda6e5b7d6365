"""Decode MessagePack, the format of the metadata note in AMD code objects."""

from __future__ import annotations

import struct
from typing import Any

_FIXED = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_STRING_LENGTHS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_BYTES_LENGTHS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_ARRAY_LENGTHS = {0xDC: ">H", 0xDD: ">I"}
_MAP_LENGTHS = {0xDE: ">H", 0xDF: ">I"}


def decode(content: bytes) -> Any:
    """The first value in `content`; bytes after it are ignored.

    Raises:
        struct.error, IndexError: if the value is cut off.
        KeyError: for an extension type, which code objects do not use.
    """
    return _Decoder(content).value()


class _Decoder:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def value(self) -> Any:
        tag = self._number(">B")
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 0x100
        if tag < 0x90:
            return self._map(tag & 0x0F)
        if tag < 0xA0:
            return self._array(tag & 0x0F)
        if tag < 0xC0:
            return self._bytes(tag & 0x1F).decode()
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _FIXED:
            return self._number(_FIXED[tag])
        if tag in _STRING_LENGTHS:
            return self._bytes(self._number(_STRING_LENGTHS[tag])).decode()
        if tag in _BYTES_LENGTHS:
            return self._bytes(self._number(_BYTES_LENGTHS[tag]))
        if tag in _ARRAY_LENGTHS:
            return self._array(self._number(_ARRAY_LENGTHS[tag]))
        return self._map(self._number(_MAP_LENGTHS[tag]))

    def _number(self, layout: str) -> Any:
        (number,) = struct.unpack_from(layout, self._content, self._at)
        self._at += struct.calcsize(layout)
        return number

    def _bytes(self, size: int) -> bytes:
        taken = self._content[self._at : self._at + size]
        if len(taken) < size:
            raise IndexError(f"{size} bytes wanted at {self._at}, {len(taken)} left")
        self._at += size
        return taken

    def _array(self, size: int) -> list[Any]:
        return [self.value() for _ in range(size)]

    def _map(self, size: int) -> dict[Any, Any]:
        return {self.value(): self.value() for _ in range(size)}
