"""Launch native kernels: checked, packed by signature, on the caller's current stream."""

from __future__ import annotations

from aiter_inductor.core.launch.kernel import Kernel
from aiter_inductor.core.launch.runtime import (
    CudaRuntime,
    HipRuntime,
    HostRuntime,
    Runtime,
    RuntimeLibraryError,
    loaded_library,
    runtime_of,
)
from aiter_inductor.core.launch.signature import (
    KernelSignature,
    Parameter,
    f32,
    i32,
    i64,
    pointer,
)
from aiter_inductor.core.launch.simulated import SimulatedKernel, SimulationUnavailableError

__all__ = [
    "CudaRuntime",
    "HipRuntime",
    "HostRuntime",
    "Kernel",
    "KernelSignature",
    "Parameter",
    "Runtime",
    "RuntimeLibraryError",
    "SimulatedKernel",
    "SimulationUnavailableError",
    "f32",
    "i32",
    "i64",
    "loaded_library",
    "pointer",
    "runtime_of",
]
