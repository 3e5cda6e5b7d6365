"""Row kernels compile for every chip, read 16 bytes at a time and spill nothing."""

from __future__ import annotations

import re

import pytest
import sympy
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from aiter_inductor.kernels.triton import (
    norm,
    norm_backward,
    norm_kernel,
    norm_quant,
    quant,
)
from aiter_inductor.kernels.triton.launch import launchable
from tests.kernels.triton.compiled import TARGETS, compiled

MODULES = [norm_kernel, norm_backward, quant]
WIDE_LOAD = {
    "sm_90": re.compile(r"ld\.global\S*\.v(4\.b32|2\.b64)"),
    "gfx942": re.compile(r"(global|buffer)_load_dwordx4"),
    "gfx950": re.compile(r"(global|buffer)_load_dwordx4"),
}


def fp8_of(target):
    return torch.float8_e4m3fnuz if target == "gfx942" else torch.float8_e4m3fn


def calls(target, N):
    return calls_of(torch.randn(512, N).bfloat16(), fp8_of(target))


def calls_of(x, dtype):
    residual, N = torch.empty_like(x), x.shape[-1]
    weight, bias = x.new_empty(N), x.new_empty(N)
    fp8 = {"dtype": dtype}
    return {
        "rms_norm": lambda: norm.rms_norm(x, weight, 1e-6, round_before_weight=True),
        "layer_norm": lambda: norm.layer_norm(x, weight, bias, 1e-6),
        "rms_norm_quant": lambda: norm_quant.rms_norm_quant(x, weight, 1e-6, **fp8),
        "add_rms_norm_quant_group": lambda: norm_quant.add_rms_norm_quant(
            x, residual, weight, 1e-6, group_size=128, **fp8
        ),
        "layer_norm_quant": lambda: norm_quant.layer_norm_quant(x, weight, bias, 1e-6, **fp8),
        "rms_norm_quant_int8": lambda: norm_quant.rms_norm_quant(x, weight, 1e-6, dtype=torch.int8),
        "rms_norm_backward": lambda: norm_backward.rms_norm_backward(x, x, weight, 1e-6),
        "layer_norm_backward": lambda: norm_backward.layer_norm_backward(x, x, weight, 1e-6),
        "quant_per_token": lambda: quant.quant_per_token(x, **fp8),
        "quant_per_group": lambda: quant.quant_per_group(x, group_size=128, **fp8),
        "quant_per_tensor": lambda: quant.quant_per_tensor(x, **fp8),
        "quant_int4_per_group": lambda: quant.quant_int4_per_group(x, group_size=128),
    }


NAMES = list(calls("sm_90", 128))


@pytest.mark.parametrize("N", [128, 4096, 7168, 16384])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_with_wide_loads_and_no_spills(target, name, N):
    for kernel in compiled(MODULES, calls(target, N)[name], target):
        text = kernel.asm.get("amdgcn") or kernel.asm["ptx"]
        assert WIDE_LOAD[target].search(text), f"{kernel.name} has no 16-byte load"
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
        assert spilled is None or int(spilled[1]) == 0, f"{kernel.name}: {spilled[0].strip()}"


@pytest.mark.parametrize("name", NAMES)
def test_traces_with_any_number_of_rows(name):
    def run(x):
        return calls_of(x, torch.float8_e4m3fn)[name]()

    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    symbolic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(6, 256).bfloat16(), symbolic_context=symbolic)
    with mode:
        graph = make_fx(run)(x).graph
    launches = [n for n in graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(launches) == (2 if name == "quant_per_tensor" else 1)
    rows = next(iter(x.shape[0].node.expr.free_symbols))
    fixed = [guard.expr for guard in environment.guards if rows in guard.expr.free_symbols]
    assert not [expr for expr in fixed if isinstance(expr, sympy.Eq)], fixed


def test_a_kernel_is_wrapped_only_while_a_graph_is_traced():
    assert launchable(norm_kernel.norm_kernel) is norm_kernel.norm_kernel
    with FakeTensorMode():
        assert launchable(norm_kernel.norm_kernel) is not norm_kernel.norm_kernel
