"""A mistake of this package leaves a site to Inductor with a warning; strictly, it is raised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import aiter_inductor
from aiter_inductor import backend
from aiter_inductor.core.faults import PlanningFault
from aiter_inductor.core.op import OPS

NOT_STRICT = {"aiter.strict": False}


class TwoNorms(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.RMSNorm(64), torch.nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) + 1)


def broken(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("nobody foresaw this")


def broken_recogniser() -> Any:
    table = [
        replace(r, recognise=broken) if r.pattern == "rms_norm" else r for r in backend.RAISING
    ]
    return mock.patch.object(backend, "RAISING", table)


def broken_fusion() -> Any:
    rules = [replace(rule, ops=(OPS["rms_norm"],), fuse=broken) for rule in backend.FUSION[:1]]
    return mock.patch.object(backend, "FUSION", rules)


def broken_problem() -> Any:
    return mock.patch.object(OPS["rms_norm"], "problem", broken)


def broken_sites() -> Any:
    return mock.patch.object(backend, "sites_of", broken)


@pytest.fixture(autouse=True)
def quickly(every_op_taken: None, without_codegen: None) -> None:
    """Nothing here needs generated code."""


@pytest.mark.parametrize(
    ("breaking", "doing", "left"),
    [
        (broken_recogniser, "recognising rms_norm at first (test_faults.py:", "missed"),
        (broken_problem, "planning rms_norm at first (test_faults.py:", "inlined"),
    ],
)
def test_one_site_is_left(breaking: Callable[[], Any], doing: str, left: str) -> None:
    model, x = TwoNorms(), torch.randn(4, 64)
    compiled = torch.compile(model, backend="aiter", options=NOT_STRICT)
    with breaking(), pytest.warns(PlanningFault) as warned:
        torch.testing.assert_close(compiled(x), model(x))
    said = str(warned[0].message)
    assert said.startswith(doing)
    assert "raised KeyError: 'nobody foresaw this' [test_faults.py:" in said
    assert said.endswith("The option aiter.strict raises.")
    report = aiter_inductor.report(compiled)
    assert [(s.status, s.reason) for s in report.sites if s.pattern == "rms_norm"] == [(left, said)]
    assert report.count("layer_norm", "fused") == 1
    assert said in report.notes


def test_a_fusion_that_fails_leaves_its_parts() -> None:
    model, x = TwoNorms(), torch.randn(4, 64)
    compiled = torch.compile(model, backend="aiter", options=NOT_STRICT)
    with broken_fusion(), pytest.warns(PlanningFault, match="^fusing "):
        torch.testing.assert_close(compiled(x), model(x))
    report = aiter_inductor.report(compiled)
    assert (report.count("rms_norm", "fused"), report.count("layer_norm", "fused")) == (1, 1)


def test_a_report_that_fails_leaves_the_graph() -> None:
    model, x = TwoNorms(), torch.randn(4, 64)
    compiled = torch.compile(model, backend="aiter", options=NOT_STRICT)
    with broken_sites(), pytest.warns(PlanningFault, match="^planning graph 0 at "):
        torch.testing.assert_close(compiled(x), model(x))
    report = aiter_inductor.report(compiled)
    assert (report.sites, len(report.notes)) == ((), 1)


@pytest.mark.parametrize(
    "breaking", [broken_recogniser, broken_fusion, broken_problem, broken_sites]
)
@pytest.mark.parametrize("options", [None, {"aiter.strict": True}])
def test_strict_raises(breaking: Callable[[], Any], options: dict[str, bool] | None) -> None:
    compiled = torch.compile(TwoNorms(), backend="aiter", options=options)
    with breaking(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="KeyError"):
        compiled(torch.randn(4, 64))


def test_users_are_not_strict_unless_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AITER_INDUCTOR_STRICT")
    with broken_problem(), pytest.warns(PlanningFault):
        report = aiter_inductor.explain(TwoNorms(), torch.randn(4, 64), target="gfx942")
    assert report.count("rms_norm", "inlined") == 1
