"""The libraries that load code objects and launch kernels: HIP's, CUDA's, or the host itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NoReturn, Protocol

from aiter_inductor.core.errors import AiterInductorError
from aiter_inductor.core.launch.ctypes_launcher import LaunchAttribute, LaunchConfig

_RELAXED_CAPTURE = 2
_MAX_DYNAMIC_SHARED = 8  # the same attribute number in HIP and CUDA
_CUDA_WITHOUT_ATTRIBUTE_BYTES = 48 * 1024
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


class RuntimeLibraryError(AiterInductorError, RuntimeError):
    """A runtime library that is missing, or that refused to load or launch something."""


class Runtime(Protocol):
    """What a launcher needs to know about a runtime library.

    Attributes:
        launch_address: of the function with cuLaunchKernel's parameters.
        early_address: of cuLaunchKernelEx, for kernels that wait for those before them; else 0.
        device_address: of the function that tells the current device; 0 on the host.
        replace_address: of cuTensorMapReplaceAddress; 0 where there are no tensor maps.
        end_marker: closes the `extra` list; -1 where arguments go through `params`.
    """

    launch_address: int
    early_address: int
    device_address: int
    replace_address: int
    end_marker: int

    def load(self, content: bytes, kernel: str, shared_bytes: int, /) -> int:
        """Load a code object on the current device; the handle of one of its kernels."""

    def stream_of(self, device: int, /) -> int:
        """The caller's current stream."""

    def enter(self, device: int, /) -> int:
        """Make `device` current; the one that was current before."""

    def fail(self, status: int) -> NoReturn:
        """Raise what `status` means."""


