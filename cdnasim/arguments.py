"""Pack kernel arguments into the layout that the kernel's own metadata declares."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INTEGER_FORMS = {1: "b", 2: "h", 4: "i", 8: "q"}
FLOAT_FORMS = {4: "f", 8: "d"}
POINTER_KINDS = ("global_buffer", "dynamic_shared_pointer")

Extent = tuple[int, int]  # first byte, one past the last byte


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Launch geometry: workgroups per axis, work-items per workgroup and axis."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]


def is_tensor(value: Any) -> bool:
    """A torch tensor or numpy array, by duck typing."""
    return hasattr(value, "data_ptr") or hasattr(value, "__array_interface__")


def extent(tensor: Any) -> Extent:
    """The bytes that a torch tensor or numpy array spans, strides included.

    Raises:
        ValueError: a tensor that is not in host memory.
    """
    if hasattr(tensor, "data_ptr"):
        device = str(getattr(tensor, "device", "cpu"))
        if device != "cpu":
            raise ValueError(f"the simulator reads host memory, the tensor is on {device}")
        start, size = int(tensor.data_ptr()), int(tensor.element_size())
        shape, strides = tuple(tensor.shape), tuple(stride * size for stride in tensor.stride())
    else:
        start, _ = tensor.__array_interface__["data"]
        size, shape, strides = tensor.itemsize, tensor.shape, tensor.strides
    if 0 in shape:
        return start, start
    reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    first = start + sum(step for step in reach if step < 0)
    return first, start + sum(step for step in reach if step > 0) + size


def address(tensor: Any) -> int:
    """The address of the first element."""
    if hasattr(tensor, "data_ptr"):
        return int(tensor.data_ptr())
    return int(tensor.__array_interface__["data"][0])


def pack_value(value: Any, size: int, position: int) -> bytes:
    """One by-value argument as `size` bytes.

    Raises:
        ValueError: a value that does not fit, or whose type says nothing of its encoding.
    """
    if isinstance(value, bytes):
        packed = value
    elif isinstance(value, float) and size in FLOAT_FORMS:
        packed = struct.pack("<" + FLOAT_FORMS[size], value)
    elif isinstance(value, int) and size in INTEGER_FORMS:
        bits = 8 * size
        if not -(1 << (bits - 1)) <= value < 1 << bits:
            raise ValueError(f"argument {position} is {value}, which does not fit {bits} bits")
        packed = (value & ((1 << bits) - 1)).to_bytes(size, "little")
    elif hasattr(value, "tobytes"):
        packed = value.tobytes()
    else:
        raise ValueError(
            f"argument {position} is a {type(value).__name__}, "
            f"the kernel expects {size} bytes by value"
        )
    if len(packed) != size:
        raise ValueError(f"argument {position} has {len(packed)} bytes, the kernel expects {size}")
    return packed


def hidden_value(kind: str, geometry: Geometry, shared_bytes: int) -> int | None:
    """The value of a hidden argument, None for those that stay zero (buffers of the runtime)."""
    axis = "xyz".index(kind[-1]) if kind[-1] in "xyz" else 0
    values: dict[str, int] = {
        "hidden_block_count": geometry.grid[axis],
        "hidden_group_size": geometry.block[axis],
        "hidden_remainder": 0,
        "hidden_global_offset": 0,
    }
    if kind == "hidden_grid_dims":
        return 3 if geometry.grid[2] > 1 else 2 if geometry.grid[1] > 1 else 1
    if kind == "hidden_dynamic_lds_size":
        return shared_bytes
    return values.get(kind[:-2])


def pack(
    declared: Sequence[Mapping[str, Any]],
    values: Sequence[Any],
    size: int,
    geometry: Geometry,
    shared_bytes: int,
    locate: Callable[[Any], int],
) -> bytes:
    """The kernarg segment, `size` bytes.

    Args:
        declared: the `.args` of the kernel's metadata.
        values: one per explicit argument; None is a null pointer, and trailing pointers that are
            left out are null too.
        locate: tensor → the address that the kernel sees.

    Raises:
        ValueError: too many or too few values, or one that does not match its declaration.
    """
    segment = bytearray(size)
    explicit = [a for a in declared if not str(a[".value_kind"]).startswith("hidden_")]
    missing = explicit[len(values) :]
    if len(values) > len(explicit) or any(a[".value_kind"] not in POINTER_KINDS for a in missing):
        raise ValueError(f"{len(values)} arguments were given, the kernel takes {len(explicit)}")
    for position, (argument, value) in enumerate(zip(explicit, values, strict=False)):
        start, width = argument[".offset"], argument[".size"]
        if argument[".value_kind"] in POINTER_KINDS:
            pointer = 0 if value is None else locate(value) if is_tensor(value) else value
            if not isinstance(pointer, int):
                raise ValueError(f"argument {position} is a pointer, not {type(value).__name__}")
            value = pointer
        elif is_tensor(value) and not hasattr(value, "tobytes"):
            raise ValueError(f"argument {position} is {width} bytes by value, a tensor was given")
        segment[start : start + width] = pack_value(value, width, position)
    for argument in declared:
        hidden = hidden_value(str(argument[".value_kind"]), geometry, shared_bytes)
        if str(argument[".value_kind"]).startswith("hidden_") and hidden is not None:
            start, width = argument[".offset"], argument[".size"]
            segment[start : start + width] = hidden.to_bytes(width, "little")
    return bytes(segment)
