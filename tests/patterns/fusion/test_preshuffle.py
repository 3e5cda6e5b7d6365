"""Weights that freezing makes constants are laid out once; others are read as they are."""

from __future__ import annotations

import re

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn

import aiter_inductor
from aiter_inductor.core.op import Provider, accept
from aiter_inductor.lowerings.gemm_preshuffled import gemm_fp8_blockscale_preshuffled
from tests.patterns.rewrite_check import check_rewrite

N, K = 272, 256


def model(scheme="fp8_blockscale", features=N, layout="rows"):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(K, features, dtype=torch.bfloat16))
    return aiter_inductor.quantize_(made, scheme, layout=layout).requires_grad_(False)


def rows():
    return torch.randn(5, K, dtype=torch.bfloat16)


def fused(made, target="gfx950"):
    report = aiter_inductor.explain(made, rows(), target=target)
    return [site.fused_into for site in report.sites if site.pattern.startswith("gemm")], report


@pytest.mark.parametrize("scheme", ["fp8_blockscale", "fp8_rowwise"])
@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_a_frozen_weight_is_laid_out(scheme, target):
    with torch.no_grad(), inductor_config.patch(freezing=True):
        names, report = fused(model(scheme), target)
    assert names == [f"gemm_{scheme}_preshuffled"]
    assert "layout=16x16" in report.sites[-1].problem


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("scheme", ["fp8_blockscale", "fp8_rowwise"])
def test_a_weight_that_is_stored_in_tiles_is_read_as_it_is(scheme, dynamic):
    """Without freezing; the operator gets the buffer, and nothing rearranges it."""
    made = model(scheme, layout="16x16")
    with torch.no_grad():
        names, report = fused(made, "gfx942")
        assert names == [f"gemm_{scheme}_preshuffled"]
        assert "layout=16x16" in report.sites[-1].problem
        expect = {f"quant_per_{'group' if 'block' in scheme else 'token'}": 1, f"gemm_{scheme}": 1}
        rewritten = check_rewrite(made, rows(), expect=expect, dynamic=dynamic).graphs[0]
    call = next(line for line in rewritten.splitlines() if f"gemm_{scheme}_preshuffled" in line)
    assert "_buffers_weight_" in call.partition("args = (")[2].split(",")[1]
    assert re.search(r"flatten\w* : \[num_users=0\]", rewritten)


@pytest.mark.parametrize("shape", [(N // 16, 16 * K // 2, 2), (N // 8, 8 * K)], ids=str)
def test_another_order_is_not_taken_for_tiles(shape):
    """A weight put together from other pieces."""

    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model()[0]
            self.layer.weight = self.layer.weight.reshape(shape)
            self.layer.rows = self.put_together

        def put_together(self):
            pieces = self.layer.weight.reshape(N // 8, K // 32, 8, 32)
            return pieces.transpose(1, 2).reshape(N, K)

        def forward(self, x):
            return self.layer(x)

    with torch.no_grad():
        assert fused(Pieces())[0] == ["gemm_fp8_blockscale"]


def test_a_weight_that_may_change_is_not():
    with torch.no_grad():
        assert fused(model())[0] == ["gemm_fp8_blockscale"]
    with inductor_config.patch(freezing=True):
        assert fused(model())[0] == ["gemm_fp8_blockscale"], "freezing is for inference only"


def test_other_chips_read_rows():
    with torch.no_grad(), inductor_config.patch(freezing=True):
        assert fused(model(), "sm_90")[0] == ["gemm_fp8_blockscale"]


def test_a_weight_not_made_of_tiles_is_a_near_miss():
    with torch.no_grad(), inductor_config.patch(freezing=True):
        names, report = fused(model(features=200))
    assert names == ["gemm_fp8_blockscale"]
    sentence = "preshuffle at 0: a weight [200, 256] is not made of tiles of 16 x 16"
    assert sentence in report.notes


def test_the_compiled_graph_holds_the_tiles(monkeypatch):
    """The reference stands in for the kernel, unseen by Inductor, as on a chip that has one."""
    run = gemm_fp8_blockscale_preshuffled.reference
    stand_in = Provider("torch", run, ("cpu",), accept, accept, traceable=False)
    monkeypatch.setitem(gemm_fp8_blockscale_preshuffled.providers, "torch", stand_in)
    arguments = []

    def look(graph):
        wanted = gemm_fp8_blockscale_preshuffled.overload
        arguments.extend(node.args[1] for node in graph.nodes if node.target is wanted)

    made, x = model(), rows()
    with torch.no_grad(), inductor_config.patch(freezing=True, fx_graph_cache=False):
        fast = torch.compile(made, backend="aiter", options={"post_grad_custom_pre_pass": look})
        out = fast(x)
        torch.testing.assert_close(out, made(x), rtol=0.016, atol=0.01)
    assert [node.op for node in arguments] == ["get_attr"]
    assert arguments[0].meta["val"].shape == (N // 16, 16 * K)
