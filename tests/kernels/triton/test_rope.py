"""Rotary kernels against their references, under the interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.kernels.triton.rope import RopeConfig
from aiter_inductor.lowerings.rope import qk_norm_rope, rope, rope_qk
from aiter_inductor.lowerings.rope_problem import RopeProblem, rope_unsupported
from tests.lowerings.checks import assert_close, assert_same_layout

BF16, F32 = torch.bfloat16, torch.float32
STYLES = [
    {"interleaved_in": i, "interleaved_out": o, "transposed": t}
    for i, o, t in itertools.product([False, True], repeat=3)
]
BASE = RopeProblem(
    batch=2,
    num_tokens=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rotary_dim=32,
    table_batch=1,
    table_width=32,
    dtype=BF16,
    kv_dtype=BF16,
    table_dtype=BF16,
    out_dtype=BF16,
)


def check(op, args, kwargs, config=None):
    """Run the host function on memory filled with NaN and compare it with the reference."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    extra = {} if config is None else {"config": config}
    assert rope_unsupported(op.problem(*args, **kwargs), Use(arch_named("gfx942"))) is None
    try:
        actual = op.providers["triton"].run(*args, **kwargs, **extra)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = op.reference(*args, **kwargs)
    # A norm in front rounds once more, and its rounding is then rotated into both elements.
    assert_close(actual, expected, what=op.name, loosen=4.0 if op is qk_norm_rope else 1.0)
    assert_same_layout(actual, expected)


def check_problem(problem, config=None):
    args, kwargs = problem.sample(seed=0, device="cpu")
    if problem.weight_dtype is not None:
        return check(qk_norm_rope, args, kwargs, config)
    check(rope_qk, args, kwargs, config)
    return check(rope, (args[0], *args[2:]), kwargs, config)


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("width", [16, 32])
def test_styles(style, width):
    check_problem(replace(BASE, **style, table_width=width))


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("width", [4, 8])
def test_partial(style, width):
    check_problem(replace(BASE, **style, head_dim=20, rotary_dim=8, table_width=width))


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_tokens": 1, "batch": 7},
        {"num_tokens": 0},
        {"batch": 0},
        {"num_heads": 9, "num_kv_heads": 1, "num_tokens": 3},
        {"head_dim": 96, "rotary_dim": 96, "table_width": 96},
        {"head_dim": 80, "rotary_dim": 20, "table_width": 10},
        {"head_dim": 256, "rotary_dim": 256, "table_width": 128, "num_tokens": 33},
        {"head_dim": 192, "rotary_dim": 192, "table_width": 192, "table_batch": 2},
        {"tokens_before_heads": True},
        {"tokens_before_heads": True, "table_batch": 2, "num_tokens": 1},
        {"tokens_before_heads": True, "num_tokens": 1, "num_kv_heads": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_sizes(sizes, interleaved):
    style = {"interleaved_in": interleaved, "interleaved_out": interleaved}
    check_problem(replace(BASE, **style, **sizes))


@pytest.mark.parametrize("config", [RopeConfig(1, 1, 1), RopeConfig(2, 8, 2), RopeConfig(16, 2, 4)])
def test_configs(config):
    check_problem(BASE, config)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
@pytest.mark.parametrize("table_dtype", [BF16, F32])
@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, F32])
def test_dtypes(dtype, table_dtype, out_dtype):
    dtypes = {"dtype": dtype, "kv_dtype": dtype, "table_dtype": table_dtype, "out_dtype": out_dtype}
    check_problem(replace(BASE, **dtypes))
    args, kwargs = replace(BASE, **dtypes).sample(seed=0, device="cpu")
    check(rope_qk, args, kwargs | {"out_dtype": None})


@pytest.mark.parametrize("style", STYLES[::2], ids=str)
@pytest.mark.parametrize("rotary_dim", [8, 32])
@pytest.mark.parametrize(
    "norm",
    [
        {"weight_dtype": BF16, "round_before_weight": True},
        {"weight_dtype": F32, "round_before_weight": True, "weight_offset": 1.0},
        {"weight_dtype": BF16, "weight_offset": 1.0},
        {"weight_dtype": F32},
    ],
    ids=str,
)
def test_qk_norm_rope(style, rotary_dim, norm):
    widths = {"rotary_dim": rotary_dim, "table_width": rotary_dim}
    check_problem(replace(BASE, **style, **norm, **widths))


def test_complex_tables_and_cut_heads():
    """DeepSeek-V2: cos and sin are the parts of complex numbers, q the tail of wider heads."""
    freqs = torch.view_as_real(torch.polar(torch.ones(1, 1, 5, 8), torch.rand(1, 1, 5, 8)))
    q = torch.randn(2, 5, 4, 48).to(BF16).transpose(1, 2)[..., 32:]
    k = torch.randn(2, 1, 5, 16).to(BF16)
    style = {"interleaved_in": True, "interleaved_out": True, "out_dtype": BF16}
    check(rope_qk, (q, k, freqs[..., 0], freqs[..., 1]), style)


@pytest.mark.parametrize("shape", [(5, 32), (4, 5, 32), (2, 4, 5, 32)])
@pytest.mark.parametrize("table_shape", [(5, 32), (1, 5, 32), (1, 1, 5, 32), (1, 1, 1, 16)])
def test_fewer_dimensions(shape, table_shape):
    x, table = torch.randn(shape).to(BF16), torch.rand(table_shape).to(BF16)
    if len(table_shape) <= len(shape):
        check(rope, (x, table, table * 2), {})


def test_expanded_and_contiguous_heads():
    x = torch.randn(2, 1, 5, 32).to(BF16)
    table = torch.rand(2, 1, 5, 32).to(BF16)
    check(rope_qk, (x.expand(2, 4, 5, 32), x.expand(2, 3, 5, 32).contiguous(), table, table), {})


def test_nan_and_infinity_stay_in_their_pair():
    args, kwargs = BASE.sample(seed=0, device="cpu")
    args[0][0, 1, 2, 3], args[1][1, 0, 4, 30] = torch.nan, torch.inf
    check(rope_qk, args, kwargs)
