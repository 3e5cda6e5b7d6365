"""How the Triton host functions launch, in eager, in a traced graph and under the interpreter."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.jit import JITFunction


def launchable(kernel: Any) -> Any:
    """`kernel`, wrapped so that torch.compile records its launch as a node of the graph.

    The interpreter's stand-in (TRITON_INTERPRET=1) is not a JITFunction and runs as it is.
    """
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
