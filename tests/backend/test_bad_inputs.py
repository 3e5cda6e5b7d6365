"""What no kernel takes: the result is eager's, or the error is the one plain Inductor gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import aiter_inductor
from tests.backend.bad_inputs import INPUTS, PROGRAMS, W, assert_same, normal


def outcome(run: Callable[..., Any], x: Any, w: Any) -> Any:
    """What it returns, or the exception it raises."""
    try:
        return run(x, w)
    except Exception as error:  # noqa: BLE001  which one is what the tests are about
        return error


@pytest.mark.parametrize(("program", "given"), itertools.product(PROGRAMS, INPUTS))
def test_result_or_error_is_eagers(
    program: str, given: str, every_op_taken: None, without_codegen: None
) -> None:
    run, inputs = PROGRAMS[program], INPUTS[given]
    wanted = outcome(run, *inputs)
    found = outcome(torch.compile(run, backend="aiter"), *inputs)
    if not isinstance(wanted, Exception) and not isinstance(found, Exception):
        assert_same(found, wanted)
        return
    torch._dynamo.reset()
    theirs = outcome(torch.compile(run), *inputs)
    assert type(found) is type(theirs), f"{found!r}, plain Inductor's: {theirs!r}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_generated_code_gives_eagers_result(program: str, every_op_taken: None) -> None:
    """Inductor's own code for a few inputs at once, of other strides, values and sizes."""
    run = PROGRAMS[program]
    chosen = [INPUTS[name] for name in ("last_dim_strided", "inf", "no_rows", "all_float64")]

    def all_of_them(inputs: list[tuple[Any, Any]]) -> list[Any]:
        return [run(x, w) for x, w in inputs]

    found = torch.compile(all_of_them, backend="aiter", fullgraph=True)(chosen)
    assert_same(found, all_of_them(chosen))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("given", ["no_rows", "no_columns", "zero_d", "weight_of_rank_three"])
def test_dynamic_shapes(
    program: str, given: str, every_op_taken: None, without_codegen: None
) -> None:
    """What a compiled function meets after it was compiled with good inputs of any size."""
    run, inputs = PROGRAMS[program], INPUTS[given]
    compiled = torch.compile(run, backend="aiter", dynamic=True)
    assert_same(compiled(normal(5, 16), W), run(normal(5, 16), W))
    wanted, found = outcome(run, *inputs), outcome(compiled, *inputs)
    if isinstance(wanted, Exception):
        assert isinstance(found, Exception)
    else:
        assert_same(found, wanted)


@pytest.mark.parametrize("program", PROGRAMS)
def test_fp8_arithmetic_fails_as_eager_does(program: str) -> None:
    """Planning must not stumble over what cannot be computed: capture or eager says so."""
    x = normal(6, 16).to(torch.float8_e4m3fn)
    said = outcome(
        lambda x, w: aiter_inductor.explain(PROGRAMS[program], x, w, target="gfx950"), x, W
    )
    torch._dynamo.reset()
    wanted = outcome(torch.compile(PROGRAMS[program], backend="eager"), x, W)
    assert type(said) is (type(wanted) if isinstance(wanted, Exception) else aiter_inductor.Report)
