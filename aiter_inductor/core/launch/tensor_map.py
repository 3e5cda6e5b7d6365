"""TMA descriptors of torch tensors, encoded by the CUDA driver and passed to kernels by value.

CUDA driver API, "Tensor Map Object Management".
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.errors import AiterInductorError
from aiter_inductor.core.launch.runtime import CudaRuntime, runtime_of

_BYTES, _ALIGN = 128, 64
NO_MAP = bytes(_BYTES)
"""Where a kernel takes a map that it does not read."""
_STRIDE_ALIGN = 16
_MAX_RANK, _MAX_BOX, _MAX_SIZE = 5, 256, 2**32
_DTYPES = {
    torch.uint8: 0,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.float8_e5m2: 0,
    torch.int32: 3,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_L2_PROMOTION_256 = 3


class TensorMapError(AiterInductorError, ValueError):
    """A tensor that TMA cannot address, or a box that it cannot copy."""


def tensor_map(tensor: Tensor, box: tuple[int, ...], *, swizzle: int = 128) -> bytes:
    """The descriptor by which TMA copies boxes of `tensor` to and from shared memory.

    Coordinates in the kernel count elements, innermost dimension first. A box that reaches beyond
    the tensor reads zeros there and writes nothing. Launchers take the descriptor alone, or with a
    tensor that differs from this one in its address, and an offset into that in bytes. That of a
    meta tensor is empty.

    Args:
        tensor: of rank 1 to 5, its last stride 1, the others multiples of 16 bytes.
        box: elements of one copy along each dimension, 1 to 256.
        swizzle: 0, 32, 64 or 128 bytes, in which the box's rows, no longer than that, are permuted.

    Raises:
        TensorMapError: naming the size, stride or address that TMA does not take.
        RuntimeLibraryError: if there is no CUDA driver.
    """
    if tensor.is_meta:
        return NO_MAP
    return _encoded(
        tensor.get_device(),
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        box,
        swizzle,
    )


@lru_cache(maxsize=8192)
def _encoded(
    device: int,
    address: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> bytes:
    runtime = runtime_of("sm_90")
    if not isinstance(runtime, CudaRuntime):
        raise TensorMapError(f"tensor maps are CUDA's; the runtime is {type(runtime).__name__}")
    previous = runtime.enter(device)  # in a thread without a context the driver encodes nothing
    try:
        return encode(runtime, address, dtype, sizes, strides, box, swizzle)
    finally:
        runtime.enter(previous)


def encode(
    runtime: CudaRuntime,
    address: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> bytes:
    """`tensor_map` of a tensor given by its parts; strides are in elements."""
    reason = _unsupported(address, dtype, sizes, strides, box, swizzle)
    if reason:
        raise TensorMapError(reason)
    rank = len(sizes)
    storage = ctypes.create_string_buffer(_BYTES + _ALIGN)
    aligned = -(-ctypes.addressof(storage) // _ALIGN) * _ALIGN
    runtime.encode_tiled(
        aligned,
        _DTYPES[dtype],
        rank,
        address,
        _words(ctypes.c_uint64, sizes),
        _words(ctypes.c_uint64, tuple(stride * dtype.itemsize for stride in strides[:-1])),
        _words(ctypes.c_uint32, box),
        _words(ctypes.c_uint32, (1,) * rank),
        _SWIZZLES[swizzle],
        _L2_PROMOTION_256,
    )
    return ctypes.string_at(aligned, _BYTES)


def _words(kind: Any, values: tuple[int, ...]) -> Any:
    """A C array, innermost dimension first."""
    return (kind * max(len(values), 1))(*reversed(values))


def _unsupported(
    address: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> str | None:
    if dtype not in _DTYPES or swizzle not in _SWIZZLES:
        return f"TMA copies no {dtype} with a swizzle of {swizzle} bytes"
    if not 1 <= len(sizes) <= _MAX_RANK or len(box) != len(sizes):
        return f"a box {box} does not cut a tensor of shape {sizes}; ranks go from 1 to {_MAX_RANK}"
    if address % _STRIDE_ALIGN:
        return f"the tensor lies at {address:#x}, not at a multiple of {_STRIDE_ALIGN} bytes"
    if strides[-1] != 1 and sizes[-1] != 1:
        return f"the last dimension has stride {strides[-1]}, not 1"
    for size, stride in zip(sizes[:-1], strides[:-1], strict=True):
        if stride * dtype.itemsize % _STRIDE_ALIGN or stride < 0:
            return (
                f"a dimension of {size} has a stride of {stride * dtype.itemsize} bytes, not a "
                f"multiple of {_STRIDE_ALIGN}"
            )
    if not all(1 <= size <= _MAX_SIZE for size in sizes):
        return f"shape {sizes} has a size outside 1 to {_MAX_SIZE}"
    if not all(1 <= length <= _MAX_BOX for length in box):
        return f"box {box} has a length outside 1 to {_MAX_BOX}"
    row_bytes = box[-1] * dtype.itemsize
    if row_bytes % _STRIDE_ALIGN or (swizzle and row_bytes > swizzle):
        return f"rows of a box of {row_bytes} bytes fit no swizzle of {swizzle}"
    return None
