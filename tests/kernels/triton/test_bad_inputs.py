"""Odd inputs that planning gives to Triton kernels: what they take, they compute as eager does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from aiter_inductor.backend import plan_module
from aiter_inductor.core import inductor
from aiter_inductor.core.config import Options
from aiter_inductor.core.rewrite import apply
from tests.backend.bad_inputs import INPUTS, PROGRAMS, assert_same

NOT_HERE = ("meta", "mixed_devices")


@pytest.mark.parametrize(
    ("program", "given"), itertools.product(PROGRAMS, sorted(INPUTS.keys() - set(NOT_HERE)))
)
def test_taken_or_left_the_result_is_eagers(program: str, given: str) -> None:
    run, inputs = PROGRAMS[program], INPUTS[given]
    try:
        wanted = run(*inputs)
    except (RuntimeError, AttributeError, IndexError, TypeError, ValueError) as error:
        pytest.skip(f"eager refuses: {error}")
    torch._dynamo.reset()
    assert_same(torch.compile(run, backend=planned_for_gfx950)(*inputs), wanted)


def planned_for_gfx950(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that rewrites for a chip that converts to fp8 e4m3fn, and compiles nothing."""
    options = Options(force=True, strict=True, target="gfx950")
    for graph, plan in plan_module(gm, options).items():
        with inductor.fake_mode_of(graph):
            apply(graph, plan.decisions)
    inductor.recompile(gm)
    return gm.forward
