"""Generated code calls opaque ops as plain functions, in every graph, with the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code, run_fw_bw_and_get_code
from torch.nn import functional as F

from aiter_inductor.core import direct
from aiter_inductor.core.op import OPS, Provider, accept

FP8 = torch.float8_e4m3fn


@pytest.fixture
def opaque_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every op is computed on the CPU by its reference, unseen by Inductor; names are noted."""
    calls: list[str] = []

    def noting(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return reference(*args, **kwargs)

        return run

    for name, op in OPS.items():
        run = noting(name, op.reference)
        made = Provider("cpp", run, None, accept, accept, traceable=False)
        monkeypatch.setitem(op.providers, "cpp", made)
        monkeypatch.delitem(direct.__dict__, name, raising=False)  # it remembers its providers
    yield calls
    for name in OPS:
        vars(direct).pop(name, None)


def norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, 1e-6)


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    return (x.float() / scale).to(FP8), scale


def add_norm_quant(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = x + r
    return (*per_token(norm(total, w)), total)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def test_a_call_with_several_results_and_a_dtype(opaque_calls):
    x, r, w = rows(6, 64), rows(6, 64, 1)[..., 0], rows(64)
    expected = add_norm_quant(x, r, w)
    compiled = torch.compile(add_norm_quant, backend="aiter")
    found, (code,) = run_and_get_code(compiled, x, r, w)
    assert opaque_calls == ["add_rms_norm_quant"]
    assert "aiter_inductor_direct.add_rms_norm_quant(" in code
    assert "= torch.ops.aiter_inductor" not in code
    assert "torch.float8_e4m3fn" in code
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.13, atol=1e-5)


def test_forward_and_backward_of_a_training_step(opaque_calls):
    x, w = rows(6, 64).requires_grad_(), rows(64).requires_grad_()
    norm(x, w).square().sum().backward()
    expected = [x.grad, w.grad]
    x.grad = w.grad = None
    compiled = torch.compile(norm, backend="aiter")
    _, codes = run_fw_bw_and_get_code(lambda: compiled(x, w).square().sum())
    assert [code.count("= aiter_inductor_direct.") for code in codes] == [1, 1]
    assert opaque_calls == ["rms_norm", "rms_norm_backward"]
    torch.testing.assert_close([x.grad, w.grad], expected)


def test_an_open_shape(opaque_calls):
    compiled = torch.compile(norm, backend="aiter", dynamic=True)
    for size in (3, 5):
        x, w = rows(size, 64), rows(64)
        torch.testing.assert_close(compiled(x, w), norm(x, w))
    assert opaque_calls == ["rms_norm", "rms_norm"]


def test_a_branch_is_a_graph_of_its_own(opaque_calls):
    def program(x: Tensor, w: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x, w: norm(x, w), lambda x, w: x * w, (x, w))

    x, w = rows(6, 64).abs(), rows(64)
    torch.testing.assert_close(torch.compile(program, backend="aiter")(x, w), norm(x, w))
    assert opaque_calls == ["rms_norm"]


def test_a_call_that_names_no_provider_selects_one_while_it_is_compiled(opaque_calls):
    def program(x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = torch.ops.aiter_inductor.rms_norm(x, w, 1e-6)
        return out

    x, w = rows(6, 64), rows(64)
    found, (code,) = run_and_get_code(torch.compile(program, backend="aiter"), x, w)
    assert "= aiter_inductor_direct.rms_norm(" in code
    assert "provider='cpp')" in code
    torch.testing.assert_close(found, norm(x, w))


def test_an_unknown_op_is_an_error():
    with pytest.raises(AttributeError, match="no op is called 'rms_norms'"):
        direct.rms_norms  # noqa: B018