class _DriverRuntime:
    """What HIP and CUDA share; names differ in their prefix."""

    end_marker = -1
    early_address = 0
    replace_address = 0

    def __init__(self, library: ctypes.CDLL, prefix: str, launch: str, current: str) -> None:
        self._library = library
        self._prefix = prefix
        self._modules: list[ctypes.c_void_p] = []
        self.launch_address = self._address(launch)
        self.device_address = self._address(current)

    def _address(self, name: str) -> int:
        return ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value or 0

    def load(self, content: bytes, kernel: str, shared_bytes: int) -> int:
        """Load `content` on the current device and keep it for good; the handle of `kernel`.

        A first call may fall into a graph capture, where loading is legal in relaxed mode only.

        Raises:
            RuntimeLibraryError: with the runtime's name of the error.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        mode = ctypes.c_int(_RELAXED_CAPTURE)
        self._check("ThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            self._check("ModuleLoadData", ctypes.byref(module), content)
            self._check("ModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        finally:
            self._check("ThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        self._modules.append(module)
        self._allow_shared(function, shared_bytes)
        return function.value or 0

    def _allow_shared(self, function: ctypes.c_void_p, shared_bytes: int) -> None:
        """Permit `shared_bytes` of dynamic shared memory; HIP needs no permission."""

    @property
    def stream_of(self) -> Callable[[int], int]:
        """The caller's current stream on a device; torch's own function, called without a frame."""
        import torch

        current_raw_stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream
        return current_raw_stream

    def enter(self, device: int) -> int:
        """Make `device` current; the one that was current before."""
        import torch

        return int(torch._C._cuda_exchangeDevice(device))

    def fail(self, status: int) -> NoReturn:
        """Raise the launch error `status`."""
        raise RuntimeLibraryError(f"the launch failed: {self._error_name(status)} ({status})")

    def _check(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, self._prefix + function)(*arguments)
        if status:
            name = self._error_name(status)
            raise RuntimeLibraryError(f"{self._prefix}{function} failed: {name} ({status})")

    def _error_name(self, status: int) -> str:
        raise NotImplementedError


class HipRuntime(_DriverRuntime):
    """libamdhip64. Arguments go through `extra`: `params` would be packed from the code object's
    metadata, which hand-written assembly may get wrong.
    """

    end_marker = 3

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library, "hip", "hipModuleLaunchKernel", "hipGetDevice")

    def _error_name(self, status: int) -> str:
        self._library.hipGetErrorName.restype = ctypes.c_char_p
        return str((self._library.hipGetErrorName(status) or b"unknown").decode())


class CudaRuntime(_DriverRuntime):
    """libcuda, the driver: module calls work on the context that is current in the thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library, "cu", "cuLaunchKernel", "cuCtxGetDevice")
        if hasattr(library, "cuLaunchKernelEx"):  # drivers of CUDA 11.8 and later
            self.early_address = self._address("cuLaunchKernelEx")
        if hasattr(library, "cuTensorMapReplaceAddress"):  # of CUDA 12 and later
            self.replace_address = self._address("cuTensorMapReplaceAddress")

    def enter(self, device: int) -> int:
        """Make `device` current, in a thread without a context too; the one that was before."""
        previous = super().enter(device)
        current = ctypes.c_int(-1)
        if self._library.cuCtxGetDevice(ctypes.byref(current)) or current.value != device:
            context = ctypes.c_void_p()
            self._check("DevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._check("CtxSetCurrent", context)
        return previous

    def encode_tiled(
        self,
        out_address: int,
        dtype: int,
        rank: int,
        address: int,
        sizes: ctypes.Array[ctypes.c_uint64],
        strides: ctypes.Array[ctypes.c_uint64],
        box: ctypes.Array[ctypes.c_uint32],
        steps: ctypes.Array[ctypes.c_uint32],
        swizzle: int,
        l2_promotion: int,
    ) -> None:
        """cuTensorMapEncodeTiled without interleaving, zeros beyond the tensor.

        Raises:
            RuntimeLibraryError: with the driver's name of the error.
        """
        out, tensor = ctypes.c_void_p(out_address), ctypes.c_void_p(address)
        modes = (0, swizzle, l2_promotion, 0)
        self._check(
            "TensorMapEncodeTiled", out, dtype, rank, tensor, sizes, strides, box, steps, *modes
        )

    def clusters_side_by_side(
        self, function: int, cluster: int, threads: int, shared_bytes: int
    ) -> int:
        """How many clusters of `cluster` blocks the current device holds at once; 0 if none."""
        attribute = LaunchAttribute(_CLUSTER_DIMENSION, 0, (cluster, 1, 1))
        sizes = (cluster, 1, 1, threads, 1, 1)
        config = LaunchConfig(sizes, shared_bytes, None, ctypes.pointer(attribute), 1)
        found, handle = ctypes.c_int(), ctypes.c_void_p(function)
        self._check("OccupancyMaxActiveClusters", ctypes.byref(found), handle, ctypes.byref(config))
        return found.value

    def _allow_shared(self, function: ctypes.c_void_p, shared_bytes: int) -> None:
        if shared_bytes > _CUDA_WITHOUT_ATTRIBUTE_BYTES:
            self._check("FuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared_bytes)

    def _error_name(self, status: int) -> str:
        name = ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(name))
        return (name.value or b"unknown").decode()


class HostRuntime:
    """A kernel library built for the host, whose threads are fibers (kernels/hip/simt_host.h)."""

    early_address = 0
    device_address = 0
    replace_address = 0
    end_marker = -1

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.launch_address = self._address("simt_launch")

    def _address(self, name: str) -> int:
        return ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value or 0

    def load(self, _content: bytes, kernel: str, _shared_bytes: int, /) -> int:
        """The address of the kernel's entry; the library is loaded already."""
        return self._address(f"{kernel}_entry")

    def stream_of(self, _device: int, /) -> int:
        """The host has no streams."""
        return 0

    def enter(self, device: int) -> int:
        """The host is always current."""
        return device

    def fail(self, status: int) -> NoReturn:
        """Raise the launch error `status`."""
        raise RuntimeLibraryError(f"the launch on the host failed with status {status}")


@lru_cache
def runtime_of(arch: str) -> Runtime:
    """The runtime library for `gfx…` or `sm_…`, the one in the process if there is one.

    Raises:
        RuntimeLibraryError: if there is none, naming what was tried.
    """
    if arch.startswith("gfx"):
        return HipRuntime(_open_library("libamdhip64.so", _hip_places()))
    return CudaRuntime(_open_library("libcuda.so.1", ()))


def loaded_library(stem: str) -> str | None:
    """The path of a library already in this process, so that no second copy is loaded."""
    found: list[str] = []

    def visit(info: ctypes._Pointer[_LinkMapInfo], size: int, data: int | None) -> int:
        path = os.fsdecode(info.contents.name or b"")
        if Path(path).name.startswith(stem):
            found.append(path)
        return bool(found)

    ctypes.CDLL(None).dl_iterate_phdr(_VISITOR(visit), None)
    return found[0] if found else None


class _LinkMapInfo(ctypes.Structure):
    """The head of dl_phdr_info."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


_VISITOR = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_LinkMapInfo), ctypes.c_size_t, ctypes.c_void_p
)


def _open_library(name: str, places: tuple[Path, ...]) -> ctypes.CDLL:
    loaded = loaded_library(name)
    shipped = [str(path) for place in places for path in sorted(place.glob(f"{name}*"))]
    tried = []
    for candidate in (*filter(None, [loaded]), *shipped, name):
        library = _try_open(candidate)
        if isinstance(library, ctypes.CDLL):
            return library
        tried.append(library)
    raise RuntimeLibraryError(f"no {name} can be loaded: {'; '.join(tried)}")


def _try_open(path: str) -> ctypes.CDLL | str:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        return str(error)


def _hip_places() -> tuple[Path, ...]:
    import torch

    return (Path(torch.__file__).parent / "lib", Path("/opt/rocm/lib"))
