"""The Triton matrix products under the interpreter, against float64 from the same operands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.triton import bmm, gemm, gemm_tile_packed, gemm_weight
from aiter_inductor.kernels.triton.gemm_config import GemmConfig, scale_step
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from aiter_inductor.lowerings.gemm_tile_packed import in_rows
from aiter_inductor.lowerings.gemm_tiles import in_tiles
from tests.lowerings.test_gemm import unpacked

FP8 = torch.float8_e4m3fn
SMALL = GemmConfig(16, 32, 64, group_m=2)
SHAPES = [(1, 32, 128), (19, 70, 200), (33, 64, 256)]


def codes(rows, columns, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=dtype)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def scales(*shape, seed=5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def spread(scale, like, rows, columns):
    whole = scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return like.double() * whole[: like.shape[0], : like.shape[1]]


def cdiv(size, block):
    return -(-size // block)


def assert_product(out, x, weight, bias, ulp):
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert out.shape == exact.shape
    assert ((out.double() - exact).abs() <= 2e-6 * magnitude + ulp * exact.abs()).all()


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e4m3fnuz], ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_gemm_fp8_blockscale(M, N, K, dtype, split_k):
    x, weight = codes(M, K, dtype, 1), codes(N, K, dtype, 2)
    of_x, of_weight = scales(M, cdiv(K, 128)), scales(cdiv(N, 48), cdiv(K, 128), seed=6)
    bias = torch.randn(N)
    out = gemm.gemm_fp8_blockscale(
        x,
        weight,
        of_x,
        of_weight,
        bias,
        block_n=48,
        out_dtype=torch.float32,
        config=replace(SMALL, split_k=split_k),
    )
    assert_product(out, spread(of_x, x, 1, 128), spread(of_weight, weight, 48, 128), bias, 0)


@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16], ids=str)
def test_blocks_wider_than_a_tile_and_leading_dimensions(bias_dtype):
    stored, weight = codes(2 * 3 * 2, 200, FP8, 1), codes(130, 200, FP8, 2)
    x = stored.reshape(2, 3, 2, 200)[:, :, 1]
    of_x, of_weight = scales(2, 3, 2), scales(2, 2, seed=6)
    bias = None if bias_dtype is None else torch.randn(130).to(bias_dtype)
    out = gemm.gemm_fp8_blockscale(x, weight, of_x, of_weight, bias, config=SMALL)
    assert out.dtype == torch.bfloat16
    assert out.shape == (2, 3, 130)
    x_exact = spread(of_x.reshape(6, 2), x.reshape(6, 200), 1, 128)
    assert_product(out.reshape(6, 130), x_exact, spread(of_weight, weight, 128, 128), bias, 2**-8)


@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_gemm_fp8_rowwise_and_gemm_int8(M, N, K, dtype):
    x, weight, of_x, of_weight = (
        codes(M, K, dtype, 1),
        codes(N, K, dtype, 2),
        scales(M, 1),
        scales(N),
    )
    run = gemm.gemm_int8 if dtype == torch.int8 else gemm.gemm_fp8_rowwise
    config = replace(SMALL, split_k=2)
    out = run(x, weight, of_x, of_weight[None], out_dtype=torch.float32, config=config)
    assert_product(out, x.double() * of_x, weight.double() * of_weight[:, None], None, 1e-6)


def test_gemm_fp8_per_tensor():
    x, weight = codes(19, 200, FP8, 1), codes(70, 200, FP8, 2)
    one, other, bias = torch.tensor(0.25), torch.tensor([3.0]), torch.randn(70)
    out = gemm.gemm_fp8_per_tensor(
        x, weight, one, other, bias, out_dtype=torch.float32, config=SMALL
    )
    assert_product(out, x.double() * 0.25, weight.double() * 3, bias, 1e-6)


@pytest.mark.parametrize("of_rows", [True, False], ids=["row", "block"])
@pytest.mark.parametrize("weight_dtype", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gemm_w8a16(dtype, weight_dtype, of_rows):
    M, N, K = 19, 70, 200
    x, weight = torch.randn(M, K).to(dtype), codes(N, K, weight_dtype, 2)
    scale = scales(N) if of_rows else scales(cdiv(N, 128), cdiv(K, 128))
    out = gemm_weight.gemm_w8a16(x, weight, scale, config=SMALL)
    blocks = (1, K) if of_rows else (128, 128)
    exact = spread(scale.reshape(scale.shape[0], -1), weight, *blocks)
    assert out.dtype == dtype
    assert_product(out, x, exact, None, torch.finfo(dtype).eps)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_gemm_w4a16(M, N, K, group_size):
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N)
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    scale = scales(N, cdiv(K, group_size))
    config = GemmConfig(16, 32, 32, split_k=2, group_m=2)
    for biased in (None, bias):
        run = gemm_weight.gemm_w4a16
        out = run(x, packed, scale, biased, group_size=group_size, config=config)
        exact = spread(scale, unpacked(packed), 1, group_size)
        assert_product(out, x, exact, biased, 2**-8)


@pytest.mark.parametrize("group_size", [32, 256])
@pytest.mark.parametrize("offset_binary", [False, True])
def test_gemm_w4a16_with_zeros(offset_binary, group_size):
    """Scales and zeros as torchao keeps them: [K / group_size, N], in x's dtype."""
    M, N, K = 19, 70, 272
    x, packed = torch.randn(M, K).bfloat16(), torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    groups = cdiv(K, group_size)
    scale, zero = (scales(groups, N, seed=s).bfloat16().t() for s in (5, 6))
    out = gemm_weight.gemm_w4a16(
        x, packed, scale, None, zero, group_size=group_size, offset_binary=offset_binary,
        config=GemmConfig(16, 32, 32, split_k=2, group_m=2),
    )  # fmt: skip
    codes = unpacked(packed, offset_binary=offset_binary)
    exact = spread(scale, codes, 1, group_size) + spread(zero, torch.ones(N, K), 1, group_size)
    assert_product(out, x, exact, None, 2**-8)


