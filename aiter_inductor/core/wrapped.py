"""Tensors that hold other tensors: subclasses such as DTensor, and what torch.func transforms.

A kernel computes on plain memory. An operator of this package has no sharding strategy, no batching
rule and no rule for ragged rows, so a site on such tensors stays with what torch knows to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def not_plain(named: Mapping[str, Any]) -> str | None:
    """Why no kernel can compute on these values, if one of them holds other tensors.

    Args:
        named: fake values, numbers and lists of them, by the names to call them.
    """
    for name, found in named.items():
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor) and (what := _wrapper(each)):
                return f"{name} is {what}; kernels compute on plain tensors"
    return None


def plain_tensors(found: Any) -> Iterator[torch.Tensor]:
    """The tensors whose memory `found` is made of: itself, or all that it wraps."""
    if torch._C._functorch.is_functorch_wrapped_tensor(found):
        yield from plain_tensors(torch._C._functorch.get_unwrapped(found))
    elif is_traceable_wrapper_subclass(found):
        names, _ = found.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(found, name))
    else:
        yield found


def _wrapper(found: Any) -> str | None:
    if torch._C._functorch.is_functorch_wrapped_tensor(found):
        return "wrapped by a transform of torch.func"
    return f"a {type(found).__name__}" if is_traceable_wrapper_subclass(found) else None
