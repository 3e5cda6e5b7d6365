"""Reports of compiled models in use, found again through the tensors they were compiled with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from aiter_inductor.core.report import Report

_by_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember(report: Report, frame: str, example_inputs: Sequence[Any]) -> None:
    """Attach `report` to the tensors of one compiled graph for as long as they live.

    A frame that is compiled again, because Dynamo restarted or because a shape became dynamic,
    replaces its report: the sites are the same ones.
    """
    for tensor in example_inputs:
        if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter):
            _by_tensor.setdefault(tensor, {})[frame] = report


def forget() -> None:
    """Drop all reports: Dynamo numbers its frames anew after a reset."""
    _by_tensor.clear()


def recall(tensors: Iterable[torch.Tensor]) -> list[Report]:
    """The newest reports of every frame that was compiled with one of `tensors`.

    A frame has several where layers that share their code differ, as a dense layer of a mixture of
    experts does from its others.
    """
    found: dict[tuple[str, int], Report] = {}
    for tensor in tensors:
        for frame, report in _by_tensor.get(tensor, {}).items():
            found.setdefault((frame, id(report)), report)
    return [found[key] for key in sorted(found, key=lambda key: key[0])]