@pytest.mark.parametrize("group_size", [32, 64, 256])
@pytest.mark.parametrize("tile_n", [8, 16])
def test_gemm_w4a16_tile_packed(tile_n, group_size):
    M, N, K = 19, 70, 500
    words = torch.randint(-(1 << 31), 1 << 31, (10, 4, 32, 4), dtype=torch.int64).to(torch.int32)
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N)
    both = scales(512 // group_size, 80, 2).bfloat16()
    sizes = {"group_size": group_size, "out_features": N, "tile_n": tile_n}
    for config in (None, GemmConfig(16, 32, 32, split_k=2, group_m=2)):
        out = gemm_tile_packed.gemm_w4a16_tile_packed(x, words, both, bias, **sizes, config=config)
        exact = in_rows(words, both, group_size, tile_n, torch.float64)[:N, :K]
        assert_product(out, x, exact, bias, 2**-8)


def test_no_rows_and_nothing_to_sum():
    scale = torch.empty(0, 1), torch.ones(1, 1)
    out = gemm.gemm_fp8_blockscale(codes(0, 64, FP8, 1), codes(6, 64, FP8, 2), *scale, config=SMALL)
    assert out.shape == (0, 6)
    bias = torch.randn(6)
    out = gemm.gemm_fp8_per_tensor(
        torch.empty(3, 0).to(FP8), torch.empty(6, 0).to(FP8), torch.ones(()), torch.ones(()), bias,
        out_dtype=torch.float32, config=SMALL,
    )  # fmt: skip
    torch.testing.assert_close(out, bias.expand(3, 6))


def test_default_tiles_divide_what_shares_a_scale():
    assert scale_step("block", (128, 128, 96)) == 32
    assert scale_step("weight_block", (1, 128, 64)) == 64
    assert scale_step("row", (1, 1, 1)) == 128


@pytest.mark.parametrize(
    ("M", "amd", "expected"),
    [
        (1, True, GemmConfig(16, 128, 128, split_k=8, num_stages=2)),
        (64, False, GemmConfig(64, 128, 128, split_k=4)),
        (4096, False, GemmConfig(128, 128, 128, num_warps=8)),
        ("open", True, GemmConfig(128, 128, 128, num_warps=8, num_stages=2)),
    ],
)
def test_default_config(M, amd, expected):
    assert GemmConfig.default(M, 4096, 7168, amd=amd) == expected


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 32, 128), (19, 80, 224)])
def test_preshuffled(M, N, K, split_k):
    """gemm_fp8_blockscale_preshuffled and gemm_fp8_rowwise_preshuffled, in tiles of 16 x 16."""
    x, weight, bias = codes(M, K, FP8, 1), codes(N, K, FP8, 2), torch.randn(N)
    of_x, of_weight = scales(M, cdiv(K, 128)), scales(cdiv(N, 48), cdiv(K, 128), seed=6)
    for scaling, of_rows, of_columns, sizes in (
        ("block", of_x, of_weight, (128, 48, 128)),
        ("row", of_x[:, :1], scales(N), (128, 128, 128)),
    ):
        out = gemm.scaled_gemm(
            x, in_tiles(weight), of_rows, of_columns, bias, scaling, torch.float32,
            sizes=sizes, config=replace(SMALL, split_k=split_k), shuffled=True,
        )  # fmt: skip
        if scaling == "block":
            rows, columns = spread(of_x, x, 1, 128), spread(of_weight, weight, 48, 128)
        else:
            rows, columns = x.double() * of_rows, weight.double() * of_columns[:, None]
        assert_product(out, rows, columns, bias, 1e-6)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("by", ["block", "row", "tensor"])
