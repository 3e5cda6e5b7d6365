"""Operators of this package that a program calls by name are sites like any other."""

from __future__ import annotations

import pytest
import torch

import aiter_inductor
from aiter_inductor.backend import plan_module
from aiter_inductor.core import inductor
from aiter_inductor.core.config import Options
from aiter_inductor.core.rewrite import apply
from aiter_inductor.lowerings.attention import attention
from tests.patterns.rewrite_check import check_rewrite

BF16 = torch.bfloat16
OFF = Options(disable=frozenset({"rms_norm"}), target="gfx942")
OPTIONS = {"softcap": 30.0, "causal": "top_left", "scale": 0.125}


def heads(number):
    torch.manual_seed(number)
    return torch.randn(2, number, 40, 64, dtype=BF16)


def capped(q, k, v):
    return attention(q, k, v, None, None, layout="bshd", **OPTIONS).transpose(1, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_call_gets_a_kernel(dynamic):
    found = check_rewrite(
        capped, heads(8), heads(2), heads(2), expect={"attention": 1}, dynamic=dynamic
    )
    assert found.inserted == 1


def normed(x):
    return torch.ops.aiter_inductor.rms_norm(x, None, 1e-6)


def test_two_results():
    def program(x):
        q, scale = torch.ops.aiter_inductor.quant_per_token(x, dtype=torch.float8_e4m3fnuz)
        return q.float() * scale

    check_rewrite(program, torch.randn(5, 256, dtype=BF16), expect={"quant_per_token": 1})


def test_a_named_provider_stays():
    def program(x):
        return torch.ops.aiter_inductor.rms_norm(x, None, 1e-6, provider="reference")

    check_rewrite(program, torch.randn(5, 256), expect={})


def test_what_nobody_takes_is_the_reference():
    """The report and the graph agree: a call that the plan leaves is not selected once more."""
    seen = []

    def backend(gm, inputs):
        for graph, planned in plan_module(gm, OFF).items():
            with inductor.fake_mode_of(graph):
                assert apply(graph, planned.decisions) == 1
            seen.extend(n.kwargs.get("provider") for n in graph.nodes if n.op == "call_function")
        return gm.forward

    torch._dynamo.reset()
    torch.compile(normed, backend=backend)(torch.randn(3, 64))
    assert seen == ["reference"]


def test_the_report_counts_it():
    report = aiter_inductor.explain(normed, torch.randn(3, 64), target="gfx942")
    assert report.count("rms_norm", "fused") == 1
