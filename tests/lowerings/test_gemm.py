"""Linears on quantised operands: references against float64, layouts, problems and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.problem import columns
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_blockscale,
    gemm_fp8_per_tensor,
    gemm_fp8_rowwise,
    gemm_int8,
    gemm_w8a16,
)
from aiter_inductor.lowerings.gemm_int4 import gemm_w4a16
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from tests.lowerings.checks import assert_close, assert_same_layout, layouts, opcheck

BF16, FN, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
WIDE = {"M": 6, "N": 200, "K": 320, "out_dtype": BF16, "bias_dtype": BF16}
BLOCKS = {"block_n": 128, "block_k": 128}
FP8 = {"dtype": FN, "weight_dtype": FN}
PROBLEMS = [
    (gemm_fp8_blockscale, GemmProblem(**WIDE, **FP8, **BLOCKS, scaling="block", group_size=128)),
    (gemm_fp8_rowwise, GemmProblem(**WIDE, **FP8, scaling="row")),
    (gemm_fp8_per_tensor, GemmProblem(**WIDE, **FP8, scaling="tensor")),
    (gemm_int8, GemmProblem(**WIDE, dtype=INT8, weight_dtype=INT8, scaling="row")),
    (gemm_w8a16, GemmProblem(**WIDE, dtype=BF16, weight_dtype=INT8, scaling="weight_row")),
    (
        gemm_w8a16,
        GemmProblem(**WIDE, **BLOCKS, dtype=BF16, weight_dtype=FN, scaling="weight_block"),
    ),
    (
        gemm_w4a16,
        GemmProblem(
            **WIDE, dtype=BF16, weight_dtype=torch.uint8, scaling="weight_group", group_size=64
        ),
    ),
    (
        gemm_w4a16,
        GemmProblem(
            **WIDE,
            dtype=BF16,
            weight_dtype=torch.uint8,
            scaling="weight_group",
            group_size=32,
            has_zero=True,
            offset_binary=True,
        ),
    ),
]
every_op = pytest.mark.parametrize(("op", "problem"), PROBLEMS, ids=lambda v: str(v)[:24])


def spread(scale, shape, blocks):
    """One scale an element, by index arithmetic."""
    rows, cols = (torch.arange(n) // b for n, b in zip(shape, blocks, strict=True))
    return scale.double()[rows[:, None], cols[None, :]]


def unpacked(packed, *, offset_binary=False):
    """Elements of nibbles in two's complement, or with 8 added, one at a time."""
    found = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.float64)
    for parity in range(2):
        nibble = (packed.to(torch.int64) >> (4 * parity)) % 16
        found[:, parity::2] = nibble - 8 if offset_binary else (nibble + 8) % 16 - 8
    return found


def expected(problem, args):
    """The layer in float64, from dequantised operands."""
    zero = None
    if problem.scaling == "weight_group":
        *args, zero = args
    x, weight, *scales, bias = args
    M, N, K = problem.M, problem.N, problem.K
    w_scale = scales[-1]
    if problem.scaling in ("block", "weight_block"):
        factor = spread(w_scale, (N, K), (problem.block_n, problem.block_k))
    elif problem.scaling == "weight_group":
        factor = spread(w_scale, (N, K), (1, problem.group_size))
    else:
        factor = w_scale.double().reshape(-1, 1)
    stored = weight.double()
    if weight.dtype == torch.uint8:
        stored = unpacked(weight, offset_binary=problem.offset_binary)
    rows = x.double()
    if len(scales) == 2:
        group = problem.group_size or K
        by_group = scales[0].expand(M, 1) if scales[0].dim() == 0 else scales[0]
        rows = rows * spread(by_group, (M, K), (1, group))
    columns = stored * factor
    if zero is not None:
        columns = columns + spread(zero, (N, K), (1, problem.group_size))
    out = rows @ columns.T
    return out if bias is None else out + bias.double()


@every_op
@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias_dtype", [None, BF16, torch.float32])
def test_reference(op, problem, out_dtype, bias_dtype):
    x_dtype = out_dtype if problem.scaling.startswith("weight") else problem.dtype
    problem = replace(problem, out_dtype=out_dtype, bias_dtype=bias_dtype, dtype=x_dtype)
    args, kwargs = problem.sample(seed=1, device="cpu")
    out = op(*args, **kwargs)
    assert (out.dtype, tuple(out.shape)) == (out_dtype, (problem.M, problem.N))
    assert_close(out, expected(problem, args), what=op.name)


@every_op
def test_sample_has_the_problem(op, problem):
    args, kwargs = problem.sample(seed=0, device="cpu")
    assert op.problem(*args, **kwargs) == problem
    again, _ = problem.sample(seed=0, device="cpu")
    for one, other in zip(args, again, strict=True):
        assert one is other or torch.equal(one.float(), other.float())
    assert columns(problem)["dtype"] == str(problem.dtype).removeprefix("torch.")


