"""The launcher where there is no C compiler: launcher.c, line for line in what it checks."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

_CPU_DEVICE = -1  # what Tensor.get_device() says for a CPU tensor
_MAX_DEVICES = 64
_TENSOR_MAP_BYTES, _TENSOR_MAP_ALIGN = 128, 64
_MAPPED_ALIGN = 16  # of the tensor behind a map
_FORMATS = {"p": "Q", "i": "i", "l": "q", "f": "f", "d": "d", "m": f"{_TENSOR_MAP_BYTES}s"}
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
)
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_GET_DEVICE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))
_REPLACE_ADDRESS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 6),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


_LAUNCH_EARLY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(LaunchConfig), *[ctypes.c_void_p] * 3)

# name, letter, dtype or None, alignment and offset in bytes
Described = tuple[str, str, Any, int, int]
Sizes = int | tuple[int, ...]
# offset of a tensor map in the buffer, and the address that it is to have
Moved = list[tuple[int, int]]


class CtypesLauncher:
    """Checks, packs and launches one kernel; see `Launcher` in launcher.c."""

    def __init__(
        self,
        name: str,
        parameters: tuple[Described, ...],
        max_grid: tuple[int, int, int],
        max_items_x: int,
        max_threads: int,
        max_shared_bytes: int,
        launch_address: int,
        early_address: int,
        device_address: int,
        replace_address: int,
        end_marker: int,
        load: Callable[[int], int],
        stream_of: Callable[[int], int],
        enter: Callable[[int], int],
        fail: Callable[[int], None],
    ) -> None:
        self._name = name
        self._parameters = parameters
        self._buffer_bytes = max(map(_end, parameters), default=0)
        self._max_grid = max_grid
        self._max_items_x = max_items_x
        self._max_threads = max_threads
        self._max_shared_bytes = max_shared_bytes
        self._launch = _LAUNCH(launch_address)
        self._launch_early = _LAUNCH_EARLY(early_address) if early_address else None
        self._get_device = _GET_DEVICE(device_address) if device_address else None
        self._replace_address = _REPLACE_ADDRESS(replace_address) if replace_address else None
        self._end_marker = end_marker
        self._load = load
        self._stream_of = stream_of
        self._enter = enter
        self._fail = fail
        self._functions: dict[int, int] = {}

    def __call__(self, grid: Sizes, block: Sizes, shared_bytes: int, *arguments: Any) -> None:
        """Launch on the device of the tensors, on the caller's current stream.

        Raises:
            ValueError: for a size beyond the chip's limits, a tensor on the wrong device, of the
                wrong dtype or misaligned, or a number that does not fit its parameter.
            TypeError: for too few or too many arguments, or something that is no tensor.
            RuntimeError: if the runtime library refuses the launch.
        """
        if len(arguments) != len(self._parameters):
            count = len(self._parameters)
            raise TypeError(
                f"{self._name} takes {count} arguments after grid, block and shared_bytes"
            )
        grids, blocks = self._sizes("grid", grid), self._sizes("block", block)
        self._check_sizes(grids, blocks, shared_bytes)
        buffer = bytearray(self._buffer_bytes)
        device: int | None = None
        moved: Moved = []
        for described, given in zip(self._parameters, arguments, strict=True):
            letter, offset = described[1].lower(), described[4]
            value: int | float | bytes
            if letter == "p":
                device, value = self._address(described, given, device)
            elif letter == "m":
                device, value, address = self._tensor_map(described, given, device)
                moved += [(offset, address)] if address else []
            else:
                value = self._number(described, given)
            struct.pack_into(_FORMATS[letter], buffer, offset, value)
        self._launch_in_context(device, (*grids, *blocks, shared_bytes), buffer, moved)

    def _sizes(self, what: str, given: Sizes) -> tuple[int, int, int]:
        sizes = given if isinstance(given, tuple) else (given,)
        if not 1 <= len(sizes) <= 3:
            raise ValueError(f"{self._name}: {what} {given} has {len(sizes)} sizes, not 1 to 3")
        if min(sizes) < 1:
            raise ValueError(f"{self._name}: {what} {given} is not positive")
        x, y, z = (*sizes, 1, 1)[:3]
        return x, y, z

    def _check_sizes(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int
    ) -> None:
        shape = "{} x {} x {}".format
        if block[0] * block[1] * block[2] > self._max_threads:
            raise ValueError(
                f"{self._name}: a block of {shape(*block)} threads exceeds {self._max_threads}"
            )
        if any(size > limit for size, limit in zip(grid, self._max_grid, strict=True)):
            limits = shape(*self._max_grid)
            raise ValueError(f"{self._name}: a grid of {shape(*grid)} exceeds {limits}")
        if self._max_items_x and grid[0] * block[0] > self._max_items_x:
            raise ValueError(
                f"{self._name}: {grid[0]} blocks of {block[0]} threads exceed "
                f"{self._max_items_x} work items"
            )
        if shared_bytes > self._max_shared_bytes:
            raise ValueError(
                f"{self._name}: {shared_bytes} bytes of dynamic shared memory exceed "
                f"{self._max_shared_bytes}"
            )

    def _address(
        self, described: Described, given: Any, common: int | None
    ) -> tuple[int | None, int]:
        """The device common to all tensors so far, and the address of this one."""
        if given is None and described[1] == "P":
            return common, 0
        return self._address_of(described, given, described[3], common)

    def _address_of(
        self, described: Described, given: Any, align: int, common: int | None, offset: int = 0
    ) -> tuple[int, int]:
        name, dtype = described[0], described[2]
        if not hasattr(given, "get_device"):
            raise TypeError(f"{self._name}: {name} is {type(given).__name__}, not a tensor")
        device: int = given.get_device()
        if device != common:
            self._check_device(name, device, common)
        if dtype is not None and given.dtype != dtype:
            raise ValueError(f"{self._name}: {name} is {given.dtype!r}; the kernel takes {dtype!r}")
        address: int = given.data_ptr() + offset
        if address % align:
            raise ValueError(
                f"{self._name}: {name} lies at an address that is not a multiple of {align} bytes"
            )
        return device, address

    def _check_device(self, name: str, device: int, common: int | None) -> None:
        if device == _CPU_DEVICE and self._get_device is not None:
            raise ValueError(f"{self._name}: {name} is on the CPU; the kernel runs on a GPU")
        if device != _CPU_DEVICE and self._get_device is None:
            raise ValueError(
                f"{self._name}: {name} is on device {device}; the kernel runs on the CPU"
            )
        if common is not None:
            raise ValueError(
                f"{self._name}: {name} is on device {device}, the arguments before it on device "
                f"{common}"
            )

    def _tensor_map(
        self, described: Described, given: Any, common: int | None
    ) -> tuple[int | None, bytes, int]:
        """The device common to all tensors so far, the map, and the address it is for, or 0."""
        name, pair = described[0], None
        if self._replace_address and isinstance(given, tuple) and len(given) == 3:
            given, *pair = given
        if not isinstance(given, bytes):
            kind = type(given).__name__
            raise TypeError(f"{self._name}: {name} is {kind}, not the bytes of a tensor map")
        if len(given) != _TENSOR_MAP_BYTES:
            raise ValueError(
                f"{self._name}: {name} has {len(given)} bytes; a tensor map has {_TENSOR_MAP_BYTES}"
            )
        if pair is None:
            return common, given, 0
        device, address = self._address_of(described, pair[0], _MAPPED_ALIGN, common, pair[1])
        return device, given, address

    def _number(self, described: Described, given: Any) -> int | float:
        name, letter = described[:2]
        if letter in "fd":
            return float(given)
        value = given.__index__()
        bits = 32 if letter == "i" else 64
        if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
            raise ValueError(f"{self._name}: {name}={given!r} does not fit {bits} bits")
        return int(value)

    def _launch_in_context(
        self, device: int | None, sizes: tuple[int, ...], buffer: bytearray, moved: Moved
    ) -> None:
        """Launch with `device` current, and leave the device as it was."""
        if self._get_device is None:
            return self._launch_on(_CPU_DEVICE, sizes, buffer, moved)
        current = ctypes.c_int(_CPU_DEVICE)
        unknown = self._get_device(current)
        if device is None:
            device = current.value
        if not unknown and current.value == device:
            return self._launch_on(device, sizes, buffer, moved)
        previous = self._enter(device)
        try:
            self._launch_on(device, sizes, buffer, moved)
        finally:
            if previous != device:
                self._enter(previous)
        return None

    def _launch_on(
        self, device: int, sizes: tuple[int, ...], buffer: bytearray, moved: Moved
    ) -> None:
        if not _CPU_DEVICE <= device < _MAX_DEVICES:
            raise ValueError(f"{self._name}: device {device} is outside 0 to {_MAX_DEVICES - 1}")
        if device not in self._functions:
            self._functions[device] = self._load(device)
        stream = self._stream_of(device)
        for offset, address in moved:
            self._move(buffer, offset, address)
        storage = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        base = ctypes.addressof(storage)
        params = (ctypes.c_void_p * len(self._parameters))(*(base + p[4] for p in self._parameters))
        extra = None
        if self._end_marker >= 0:
            size = ctypes.c_size_t(_end(self._parameters[-1]))
            extra = (ctypes.c_void_p * 5)(1, base, 2, ctypes.addressof(size), self._end_marker)
        function = self._functions[device]
        if self._launch_early is None:
            status = self._launch(function, *sizes, stream, None if extra else params, extra)
        else:
            early = LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))
            config = LaunchConfig(sizes[:6], sizes[6], stream, ctypes.pointer(early), 1)
            status = self._launch_early(config, function, params, None)
        if status:
            self._refuse_launch(status)

    def _move(self, buffer: bytearray, offset: int, address: int) -> None:
        """Let the driver set the address of a tensor map, which it does in a context."""
        assert self._replace_address is not None
        storage = ctypes.create_string_buffer(_TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGN)
        aligned = -(-ctypes.addressof(storage) // _TENSOR_MAP_ALIGN) * _TENSOR_MAP_ALIGN
        place = slice(offset, offset + _TENSOR_MAP_BYTES)
        ctypes.memmove(aligned, bytes(buffer[place]), _TENSOR_MAP_BYTES)
        if status := self._replace_address(aligned, address):
            self._refuse_launch(status)
        buffer[place] = ctypes.string_at(aligned, _TENSOR_MAP_BYTES)

    def _refuse_launch(self, status: int) -> None:
        self._fail(status)
        raise RuntimeError(f"{self._name}: launch status {status}")


def _end(described: Described) -> int:
    """Bytes of the argument buffer up to the end of this parameter."""
    _, letter, _, _, offset = described
    return offset + struct.calcsize(_FORMATS[letter.lower()])
