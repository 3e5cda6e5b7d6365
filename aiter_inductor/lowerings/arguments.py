"""Whether the tensors of a call fit together, as kernels take for granted that they do.

A program was checked when it was captured; an op that is called directly is checked here only, and
a kernel that is handed a shorter tensor than another promises reads, or writes, what is not its
own. Sizes that are not known when compiling are not compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.problem import Dim, dim, fixed


def misshapen(name: str, x: Tensor | None, wanted: Sequence[Dim]) -> str:
    """Why `x`, if there is one, has not the sizes `wanted`; empty if it has."""
    if x is None:
        return ""
    found = [dim(size) for size in x.shape]
    if len(found) == len(wanted) and not any(map(differ, found, wanted)):
        return ""
    return f"{name} is {_shown(found)}, not {_shown(wanted)}"


def no_vector(name: str, x: Tensor | None, length: Dim) -> str:
    """Why `x`, if there is one, is not `length` elements side by side; empty if it is."""
    if wrong := misshapen(name, x, (length,)):
        return wrong
    if x is None or fixed(dim(x.stride(0))) in (1, None) or dim(x.shape[0]) == 1:
        return ""
    return f"{name} has stride {x.stride(0)}; kernels read it with stride 1"


def no_scale(name: str, x: Tensor | None) -> str:
    """Why `x`, if there is one, is not one float32; empty if it is."""
    if x is None or (dim(x.numel()) == 1 and x.dtype == torch.float32):
        return ""
    return f"{name} is {short_name(x.dtype)}{_shown(list(map(dim, x.shape)))}, not one float32"


def apart(*tensors: Tensor | None) -> str:
    """Why no kernel reads all of `tensors`, of which some may be None; empty if one does."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) < 2:
        return ""
    return f"the tensors are on {' and '.join(sorted(map(str, devices)))}"


def differ(found: Dim, wanted: Dim) -> bool:
    """Whether two sizes are known when compiling and are not the same."""
    sizes = fixed(found), fixed(wanted)
    return None not in sizes and sizes[0] != sizes[1]


def _shown(sizes: Sequence[Dim]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"
