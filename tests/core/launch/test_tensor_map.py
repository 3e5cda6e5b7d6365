"""What the driver is asked to encode, shown by a library that only notes it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
import torch

from aiter_inductor.core.launch import CudaRuntime, RuntimeLibraryError, TensorMapError
from aiter_inductor.core.launch.tensor_map import encode

FAKE_CUDA = r"""
#include <stdint.h>
#include <string.h>
int cuLaunchKernel(void) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuGetErrorName(int status, const char **name) { *name = "CUDA_ERROR_INVALID_VALUE"; return 0; }
int cuTensorMapEncodeTiled(void *out, int dtype, unsigned rank, void *address,
                           const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *steps, int interleave, int swizzle, int promotion,
                           int fill) {
  uint64_t words[16] = {dtype, rank, (uint64_t)address, interleave, swizzle, promotion, fill};
  if ((uint64_t)out % 64) return 1;
  for (unsigned i = 0; i < rank; i++) {
    words[7 + i] = sizes[i];
    words[10 + i] = (uint64_t)box[i] << 32 | steps[i];
    if (i + 1 < rank) words[13 + i] = strides[i];
  }
  memcpy(out, words, 128);
  return rank == 1;
}
"""


@pytest.fixture(scope="module")
def cuda(tmp_path_factory) -> CudaRuntime:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on the PATH")
    directory = tmp_path_factory.mktemp("fake_cuda")
    source, library = directory / "fake.c", directory / "libfakecuda.so"
    source.write_text(FAKE_CUDA)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    return CudaRuntime(ctypes.CDLL(str(library)))


def test_dimensions_go_innermost_first_and_strides_in_bytes(cuda):
    strides, box = (7000, 40, 1), (1, 128, 32)
    encoded = encode(cuda, 0x7F0000000010, torch.float32, (3, 170, 33), strides, box, 128)
    words = list(memoryview(encoded).cast("Q"))
    assert words[:7] == [7, 3, 0x7F0000000010, 0, 3, 3, 0]
    assert words[7:10] == [33, 170, 3]
    assert words[10:13] == [32 << 32 | 1, 128 << 32 | 1, 1 << 32 | 1]
    assert words[13:15] == [40 * 4, 7000 * 4]


def test_driver_errors_have_their_name(cuda):
    with pytest.raises(RuntimeLibraryError, match="cuTensorMapEncodeTiled failed: CUDA_ERROR_INV"):
        encode(cuda, 16, torch.uint8, (64,), (1,), (64,), 0)


@pytest.mark.parametrize(
    ("address", "dtype", "sizes", "strides", "box", "swizzle", "sentence"),
    [
        (8, torch.bfloat16, (4, 64), (64, 1), (4, 64), 128, "lies at 0x8, not at a multiple of 16"),
        (0, torch.bfloat16, (4, 60), (60, 1), (4, 32), 64, "a stride of 120 bytes, not a multiple"),
        (0, torch.bfloat16, (4, 64), (1, 4), (4, 64), 128, "last dimension has stride 4, not 1"),
        (0, torch.bfloat16, (4, 64), (64, 1), (4, 128), 128, "of 256 bytes fit no swizzle of 128"),
        (0, torch.bfloat16, (0, 64), (64, 1), (4, 64), 128, "has a size outside 1 to"),
        (0, torch.bfloat16, (4, 64), (64, 1), (512, 64), 128, "has a length outside 1 to 256"),
        (0, torch.bfloat16, (4, 64), (64, 1), (64,), 128, r"box \(64,\) does not cut a tensor of"),
        (0, torch.complex64, (4, 64), (64, 1), (4, 64), 128, "TMA copies no torch.complex64"),
    ],
)
def test_what_tma_does_not_take_is_a_sentence(
    cuda, address, dtype, sizes, strides, box, swizzle, sentence
):
    with pytest.raises(TensorMapError, match=sentence):
        encode(cuda, address, dtype, sizes, strides, box, swizzle)
