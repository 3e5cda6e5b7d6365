"""Ops whose benchmarks take the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Dims = Mapping[str, int]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """How the ops of one kind get their arguments from named sizes.

    Attributes:
        dims: every size and its default; `group_size` 0 means one scale a row.
        example: arguments on the meta device, from sizes and the chip's fp8 dtype.
    """

    dims: Dims
    example: Callable[[Dims, torch.dtype], Arguments]
