"""Matrix products as machine code, with what tests/simulation leaves out: a bias, int8 weights."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.kernels.triton import gemm, gemm_weight
from aiter_inductor.kernels.triton.dequantise import dequantised
from aiter_inductor.kernels.triton.gemm_config import GemmConfig
from aiter_inductor.kernels.triton.simulated import simulating
from tests.kernels.triton.test_gemm import assert_product, codes, scales, spread, unpacked

FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}


@pytest.mark.parametrize(("M", "N", "K"), [(3, 130, 1024), (150, 200, 328)])
@pytest.mark.parametrize("arch", FP8)
def test_gemm_fp8_blockscale(arch, M, N, K):
    x, weight = codes(M, K, FP8[arch], 1), codes(N, K, FP8[arch], 2)
    blocks = -(-N // 128), -(-K // 128)
    of_x, of_weight, bias = scales(M, blocks[1]), scales(*blocks, seed=6), torch.randn(N)
    with simulating(arch) as launched:
        out = gemm.gemm_fp8_blockscale(x, weight, of_x, of_weight, bias)
    assert "v_mfma" in launched[0].listing
    assert len(launched) == (2 if M == 3 else 1)
    weight_exact = spread(of_weight, weight, 128, 128)
    assert_product(out, spread(of_x, x, 1, 128), weight_exact, bias, 2**-8)


@pytest.mark.parametrize("arch", FP8)
def test_gemm_int8_and_gemm_w8a16(arch):
    x, weight = codes(19, 200, torch.int8, 1), codes(70, 200, torch.int8, 2)
    of_x, of_weight = scales(19, 1), scales(70)
    config = GemmConfig(32, 64, 64, num_stages=2)
    with simulating(arch):
        out = gemm.gemm_int8(x, weight, of_x, of_weight, out_dtype=torch.float32, config=config)
        wide = gemm_weight.gemm_w8a16(x.bfloat16(), weight, of_weight, config=config)
    weight_exact = weight.double() * of_weight[:, None]
    assert_product(out, x.double() * of_x, weight_exact, None, 1e-6)
    assert_product(wide, x, weight_exact, None, 2**-8)


@pytest.mark.parametrize("arch", FP8)
def test_dequantised_weights(arch):
    weight, nibbles = codes(35, 530, FP8[arch], 2), torch.arange(256, dtype=torch.uint8)[None]
    blocks, rows, groups = scales(2, 5), scales(35), scales(1, 16)
    with simulating(arch):
        by_blocks = dequantised(weight, blocks, 32, 128, dtype=torch.bfloat16)
        by_rows = dequantised(weight, rows, 1, 0, dtype=torch.float32)
        by_groups = dequantised(nibbles, groups, 1, 32, dtype=torch.float32)
        moving = {"zero": -groups, "offset_binary": True}
        moved = dequantised(nibbles, groups, 1, 32, dtype=torch.float32, **moving)
    of_blocks = spread(blocks, torch.ones(35, 530), 32, 128).float()
    assert torch.equal(by_blocks, (weight.float() * of_blocks).bfloat16())
    assert torch.equal(by_rows, weight.float() * rows[:, None])
    assert torch.equal(by_groups, spread(groups, unpacked(nibbles), 1, 32).float())
    wanted = spread(groups, unpacked(nibbles, offset_binary=True) - 1, 1, 32)
    torch.testing.assert_close(moved, wanted.float())


@pytest.mark.parametrize("style", ["block", "row"])
@pytest.mark.parametrize(("M", "N", "K"), [(3, 130, 1024), (150, 200, 328)])
def test_e4m3fn_on_a_chip_that_multiplies_e4m3fnuz(M, N, K, style):
    """Every code of e4m3fn: numbers, both zeros, and a NaN, which stays in its row."""
    x, weight = (codes(rows, K, FP8["gfx950"], seed) for seed, rows in ((1, M), (2, N)))
    every = torch.arange(256, dtype=torch.uint8)
    numbers = every[(every & 127) != 127].view(FP8["gfx950"])
    x[0, : len(numbers)], weight[1, : len(numbers)] = numbers, numbers
    blocks = -(-N // 128), -(-K // 128)
    of_x, of_weight = scales(M, blocks[1]), scales(*blocks, seed=6)
    with simulating("gfx942") as launched:
        if style == "block":
            out = gemm.gemm_fp8_blockscale(x, weight, of_x, of_weight, out_dtype=torch.float32)
            rows, columns = spread(of_x, x, 1, 128), spread(of_weight, weight, 128, 128)
        else:
            of_x, of_weight = of_x[:, :1], scales(N)
            out = gemm.gemm_fp8_rowwise(x, weight, of_x, of_weight, out_dtype=torch.float32)
            rows, columns = x.double() * of_x, weight.double() * of_weight[:, None]
        assert "_fp8_fp8" in launched[0].listing
        assert_product(out, rows, columns, None, 1e-6)
        wide = gemm_weight.gemm_w8a16(x.bfloat16(), weight, scales(N))
        weight_exact = weight.double() * scales(N).double()[:, None]
        assert_product(wide, x.bfloat16(), weight_exact, None, 2**-8)
        x[1, 5] = torch.nan
        spoiled = gemm.gemm_fp8_rowwise(x, weight, scales(M, 1), scales(N))
    assert spoiled[1].isnan().all()
    assert not spoiled[[0, 2]].isnan().any()
