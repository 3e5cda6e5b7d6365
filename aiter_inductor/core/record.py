"""Reports of compiled models in use, found again through the parameters they were compiled with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from aiter_inductor.core.report import Report

_by_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember(report: Report, example_inputs: Sequence[Any]) -> None:
    """Attach `report` to the tensors of one compiled graph for as long as they live."""
    for tensor in example_inputs:
        if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter):
            _by_tensor.setdefault(tensor, []).append(report)


def recall(tensors: Iterable[torch.Tensor]) -> list[Report]:
    """The reports of every graph that was compiled with one of `tensors`, oldest first."""
    found: dict[int, Report] = {}
    for tensor in tensors:
        for report in _by_tensor.get(tensor, ()):
            found.setdefault(id(report), report)
    return list(found.values())
