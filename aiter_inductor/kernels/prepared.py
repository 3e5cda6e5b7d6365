"""Launches prepared once for all calls whose arguments have the same facts.

A kernel's variant, its grid, its strides and its tensor maps follow from what `facts_of` reads;
what is left of a call is to make its outputs and to pass addresses. Most of what a call costs the
host is Python that finds out the former: see benchmarks/host_time.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor

from aiter_inductor.kernels.hip.loading import arch_name

ALIGN_BYTES = 16
"""Of an address; facts tell what is left over. No access and no tensor map asks for more."""
MOST_PLANS = 4096
"""That one kernel family keeps: a cache that grows by a token has other strides at each step."""

Plan = TypeVar("Plan")


def facts_of(first: Tensor, *others: Tensor | None) -> tuple[object, ...]:
    """What a launch follows from: the chip, and dtype, sizes, strides and alignment of each."""
    place: object = first.get_device()
    if place == -1:
        place = arch_name(first.device), first.device.type
    facts = [place, first.dtype, first.shape, first.stride(), first.data_ptr() % ALIGN_BYTES]
    for x in others:
        if x is None:
            facts.append(None)
        else:
            facts += (x.dtype, x.shape, x.stride(), x.data_ptr() % ALIGN_BYTES)
    return tuple(facts)


class Plans(dict[object, Plan]):
    """Plans by facts, and by whatever else they were made from."""

    def keep(self, key: object, plan: Plan) -> Plan:
        """Remember `plan`, the oldest making room for it."""
        if len(self) >= MOST_PLANS:
            self.pop(next(iter(self)), None)
        self[key] = plan
        return plan


def same_memory(given: Iterable[Tensor | None], taken: Iterable[Tensor | None]) -> bool:
    """Whether a kernel that takes `taken` may be passed `given`: none of them is a copy."""
    return all(_address(a) == _address(b) for a, b in zip(given, taken, strict=True))


def _address(x: Tensor | None) -> tuple[object, ...] | None:
    return None if x is None else (x.dtype, x.data_ptr())
