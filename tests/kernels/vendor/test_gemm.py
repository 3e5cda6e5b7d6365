"""The layouts handed to scaled_mm: its own checks run on the meta device, values on the CPU."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.kernels.vendor import gemm

FP8 = torch.float8_e4m3fn


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("blocks", [1, 4, 7])
@pytest.mark.parametrize("leading", [(1,), (64,), (3, 7), (0,)], ids=str)
def test_gemm_fp8_blockscale_passes_the_checks(leading: tuple[int, ...], blocks: int) -> None:
    x, weight = empty(*leading, 128 * blocks, dtype=FP8), empty(384, 128 * blocks, dtype=FP8)
    out = gemm.gemm_fp8_blockscale(x, weight, empty(*leading, blocks), empty(3, blocks))
    assert (out.shape, out.dtype) == ((*leading, 384), torch.bfloat16)


@pytest.mark.parametrize("blocks", [1, 4, 7])
def test_weight_scales_are_padded_along_k(blocks: int) -> None:
    scale = torch.rand(3, blocks)
    laid_out = gemm.weight_scales(scale)
    padded = -(-blocks // 4) * 4
    assert laid_out.shape == (padded, 3)
    assert laid_out.stride() == (1, padded)
    assert torch.equal(laid_out[:blocks], scale.t())


def operands(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator).to(FP8) for rows in (6, 32))
    return x.reshape(2, 3, 64).to(device), weight.to(device)


def test_gemm_fp8_rowwise() -> None:
    on_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    if not on_gpu and torch.torch_version.TorchVersion(torch.__version__) < "2.12":
        pytest.skip(f"torch {torch.__version__} has no row-wise scaled_mm on the CPU")
    device = "cuda" if on_gpu else "cpu"
    x, weight = operands(device)
    of_x, of_weight = torch.rand(2, 3, 1, device=device), torch.rand(32, device=device)
    out = gemm.gemm_fp8_rowwise(x, weight, of_x, of_weight)
    exact = (x.double() * of_x) @ (weight.double() * of_weight[:, None]).T
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-7)


def test_gemm_fp8_per_tensor() -> None:
    x, weight = operands()
    out = gemm.gemm_fp8_per_tensor(x, weight, torch.tensor([0.5]), torch.tensor(0.25))
    exact = x.double() @ weight.double().T / 8
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-7)
