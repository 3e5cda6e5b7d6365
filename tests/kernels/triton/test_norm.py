"""Every normalising Triton kernel against its reference, under the interpreter."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.core.op import OPS
from aiter_inductor.kernels.triton.rows import RowConfig
from aiter_inductor.lowerings import norm, norm_quant  # noqa: F401  registers the ops
from tests.lowerings.checks import assert_close, assert_same_layout, layouts

FP8 = torch.float8_e4m3fn
FNUZ = torch.float8_e4m3fnuz
CONFIGS = {
    "default": None,
    "chunks that divide": RowConfig(block=128, rows=1, num_warps=1),
    "masked chunks": RowConfig(block=256, rows=1, num_warps=1),
    "several rows": RowConfig(block=1024, rows=4, num_warps=1),
    "few programs, weight late": RowConfig(512, rows=2, num_warps=1, programs=2, late=True),
}


def tensors(rows, N, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, N, generator=generator)
    residual = torch.randn(rows, N, generator=generator)
    weight, bias = torch.randn(2, N, generator=generator)
    made = {"x": x * 3, "residual": residual, "weight": 1 + weight / 8, "bias": bias / 8}
    return {name: t.to(dtype) for name, t in made.items()} | {
        "eps": 1e-6,
        "scale": torch.tensor([0.02]),
        "grad": torch.randn(rows, N, generator=generator).to(dtype),
        "grad_sum": torch.randn(rows, N, generator=generator).to(dtype),
    }


def arguments(name, given):
    parameters = OPS[name].signature.parameters.values()
    return tuple(given[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY)


def check(name, given, *, layout=True, **kwargs):
    op, config = OPS[name], kwargs.pop("config", None)
    args = arguments(name, given)
    expected = op.reference(*args, **kwargs)
    extra = {} if config is None else {"config": config}
    actual = run_kernel(op, *args, **kwargs, **extra)
    assert_close(actual, expected, what=name)
    if layout:
        assert_same_layout(actual, expected)


def run_kernel(op, *args, **kwargs):
    """The host function with outputs poisoned: what `empty` returns is NaN all over."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return op.providers["triton"].run(*args, **kwargs)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_norm(name, config, dtype):
    check(name, tensors(5, 640, dtype), config=config)


@pytest.mark.parametrize(
    "rows, N",
    [
        (0, 64),
        (1, 1),
        (3, 7),
        (2, 64),
        (33, 128),
        (2, 1000),
        (1, 7168),
        (2, 12288),
        (1, 20000),
        (1, 65536),
    ],
)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_norm_shapes(name, rows, N):
    check(name, tensors(rows, N))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rms_norm_quant"])
def test_rms_norm_flavours(name, weight_dtype, first, offset):
    given = tensors(3, 256)
    given["weight"] = None if weight_dtype is None else given["weight"].to(weight_dtype)
    kwargs = {"dtype": FP8} if "quant" in name else {}
    check(name, given, weight_offset=offset, round_before_weight=first, **kwargs)


@pytest.mark.parametrize("first", [False, True])
def test_round_before_weight_is_bitwise(first):
    given = tensors(8, 512)
    args = arguments("rms_norm", given)
    expected = OPS["rms_norm"].reference(*args, round_before_weight=first)
    actual = run_kernel(OPS["rms_norm"], *args, round_before_weight=first)
    assert (actual != expected).float().mean() < 0.01


def test_out_dtype_and_mixed_residual():
    given = tensors(3, 256)
    given["residual"] = given["residual"].float()
    check("add_rms_norm", given, out_dtype=torch.bfloat16)
    check("rms_norm", given, out_dtype=torch.float32)
    check("layer_norm", given, out_dtype=torch.float32)


@pytest.mark.parametrize("missing", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_layer_norm_without(missing):
    given = tensors(3, 320) | dict.fromkeys(missing)
    check("layer_norm", given)
    check("layer_norm_quant", given, dtype=FP8)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "rms_norm_quant", "layer_norm_quant"])
def test_layouts(name):
    given = tensors(12, 192)
    kwargs = {"dtype": FP8} if "quant" in name else {}
    for _, x in layouts(given["x"].view(3, 4, 192)):
        check(name, given | {"x": x}, **kwargs)


def test_residual_in_another_layout():
    given = tensors(12, 192)
    given = {n: t.view(3, 4, 192) if n in ("x", "residual") else t for n, t in given.items()}
    for _, residual in layouts(given["residual"]):
        check("add_rms_norm", given | {"residual": residual})
        check("add_rms_norm_quant", given | {"residual": residual}, dtype=FP8, group_size=64)


@pytest.mark.parametrize("dtype", [FP8, FNUZ, torch.int8])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("group_size", [None, 64, 128])
@pytest.mark.parametrize("name", ["rms_norm_quant", "add_rms_norm_quant", "layer_norm_quant"])
def test_norm_quant(name, group_size, config, dtype):
    check(name, tensors(5, 640), dtype=dtype, group_size=group_size, config=config)


@pytest.mark.parametrize("rows, N", [(0, 128), (33, 128), (2, 1024), (1, 7168), (1, 32768)])
@pytest.mark.parametrize("group_size", [None, 128])
def test_norm_quant_shapes(rows, N, group_size):
    check("add_rms_norm_quant", tensors(rows, N), dtype=FP8, group_size=group_size)


@pytest.mark.parametrize("dtype", [FP8, FNUZ, torch.int8])
@pytest.mark.parametrize("stem", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_norm_quant_static(stem, dtype):
    check(f"{stem}_quant_static", tensors(5, 640), dtype=dtype)


@pytest.mark.parametrize("round_norm", [True, False])
def test_round_norm(round_norm):
    check("rms_norm_quant", tensors(5, 640), dtype=FP8, round_norm=round_norm)


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("amax_min", [0.0, 1e-4])
def test_nan_infinity_and_zero_rows(group_size, amax_min):
    given = tensors(6, 256)
    given["x"][0, 3] = torch.nan
    given["x"][1, 7] = torch.inf
    given["x"][2] = 0
    given["x"][3, 64:128] = 0
    given["eps"] = 1e-6
    kwargs = {"dtype": FP8, "group_size": group_size, "amax_min": amax_min}
    check("rms_norm_quant", given, **kwargs)
    check("layer_norm_quant", given | {"bias": None}, **kwargs)


@pytest.mark.parametrize("rows, N", [(1, 64), (37, 192), (9, 2304)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stem", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_backward(stem, dtype, rows, N):
    given = tensors(rows, N, dtype)
    name = f"{stem}_backward"
    check(name, given)
    check(name, given | {"weight": None})
    if stem != "layer_norm":
        check(name, given, weight_offset=1.0)


def test_backward_sums_in_a_fixed_order():
    args = arguments("rms_norm_backward", tensors(64, 256))
    first, again = (run_kernel(OPS["rms_norm_backward"], *args)[1] for _ in range(2))
    assert torch.equal(first, again)
