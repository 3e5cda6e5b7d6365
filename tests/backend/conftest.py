"""Make every op taken on the CPU, so that the whole path through Inductor runs without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import aiter_inductor.backend  # noqa: F401  defines all ops
from aiter_inductor.core.op import OPS, Provider, accept


@pytest.fixture
def every_op_taken() -> Iterator[None]:
    """Each op gets a CPU provider that is its own reference, inlined below autograd."""
    added = [op for op in OPS.values() if "cpp" not in op.providers]
    for op in added:
        op.providers["cpp"] = Provider("cpp", op.reference, None, accept, accept, traceable=True)
    yield
    for op in added:
        del op.providers["cpp"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Compiled code of one test must not serve the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
