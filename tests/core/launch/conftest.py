"""A runtime library that launches nothing and notes what it was asked."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from aiter_inductor.core.jit import JitSettings
from aiter_inductor.core.launch import HipRuntime
from aiter_inductor.core.launch.ctypes_launcher import CtypesLauncher
from aiter_inductor.core.launch.native import launcher_class

FAKE_HIP = r"""
#include <stddef.h>
#include <string.h>
struct { int launches, loads, status, device, mode, block_x, grid_x, grid_y, shared; size_t size;
         void *stream, *function; unsigned char arguments[256]; int attribute[2]; } seen;
int hipModuleLoadData(void **module, const void *image) {
  seen.loads++; *module = &seen; return seen.mode == 2 ? 0 : 900; }
int hipModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)(size_t)(0x1000 + seen.loads); return name[0] ? 0 : 500; }
int hipModuleLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void *stream, void **params,
                          void **extra) {
  if (seen.status) return seen.status;
  seen.launches++; seen.function = function; seen.stream = stream; seen.shared = shared;
  seen.grid_x = gx; seen.grid_y = gy; seen.block_x = bx; seen.size = *(size_t *)extra[3];
  memcpy(seen.arguments, extra[1], seen.size);
  return extra[0] != (void *)1 || extra[2] != (void *)2 || extra[4] != (void *)3 || params; }
typedef struct { unsigned sizes[7]; void *stream; int *attributes; unsigned count; } Config;
int launch_early(const Config *config, void *function, void **params, void **extra) {
  if (seen.status) return seen.status;
  seen.launches++; seen.function = function; seen.stream = config->stream;
  seen.grid_x = config->sizes[0]; seen.grid_y = config->sizes[1]; seen.block_x = config->sizes[3];
  seen.shared = config->sizes[6]; seen.size = sizeof(int); memcpy(seen.arguments, params[1], 4);
  seen.attribute[0] = config->attributes[0]; seen.attribute[1] = config->attributes[2];
  return config->count != 1 || extra; }
int replace_address(void *map, void *address) {
  if (seen.status || (size_t)map % 64) return 1;
  memcpy(map, &address, sizeof address); return 0; }
int hipGetDevice(int *device) { *device = seen.device; return 0; }
int hipThreadExchangeStreamCaptureMode(int *mode) {
  int old = seen.mode; seen.mode = *mode; *mode = old; return 0; }
const char *hipGetErrorName(int status) { return status == 1 ? "hipErrorInvalidValue" : "other"; }
"""


class Seen(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in (
            "launches", "loads", "status", "device", "mode", "block_x", "grid_x", "grid_y",
            "shared")),
        ("size", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("arguments", ctypes.c_ubyte * 256),
        ("attribute", ctypes.c_int * 2),
    )  # fmt: skip


@pytest.fixture(scope="session")
def fake_hip(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on the PATH")
    directory = tmp_path_factory.mktemp("fake_hip")
    source, library = directory / "fake.c", directory / "libamdhip64.so"
    source.write_text(FAKE_HIP)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def seen(fake_hip) -> Seen:
    record = Seen.in_dll(fake_hip, "seen")
    ctypes.memset(ctypes.byref(record), 0, ctypes.sizeof(record))
    return record


class FakeHip(HipRuntime):
    """The fake library, with a stream and a current device that a machine without a GPU has."""

    def __init__(self, library: ctypes.CDLL, record: Seen) -> None:
        super().__init__(library)
        self._record = record

    def stream_of(self, device: int, /) -> int:
        return 0x5000 + device

    def enter(self, device: int, /) -> int:
        previous = self._record.device
        self._record.device = device
        return previous


@pytest.fixture
def runtime(fake_hip, seen) -> FakeHip:
    return FakeHip(fake_hip, seen)


@pytest.fixture(scope="session")
def jit_settings(tmp_path_factory) -> JitSettings:
    return JitSettings(cache_dir=tmp_path_factory.mktemp("jit") / "cache")


@pytest.fixture(params=["c", "ctypes"])
def launcher(request, jit_settings) -> type:
    if request.param == "ctypes":
        return CtypesLauncher
    built = launcher_class(jit_settings)
    if built is CtypesLauncher:
        pytest.skip("no C compiler, or no Python headers, for the C launcher")
    return built


@pytest.fixture(scope="session")
def kernel_source(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source") / "scale.hip"
    source.write_text(
        'extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(64, 256)))\n'
        "void scale(const float *x, float *out, int n, long stride, float by) {\n"
        "  int i = __builtin_amdgcn_workitem_id_x();\n"
        "  if (i < n) out[i * stride] = x[i] * by;\n"
        "}\n"
    )
    return source
