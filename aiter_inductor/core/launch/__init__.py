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
    tensor_map_of,
)
from aiter_inductor.core.launch.simulated import SimulatedKernel, SimulationUnavailableError
from aiter_inductor.core.launch.tensor_map import NO_MAP, TensorMapError, tensor_map

__all__ = [
    "NO_MAP",
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
    "TensorMapError",
    "f32",
    "i32",
    "i64",
    "loaded_library",
    "pointer",
    "runtime_of",
    "tensor_map",
    "tensor_map_of",
]
