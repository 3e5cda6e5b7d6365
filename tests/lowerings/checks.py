"""What every op's tests share: an oracle in float64, comparison, layouts, opcheck, gradcheck.

Quantised results are dequantised before they are compared: an element may lie one step of its
format beside the oracle's, because a tie or a scale rounded the other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.op import Op

QUANTISED = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8)


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the exact one, and why that far."""

    rtol: float
    atol: float
    reason: str


TOLERANCE = {
    torch.float64: Tolerance(1e-12, 1e-12, "the oracle's own dtype: only the order of a sum"),
    torch.float32: Tolerance(2e-5, 2e-5, "sums of up to 65536 float32 terms, rsqrt to 2 ulp"),
    torch.bfloat16: Tolerance(2**-7, 2**-7, "one rounding to 8 bits, and one on the way"),
    torch.float16: Tolerance(2**-10, 2**-10, "one rounding to 11 bits, and one on the way"),
    torch.float8_e4m3fn: Tolerance(2**-3, 2**-9, "one step of 3 mantissa bits; below, subnormal"),
    torch.float8_e4m3fnuz: Tolerance(2**-3, 2**-10, "one step of 3 mantissa bits; as e4m3fn"),
    torch.int8: Tolerance(0.0, 1.0, "one integer step"),
}
"""By dtype of the result. Quantised rows: atol is in steps of the format, times the scale."""


def in_float64(value: Any) -> Any:
    """`value` with every float tensor in it as float64; others unchanged."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64)
    return value


def oracle(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The reference in float64; only for formulas without roundings on the way."""
    return op.reference(*map(in_float64, args), **kwargs)


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """`q * scale` in float64, the scale spread over the rows or the groups of a row.

    Args:
        q: [*, N], fp8 or int8.
        scale: [], [1], [*, 1] or [*, N / group_size].
    """
    if scale.dim() == q.dim() and scale.shape[-1] not in (1, q.shape[-1]):
        scale = scale.repeat_interleave(q.shape[-1] // scale.shape[-1], -1)
    return q.to(torch.float64) * scale.to(torch.float64)


def assert_close(actual: Any, expected: Any, *, loosen: float = 1.0, what: str = "") -> None:
    """Compare results of one op: tensors, or tuples in which a scale follows a quantised tensor.

    Args:
        actual: what the kernel or the compiled graph gave.
        expected: what the reference or the oracle gave; may be of wider dtype.
        loosen: factor on the tolerances, for chains of more than one op.
        what: named in the failure.
    """
    actual = actual if isinstance(actual, tuple | list) else (actual,)
    expected = expected if isinstance(expected, tuple | list) else (expected,)
    assert len(actual) == len(expected), f"{what}: {len(actual)} results, not {len(expected)}"
    position = 0
    while position < len(actual):
        ours, theirs = actual[position], expected[position]
        label = f"{what} result {position}"
        if ours.dtype in QUANTISED and position + 1 < len(actual):
            scales = actual[position + 1], expected[position + 1]
            if scales[0].dtype == torch.float32:
                _assert_quantised(ours, scales[0], theirs, scales[1], loosen, label)
                position += 2
                continue
        if ours.dtype in QUANTISED:
            one = torch.ones((), device=ours.device)
            _assert_quantised(ours, one, theirs, one, loosen, label)
        else:
            _assert_near(ours, theirs, loosen, label)
        position += 1


def assert_same_layout(actual: Any, expected: Any) -> None:
    """Shapes, dtypes and strides of results agree: what a fake function promises."""
    actual = actual if isinstance(actual, tuple | list) else (actual,)
    expected = expected if isinstance(expected, tuple | list) else (expected,)
    for position, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        found = (tuple(ours.shape), ours.dtype, _strides(ours))
        promised = (tuple(theirs.shape), theirs.dtype, _strides(theirs))
        assert found == promised, f"result {position} is {found}, promised {promised}"


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`x` [A, B, N] with equal values in memory orders that models produce."""
    a, b, n = x.shape
    yield "contiguous", x.contiguous()
    yield "permuted", x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((a, b, n + 24), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 8 : n + 8] = x
    yield "cut out of wider rows", wide[..., 8 : n + 8]
    tall = torch.full((a, b + 3, n), torch.nan, dtype=x.dtype, device=x.device)
    tall[:, 1 : b + 1] = x
    yield "cut out of more rows", tall[:, 1 : b + 1]
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    yield "one element past alignment", shifted.copy_(x)


def opcheck(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """torch's own checks of the schema, the fake function, autograd and dynamic shapes."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    if op.differentiable:
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.overload, args, dict(kwargs), test_utils=tests)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def gradcheck(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The registered gradient against differences of the reference, in float64."""
    inputs = [
        value.detach().clone().requires_grad_() if _is_float(value) else value
        for value in map(in_float64, args)
    ]
    assert torch.autograd.gradcheck(lambda *given: op(*given, **kwargs), inputs)


def _assert_quantised(
    q: Tensor, scale: Tensor, expected_q: Tensor, expected_scale: Tensor, loosen: float, what: str
) -> None:
    tolerance = TOLERANCE[q.dtype]
    _assert_near(scale, expected_scale, loosen, f"{what} (scale)", like=torch.bfloat16)
    steps = torch.ones_like(q, dtype=torch.float64) * tolerance.atol
    near = Tolerance(tolerance.rtol * loosen, 0.0, tolerance.reason)
    _assert_within(
        dequantise(q, scale),
        dequantise(expected_q, expected_scale),
        near,
        what,
        allowed=dequantise(steps, scale) * loosen,
    )


def _assert_near(
    actual: Tensor, expected: Tensor, loosen: float, what: str, like: torch.dtype | None = None
) -> None:
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, not {expected.shape}"
    if not actual.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=what)
        return
    known = TOLERANCE[like or actual.dtype]
    scaled = Tolerance(known.rtol * loosen, 0.0 if like else known.atol * loosen, known.reason)
    _assert_within(actual.double(), expected.double(), scaled, what)


def _assert_within(
    actual: Tensor, expected: Tensor, near: Tolerance, what: str, allowed: Tensor | float = 0.0
) -> None:
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places"
    infinite = expected.isinf() | actual.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), f"{what}: other infinities"
    slack = near.atol + allowed + near.rtol * expected.abs()
    excess = torch.where(expected.isfinite(), (actual - expected).abs() - slack, -1.0).flatten()
    at = int(excess.argmax()) if excess.numel() else 0
    assert not excess.numel() or excess[at] <= 0, (
        f"{what}: element {at} is {actual.flatten()[at].item()}, "
        f"expected {expected.flatten()[at].item()} ({near.reason})"
    )


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides that matter: those of dimensions longer than 1."""
    return tuple(s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1) if x.numel() else ()
