"""The C++ matrix products against float64, at every level of instructions that this CPU has."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from aiter_inductor.core import jit
from aiter_inductor.kernels.cpp import gemm, loading

LEVELS = {
    "avx512_bf16": frozenset(loading._AVX512_BF16),
    "avx512": frozenset(loading._AVX512),
    "avx2": frozenset(loading._AVX2),
    "baseline": frozenset[str](),
}
WEIGHT_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8)
TOLERANCE = 2e-6
"""Of the sum of magnitudes: products are exact, sums of a few thousand terms in fp32 are not."""


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    features = LEVELS[request.param]
    if not features <= loading.cpu_features():
        pytest.skip(f"this CPU lacks {', '.join(sorted(features - loading.cpu_features()))}")
    monkeypatch.setattr(gemm, "cpu_features", lambda: features)
    try:
        jit.find_compiler("host", jit.default_settings())
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def codes(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def spread(scale: Tensor, sizes: tuple[int, int], rows: int, columns: int) -> Tensor:
    """A block scale, repeated over its blocks of `rows` by `columns`."""
    whole = scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return whole[: sizes[0], : sizes[1]]


def assert_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, ulp: float) -> None:
    """`out` [M, N] against the float64 product of `x` [M, K] and `weight` [N, K], dequantised."""
    exact = x @ weight.T + (0 if bias is None else bias.double())
    magnitude = x.abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    assert out.shape == exact.shape
    bound = TOLERANCE * magnitude + ulp * exact.abs()
    excess = (out.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"{excess.max()} beyond the bound"


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES[:2], ids=str)
def test_blockscale_of_random_shapes(level: str, weight_dtype: torch.dtype) -> None:
    rng = random.Random(7)
    generator = torch.Generator().manual_seed(7)
    for _ in range(25):
        M, N, K = rng.randint(0, 70), rng.randint(1, 300), rng.randint(1, 700)
        group, block_n, block_k = rng.choice([(128, 128, 128), (64, 128, 128), (32, 7, 96)])
        x, weight = codes((M, K), weight_dtype, generator), codes((N, K), weight_dtype, generator)
        x_scale = torch.rand(M, blocks(K, group), generator=generator) + 0.01
        weight_scale = torch.rand(blocks(N, block_n), blocks(K, block_k), generator=generator)
        bias = torch.randn(N, generator=generator) if rng.random() < 0.5 else None
        out_dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        out = gemm.gemm_fp8_blockscale(
            x,
            weight,
            x_scale,
            weight_scale,
            bias,
            group_size=group,
            block_n=block_n,
            block_k=block_k,
            out_dtype=out_dtype,
        )
        assert out.dtype == out_dtype
        x_exact = x.double() * spread(x_scale, (M, K), 1, group)
        weight_exact = weight.double() * spread(weight_scale, (N, K), block_n, block_k)
        assert_product(out, x_exact, weight_exact, bias, torch.finfo(out_dtype).eps)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_in_eight_bits(level: str, weight_dtype: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for M, N, K, block_n, block_k in [(1, 5, 3, 2, 2), (13, 130, 257, 128, 128), (3, 9, 640, 1, 0)]:
        x = torch.randn(M, K, generator=generator).to(dtype)
        weight = codes((N, K), weight_dtype, generator)
        of_rows = block_k == 0
        shape = (N,) if of_rows else (blocks(N, block_n), blocks(K, block_k))
        scale = torch.rand(shape, generator=generator)
        bias = torch.randn(N, generator=generator).to(dtype)
        out = gemm.gemm_w8a16(x, weight, scale, bias, block_n=block_n, block_k=block_k or 128)
        assert out.dtype == dtype
        repeated = spread(scale.reshape(shape[0], -1), (N, K), block_n, block_k or K)
        weight_exact = weight.double() * repeated
        assert_product(out, x.double(), weight_exact, bias, torch.finfo(dtype).eps)


def test_scales_by_row_and_by_tensor(level: str) -> None:
    generator = torch.Generator().manual_seed(5)
    M, N, K = 17, 67, 391
    x, weight = (codes((rows, K), torch.float8_e4m3fn, generator) for rows in (M, N))
    of_x, of_weight = (torch.rand(rows, 1, generator=generator) for rows in (M, N))
    out = gemm.gemm_fp8_rowwise(x, weight, of_x, of_weight.T, out_dtype=torch.float32)
    assert_product(out, x.double() * of_x, weight.double() * of_weight, None, 1e-6)
    one, other = torch.tensor(0.25), torch.tensor([3.0])
    out = gemm.gemm_fp8_per_tensor(x, weight, one, other, out_dtype=torch.float32)
    assert_product(out, x.double() * 0.25, weight.double() * 3, None, 1e-6)


def test_views_and_leading_dimensions(level: str) -> None:
    generator = torch.Generator().manual_seed(11)
    stored = codes((4, 6, 512), torch.float8_e4m3fn, generator)
    x, weight = stored[::2, 1:4, :300], codes((300, 40), torch.float8_e4m3fn, generator).T
    x_scale = torch.rand(3, 3, 2, generator=generator).transpose(0, 2)
    weight_scale = torch.rand(3, 1, generator=generator).T
    out = gemm.gemm_fp8_blockscale(x, weight, x_scale, weight_scale, out_dtype=torch.float32)
    assert out.shape == (2, 3, 40)
    x_exact = x.double().reshape(6, 300) * spread(x_scale.reshape(6, 3), (6, 300), 1, 128)
    weight_exact = weight.double() * spread(weight_scale, (40, 300), 128, 128)
    assert_product(out.reshape(6, 40), x_exact, weight_exact, None, 1e-6)


def test_nan_of_one_row_stays_in_it(level: str) -> None:
    x = torch.ones(5, 192).to(torch.float8_e4m3fn)
    x[2, 150] = float("nan")
    weight = torch.ones(6, 192).to(torch.float8_e4m3fn)
    weight[4, 3] = float("nan")
    scale = torch.ones(5, 2), torch.ones(1, 2)
    out = gemm.gemm_fp8_blockscale(x, weight, *scale, out_dtype=torch.float32)
    expected = torch.full((5, 6), 192.0)
    expected[2], expected[:, 4] = float("nan"), float("nan")
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, -2.0])], ids=["plain", "bias"])
def test_nothing_to_sum_is_the_bias(bias: Tensor | None) -> None:
    x, weight = (torch.empty(rows, 0).to(torch.float8_e4m3fn) for rows in (3, 2))
    out = gemm.gemm_fp8_blockscale(x, weight, torch.empty(3, 0), torch.empty(1, 0), bias)
    expected = torch.zeros(2) if bias is None else bias
    torch.testing.assert_close(out, expected.bfloat16().expand(3, 2))


def test_threads_share_the_rows_and_agree(level: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = (codes((rows, 640), torch.float8_e4m3fn, generator) for rows in (900, 77))
    scales = torch.rand(900, 5, generator=generator), torch.rand(1, 5, generator=generator)
    before, outs = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outs.append(gemm.gemm_fp8_blockscale(x, weight, *scales, out_dtype=torch.float32))
    torch.set_num_threads(before)
    assert torch.equal(*outs)
    weight_exact = weight.double() * spread(scales[1], (77, 640), 128, 128)
    assert_product(outs[0], x.double() * spread(scales[0], (900, 640), 1, 128), weight_exact,
                   None, 1e-6)  # fmt: skip


def test_flags_name_the_widest_complete_set() -> None:
    assert loading.instruction_flags(frozenset({"avx2", "fma", "f16c", "avx512f"})) == (
        "-mavx2",
        "-mfma",
        "-mf16c",
    )
    assert "-mavx512bf16" in loading.instruction_flags(LEVELS["avx512_bf16"] | {"sse2"})
    assert loading.instruction_flags(frozenset({"avx2"})) == ()
