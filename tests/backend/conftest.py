"""Make every op taken on the CPU, so that the whole path through Inductor runs without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor import compile_fx

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


@pytest.fixture
def without_codegen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor stops before it generates code: its ATen graphs run as they are.

    Everything this backend has a part in happens all the same: capture, planning, rewriting,
    autograd, decomposition and partitioning. It saves the seconds a C++ compiler takes.
    """
    stopped = functools.partial(compile_fx.compile_fx, inner_compile=_as_it_is)
    monkeypatch.setattr(compile_fx, "compile_fx", stopped)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def _as_it_is(
    gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    return gm.forward


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Compiled code of one test must not serve the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