def test_bmm_fp8(by, split_k):
    shapes = {
        "block": ((3, 19, 2), (3, 2, 2), 48),
        "row": ((3, 19, 1), (3, 70, 1), 1),
        "tensor": ((1, 1, 1), (3, 1, 1), 128),
    }
    x, weight = (codes(3 * n, 200, FP8, n).reshape(3, n, 200) for n in (19, 70))
    x_shape, weight_shape, block_n = shapes[by]
    of_x, of_weight = scales(*x_shape), scales(*weight_shape, seed=6)
    out = bmm.bmm_fp8(
        x, weight, of_x, of_weight, block_n=block_n, out_dtype=torch.float32,
        config=replace(SMALL, split_k=split_k),
    )  # fmt: skip
    if by == "block":
        of_weight = torch.cat(
            (of_weight[:, :1].expand(3, 48, 2), of_weight[:, 1:].expand(3, 22, 2)), 1
        )
        of_weight = of_weight.repeat_interleave(128, 2)[..., :200]
        of_x = of_x.repeat_interleave(128, 2)[..., :200]
    for at in range(3):
        rows = x[at].double() * of_x.expand(3, -1, -1)[at]
        columns = weight[at].double() * of_weight[at]
        assert_product(out[at], rows, columns, None, 1e-6)


@pytest.mark.parametrize("split_k", [1, 2])
def test_residual(split_k):
    """gemm_fp8_blockscale_add and gemm_fp8_rowwise_add: the residual of the epilogue."""
    x, weight, bias = codes(19, 200, FP8, 1), codes(70, 200, FP8, 2), torch.randn(70)
    residual = torch.randn(70, 19).bfloat16().T
    of_x, of_weight = scales(19, 2), scales(1, 2)
    out = gemm.scaled_gemm(
        x, weight, of_x, of_weight, bias, "block", torch.float32,
        config=replace(SMALL, split_k=split_k), residual=residual,
    )  # fmt: skip
    rows, columns = spread(of_x, x, 1, 128), spread(of_weight, weight, 128, 128)
    exact = rows @ columns.T + bias.double() + residual.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["rows", "blocks", "int4", "zeros"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 33, 256), (3, 70, 200)])
@pytest.mark.parametrize("split_k", [1, 2])
def test_few_rows_of_weight_only(kind, M, N, K, split_k):
    """Without matrix instructions, in tiles narrower and wider than a group of the scales."""
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N)
    for block_k in (32, 128):
        config = GemmConfig(1 if M == 1 else 2, 4, block_k, split_k, num_stages=2)
        if kind in ("rows", "blocks"):
            weight = codes(N, K, FP8 if kind == "rows" else torch.int8, 2)
            scale = scales(N) if kind == "rows" else scales(cdiv(N, 16), cdiv(K, 64))
            blocks = {"block_n": 16, "block_k": 64}
            out = gemm_weight.gemm_w8a16(x, weight, scale, bias, **blocks, config=config)
            sizes = (1, K) if kind == "rows" else (16, 64)
            exact = spread(scale.reshape(len(scale), -1), weight, *sizes)
        else:
            packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
            scale, zero = scales(N, cdiv(K, 64)), scales(N, cdiv(K, 64), seed=6)
            zero = zero if kind == "zeros" else None
            out = gemm_weight.gemm_w4a16(x, packed, scale, bias, zero, group_size=64, config=config)
            exact = spread(scale, unpacked(packed), 1, 64)
            if zero is not None:
                exact = exact + spread(zero, torch.ones(N, K), 1, 64)
        assert_product(out, x, exact, bias, 2**-8)


def test_configs_of_few_rows_are_refused_with_a_sentence():
    few = GemmConfig(4, 4, 256)
    problem = GemmProblem(3, 64, 256, torch.bfloat16, FP8, torch.bfloat16, "weight_row")
    assert few.refuse(problem) is None
    grouped = replace(problem, scaling="weight_group", group_size=96)
    assert few.refuse(grouped) == "the columns of a scale=96 is no power of two"
    assert few.refuse(replace(problem, scaling="row")).startswith("block_m=4 is less than 16")
    assert replace(few, block_k=8).refuse(problem).endswith("has a parameter that is too small")
    negative = GemmConfig(16, 64, 128, waves_per_eu=-1)
    assert negative.refuse(problem).endswith("has a parameter that is not positive")
    default = GemmConfig.default_weight_only(3, 64, 256, amd=True, scale_k=96)
    assert default.block_m == 16