@every_op
def test_operator(op, problem):
    args, kwargs = problem.sample(seed=2, device="cpu")
    if FN in (args[0].dtype, args[1].dtype):  # torch's schema test compares inputs, fp8 it cannot
        tests = ("test_faketensor", "test_autograd_registration")
        torch.library.opcheck(op.overload, args, kwargs, test_utils=tests)
    else:
        opcheck(op, args, kwargs)


@every_op
@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (1, 6)])
def test_leading_dimensions(op, problem, leading):
    args, kwargs = replace(problem, M=max(1, torch.Size(leading).numel())).sample(
        seed=3, device="cpu"
    )
    shaped = [args[0], *args[1:]]
    for at in (0, 2) if problem.scaling in ("block", "row") else (0,):
        shaped[at] = args[at][0] if leading == () else args[at][: torch.Size(leading).numel()]
        shaped[at] = shaped[at].reshape(*leading, args[at].shape[-1])
    out = op(*shaped, **kwargs)
    assert out.shape == (*leading, problem.N)
    assert out.is_contiguous()
    rows = op(*args, **kwargs)[: torch.Size(leading).numel()]
    assert torch.equal(out.reshape(-1, problem.N), rows.reshape(-1, problem.N))


@every_op
def test_memory_orders(op, problem):
    args, kwargs = problem.sample(seed=4, device="cpu")
    scales = 2 if problem.scaling in ("block", "row") else 0
    lead = [a.reshape(2, 3, -1) if i in (0, scales) else a for i, a in enumerate(args)]
    wanted = op(*lead, **kwargs)
    if args[0].dtype == BF16:
        for name, x in layouts(lead[0]):
            got = op(x, *lead[1:], **kwargs)
            assert_same_layout(got, wanted)
            assert_close(got, wanted, what=name)
    turned = [a.t().contiguous().t() if a is not None and a.dim() == 2 else a for a in args]
    assert_close(op(*turned, **kwargs), wanted.reshape(6, -1))
    assert not op.problem(*turned, **kwargs).x_contiguous


def test_int8_is_exact():
    x, weight = (torch.full((n, 200000), 127, dtype=INT8) for n in (1, 2))
    out = gemm_int8(x, weight, torch.ones(1, 1), torch.ones(2), out_dtype=torch.float32)
    assert out.tolist() == [[float(torch.tensor(127 * 127 * 200000.0))] * 2]


@pytest.mark.parametrize("shape", [(200,), (200, 1), (1, 200)])
def test_shapes_of_row_scales(shape):
    args, kwargs = PROBLEMS[1][1].sample(seed=5, device="cpu")
    x, weight, x_scale, w_scale, bias = args
    got = gemm_fp8_rowwise(x, weight, x_scale, w_scale.reshape(shape), bias, **kwargs)
    assert torch.equal(got, gemm_fp8_rowwise(*args, **kwargs))
    assert gemm_fp8_rowwise.problem(x, weight, x_scale, w_scale.reshape(shape)).mismatch is None


def test_roofline():
    problem = replace(PROBLEMS[0][1], M=4096, N=7168, K=2048, bias_dtype=None)
    assert problem.flops() == 2 * 4096 * 7168 * 2048
    scales = 4 * (4096 * 16 + 56 * 16)
    assert problem.bytes_moved() == 4096 * 2048 + 7168 * 2048 + 2 * 4096 * 7168 + scales


MISMATCHES = [
    (1, torch.zeros(200, 256, dtype=FN), "x has 320 elements a row and weight 256"),
    (2, torch.ones(6, 2), "x_scale is [6, 2], x wants [6, 3]"),
    (3, torch.ones(2, 2), "weight_scale is [2, 2], weight wants [2, 3]"),
    (4, torch.ones(320), "bias is [320] but the result has 200 columns"),
    (2, torch.ones(6, 3, dtype=BF16), "x_scale is bfloat16, not float32"),
    (3, torch.ones(2, 3, device="meta"), "the tensors are on cpu and meta"),
]


@pytest.mark.parametrize(("at", "wrong", "sentence"), MISMATCHES)
def test_mismatches_are_sentences(at, wrong, sentence):
    args, kwargs = PROBLEMS[0][1].sample(seed=6, device="cpu")
    args = [*args[:at], wrong, *args[at + 1 :]]
    assert gemm_fp8_blockscale.problem(*args, **kwargs).mismatch == sentence


@pytest.mark.parametrize(("op", "problem"), PROBLEMS[4:], ids=["rows", "blocks", "int4", "zeros"])
def test_gradients_of_weight_only(op, problem):
    """In float64, against differences; the weight and its scales get none."""
    small = replace(problem, M=3, N=10, K=64, dtype=torch.float64, bias_dtype=torch.float64)
    (x, weight, scale, bias, *zero), kwargs = replace(small, out_dtype=torch.float64).sample(
        seed=5, device="cpu"
    )
    x, bias = x.reshape(3, 1, 64).requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, b: op(x, weight, scale, b, *zero, **kwargs), (x, bias)
    )
    op(x, weight, scale, None, *zero, **kwargs).sum().backward()
    assert x.grad is not None
    assert bias.grad is None
