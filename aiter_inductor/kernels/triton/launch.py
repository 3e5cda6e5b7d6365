"""How the Triton host functions launch, in eager, in a traced graph and under the interpreter."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton.runtime.jit import JITFunction


def launchable(kernel: Any) -> Any:
    """`kernel`, wrapped while a graph is traced so that its launch becomes a node of the graph.

    Tracers are dispatch modes. Without one the kernel launches itself: the wrapper's way through a
    higher-order operator takes 200 µs and more of host time on every eager call. The interpreter's
    stand-in (TRITON_INTERPRET=1) is not a JITFunction and runs as it is.
    """
    if _get_current_dispatch_mode() is None or not isinstance(kernel, JITFunction):
        return kernel
    return torch.library.wrap_triton(kernel)


@triton.jit
def single(number):
    """A scalar argument in float32.

    Triton's own launcher passes a Python float as float32, Inductor as float64: unconverted, it
    would turn every value it meets into float64.
    """
    return tl.cast(number, tl.float32)
