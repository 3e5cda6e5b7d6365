"""Both launchers pack, check and refuse alike; neither needs a GPU to show it."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest
import torch

from aiter_inductor.core.launch import (
    KernelSignature,
    RuntimeLibraryError,
    f32,
    i32,
    i64,
    pointer,
    tensor_map_of,
)
from aiter_inductor.core.launch.kernel import _described

SIGNATURE = KernelSignature(
    "scale",
    (
        pointer("x", torch.float32, align=16),
        i32("n"),
        pointer("bias", torch.bfloat16, optional=True),
        f32("eps"),
        i64("stride"),
    ),
)


class OnDevice:
    """What a launcher asks of a tensor, answered for a GPU that is not there."""

    def __init__(self, address: int, device: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self._address, self._device, self.dtype = address, device, dtype

    def get_device(self) -> int:
        return self._device

    def data_ptr(self) -> int:
        return self._address


WITH_MAP = KernelSignature("scale", (i32("n"), tensor_map_of("x_map"), f32("eps")))


@pytest.fixture
def launch(launcher, runtime) -> Any:
    return launcher_of(SIGNATURE, launcher, runtime)


def launcher_of(
    signature: KernelSignature,
    launcher: Any,
    runtime: Any,
    *,
    early_address: int = 0,
    replace_address: int = 0,
) -> Any:
    return launcher(
        name="scale",
        parameters=_described(signature),
        max_grid=(2**31 - 1, 65535, 65535),
        max_items_x=2**32 - 1,
        max_threads=256,
        max_shared_bytes=65536,
        launch_address=runtime.launch_address,
        early_address=early_address,
        device_address=runtime.device_address,
        replace_address=replace_address,
        end_marker=runtime.end_marker,
        load=lambda _: runtime.load(b"code", "scale", 0),
        stream_of=runtime.stream_of,
        enter=runtime.enter,
        fail=runtime.fail,
    )


X = OnDevice(0xABCDE0)


def test_offsets_follow_c_structs():
    assert SIGNATURE.offsets == (0, 8, 16, 24, 32)
    assert SIGNATURE.size_bytes == 40
    assert KernelSignature("k", (i32("a"), i32("b"), i64("c"))).offsets == (0, 4, 8)


def test_packs_by_signature(launch, seen):
    bias = OnDevice(0x77, dtype=torch.bfloat16)
    launch((7, 3), 64, 128, X, -5, bias, 1.5, 1 << 40)
    packed = bytes(seen.arguments[: seen.size])
    assert seen.size == 40
    assert struct.unpack("=Qi4xQf4xq", packed) == (0xABCDE0, -5, 0x77, 1.5, 1 << 40)
    assert (seen.grid_x, seen.grid_y, seen.block_x, seen.shared) == (7, 3, 64, 128)
    assert seen.stream == 0x5000


def test_early_launch_asks_for_programmatic_serialization(launcher, runtime, fake_hip, seen):
    address = ctypes.cast(fake_hip.launch_early, ctypes.c_void_p).value
    launch = launcher_of(SIGNATURE, launcher, runtime, early_address=address)
    launch((7, 3), 64, 128, X, -5, None, 1.5, 1 << 40)
    assert (seen.grid_x, seen.grid_y, seen.block_x, seen.shared) == (7, 3, 64, 128)
    assert struct.unpack("=i", bytes(seen.arguments[:4])) == (-5,)
    assert (seen.stream, seen.function) == (0x5000, 0x1001)
    assert list(seen.attribute) == [6, 1]  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    seen.status = 1
    with pytest.raises(RuntimeLibraryError, match="hipErrorInvalidValue"):
        launch(1, 64, 0, X, 1, None, 0.0, 1)


def test_optional_pointer_may_be_none(launch, seen):
    launch(1, 64, 0, X, 1, None, 0.0, 1)
    assert bytes(seen.arguments[16:24]) == b"\0" * 8


def test_one_module_per_device_and_the_device_is_left_as_it_was(launch, seen):
    for device in (0, 1, 1, 0):
        launch(1, 64, 0, OnDevice(0x100, device), 1, None, 0.0, 1)
        assert seen.device == 0
        assert seen.stream == 0x5000 + device
        assert seen.function == 0x1001 + device
    assert (seen.loads, seen.launches) == (2, 4)


def test_loading_is_legal_under_capture(launch, seen):
    launch(1, 64, 0, X, 1, None, 0.0, 1)  # the fake refuses a load outside relaxed mode
    assert seen.mode == 0


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "sentence"),
    [
        (0, 64, 0, "scale: grid 0 is not positive"),
        ((1, -2), 64, 0, r"scale: grid \(1, -2\) is not positive"),
        ((1, 1, 1, 1), 64, 0, r"scale: grid \(1, 1, 1, 1\) has 4 sizes, not 1 to 3"),
        (2**31, 64, 0, "scale: a grid of 2147483648 x 1 x 1 exceeds 2147483647 x 65535 x 65535"),
        ((1, 65536), 64, 0, "scale: a grid of 1 x 65536 x 1 exceeds"),
        (2**27, 64, 0, "scale: 134217728 blocks of 64 threads exceed 4294967295 work items"),
        (1, 257, 0, "scale: a block of 257 x 1 x 1 threads exceeds 256"),
        (1, (64, 8), 0, "scale: a block of 64 x 8 x 1 threads exceeds 256"),
        (1, 64, 65537, "scale: 65537 bytes of dynamic shared memory exceed 65536"),
    ],
)
def test_sizes_beyond_the_chip_are_refused(launch, seen, grid, block, shared_bytes, sentence):
    with pytest.raises(ValueError, match=sentence):
        launch(grid, block, shared_bytes, X, 1, None, 0.0, 1)
    assert seen.launches == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.ones(4), 1, None, 0.0, 1), "scale: x is on the CPU; the kernel runs on a GPU"),
        (
            (X, 1, OnDevice(0, 1, torch.bfloat16), 0.0, 1),
            "scale: bias is on device 1, the arguments before it on device 0",
        ),
        (
            (OnDevice(0, 0, torch.float16), 1, None, 0.0, 1),
            "scale: x is torch.float16; the kernel takes torch.float32",
        ),
        ((OnDevice(0x108), 1, None, 0.0, 1), "scale: x lies at an address that is not a multiple"),
        ((X, 1 << 31, None, 0.0, 1), "scale: n=2147483648 does not fit 32 bits"),
        ((X, 1, None, 0.0, 1 << 63), "scale: stride=9223372036854775808 does not fit 64 bits"),
        ((OnDevice(0, 64), 1, None, 0.0, 1), "scale: device 64 is outside 0 to 63"),
    ],
)
def test_bad_arguments_are_refused(launch, seen, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        launch(1, 64, 0, *arguments)
    assert seen.launches == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((None, 1, None, 0.0, 1), "scale: x is NoneType, not a tensor"),
        ((0xABC, 1, None, 0.0, 1), "scale: x is int, not a tensor"),
        ((X, 1), "scale takes 5 arguments after grid, block and shared_bytes"),
    ],
)
def test_what_is_no_argument_is_refused(launch, seen, arguments, sentence):
    with pytest.raises(TypeError, match=sentence):
        launch(1, 64, 0, *arguments)
    assert seen.launches == 0


@pytest.mark.parametrize("device", [0, 1])
def test_runtime_error_is_named_and_the_device_restored(launch, seen, device):
    seen.status = 1
    with pytest.raises(RuntimeLibraryError, match=r"hipErrorInvalidValue \(1\)"):
        launch(1, 64, 0, OnDevice(0x100, device), 1, None, 0.0, 1)
    assert seen.device == 0


def test_signature_refuses_an_unknown_kind():
    from aiter_inductor.core.launch import Parameter

    with pytest.raises(ValueError, match="x is of kind 'i8'; kinds are pointer, i32"):
        Parameter("x", "i8")


def test_tensor_maps_are_passed_by_value(launcher, runtime, seen):
    launch = launcher_of(WITH_MAP, launcher, runtime)
    launch(1, 64, 0, -3, bytes(range(128)), 0.5)
    assert WITH_MAP.offsets == (0, 64, 192)
    assert seen.size == 196
    packed = bytes(seen.arguments[: seen.size])
    assert struct.unpack_from("=i", packed) == (-3,)
    assert packed[64:192] == bytes(range(128))
    assert struct.unpack_from("=f", packed, 192) == (0.5,)


def test_what_is_no_tensor_map_is_refused(launcher, runtime, seen):
    launch = launcher_of(WITH_MAP, launcher, runtime)
    with pytest.raises(TypeError, match="scale: x_map is OnDevice, not the bytes of a tensor map"):
        launch(1, 64, 0, 1, X, 0.5)
    with pytest.raises(ValueError, match="scale: x_map has 64 bytes; a tensor map has 128"):
        launch(1, 64, 0, 1, b"x" * 64, 0.5)
    assert seen.launches == 0


@pytest.fixture
def launch_with_map(launcher, runtime, fake_hip) -> Any:
    address = ctypes.cast(fake_hip.replace_address, ctypes.c_void_p).value
    return launcher_of(WITH_MAP, launcher, runtime, replace_address=address)


def test_a_tensor_map_is_moved_to_a_tensor(launch_with_map, seen):
    launch_with_map(1, 64, 0, -3, (bytes(range(128)), X, 32), 0.5)
    packed = bytes(seen.arguments[: seen.size])
    assert struct.unpack_from("=Q", packed, 64) == (0xABCDE0 + 32,)
    assert packed[72:192] == bytes(range(8, 128))
    assert seen.stream == 0x5000
    launch_with_map(1, 64, 0, -3, (bytes(range(128)), OnDevice(0x100, 1), 0), 0.5)
    assert seen.stream == 0x5001


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ((bytes(128), X, 8), ValueError, "scale: x_map lies at an address that is not"),
        ((bytes(128), 0xABC, 0), TypeError, "scale: x_map is int, not a tensor"),
        ((bytes(128), torch.ones(4), 0), ValueError, "scale: x_map is on the CPU; the kernel runs"),
        ((bytes(64), X, 0), ValueError, "scale: x_map has 64 bytes; a tensor map has 128"),
        ((bytes(128), X), TypeError, "scale: x_map is tuple, not the bytes of a tensor map"),
    ],
)
def test_what_a_tensor_map_cannot_be_moved_to_is_refused(
    launch_with_map, seen, given, error, sentence
):
    with pytest.raises(error, match=sentence):
        launch_with_map(1, 64, 0, 1, given, 0.5)
    assert seen.launches == 0


def test_a_map_that_the_runtime_does_not_move_is_its_error(launch_with_map, seen):
    seen.status = 1
    with pytest.raises(RuntimeLibraryError, match="hipErrorInvalidValue"):
        launch_with_map(1, 64, 0, 1, (bytes(128), X, 0), 0.5)


def test_a_runtime_without_tensor_maps_moves_none(launcher, runtime):
    launch = launcher_of(WITH_MAP, launcher, runtime)
    with pytest.raises(TypeError, match="scale: x_map is tuple, not the bytes of a tensor map"):
        launch(1, 64, 0, 1, (bytes(128), X, 0), 0.5)
