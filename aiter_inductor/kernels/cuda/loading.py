"""From a declared variant of a CUDA source to a kernel that can be launched on sm_90.

Building, caching and launching are those of the HIP kernels: a variant is built once, in the
background where asked, and launched through the same checked launcher.
"""

from __future__ import annotations

from pathlib import Path

from aiter_inductor.core import jit
from aiter_inductor.kernels.hip.loading import (
    Variant,
    arch_name,
    load_kernel,
    module_of,
    why_not_ready,
)

__all__ = ["Variant", "arch_name", "cuda_module", "load_kernel", "why_not_ready"]

_HERE = Path(__file__).parent


def cuda_module(name: str, source: str, **defines: object) -> jit.Module:
    """A module of a source in this folder; True and False become 1 and 0."""
    return module_of(name, _HERE / source, defines)
