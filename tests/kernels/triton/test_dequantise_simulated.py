"""A weight dequantised for a library's product, as gfx942 and gfx950 machine code."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.kernels.triton.dequantise import dequantised
from aiter_inductor.kernels.triton.gemm_tile_packed import dequantised_tiles
from aiter_inductor.kernels.triton.simulated import simulating
from aiter_inductor.lowerings.gemm_tile_packed import in_rows
from tests.kernels.triton.test_gemm import codes, scales, spread
from tests.lowerings.test_gemm import unpacked

FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
N, K = 37, 1100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", FP8)
def test_eight_bits(arch, dtype):
    """dequantise_kernel, by rows of int8 and by blocks of fp8, both ragged."""
    rows, blocks = codes(N, K, torch.int8, 1), codes(N, K, FP8[arch], 2)
    by_row, by_block = scales(N), scales(1, 9, seed=6)
    with simulating(arch):
        got = dequantised(rows, by_row, 1, 0, dtype=dtype)
        other = dequantised(blocks, by_block, 128, 128, dtype=dtype)
    near = torch.finfo(dtype).eps
    wanted = rows.double() * by_row.double()[:, None]
    torch.testing.assert_close(got.double(), wanted, rtol=near, atol=0)
    wanted = spread(by_block, blocks, 128, 128)
    torch.testing.assert_close(other.double(), wanted, rtol=near, atol=0)


@pytest.mark.parametrize("arch", FP8)
def test_four_bits(arch):
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    by_group = scales(N, 9)
    with simulating(arch):
        got = dequantised(packed, by_group, 1, 128, dtype=torch.float32)
    wanted = spread(by_group, unpacked(packed), 1, 128)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tile_n", [8, 16])
@pytest.mark.parametrize("group_size", [32, 128, 256])
@pytest.mark.parametrize("arch", FP8)
def test_tiles_of_four_bits(arch, group_size, tile_n):
    """dequantise_tiles_kernel, in which columns and features are cut short."""
    words = torch.randint(-(1 << 31), 1 << 31, (10, 2, 32, 4), dtype=torch.int64).to(torch.int32)
    both = scales(256 // group_size, 80, 2)
    sizes = {"group_size": group_size, "out_features": 70, "tile_n": tile_n}
    with simulating(arch):
        found = dequantised_tiles(words, both, 200, **sizes, dtype=torch.float32)
    wanted = in_rows(words, both, group_size, tile_n, torch.float32)[:70, :200]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
