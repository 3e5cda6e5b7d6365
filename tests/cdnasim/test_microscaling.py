"""MXFP8 and MXFP4 products on gfx950, laid out by Triton: the operand layout is not our own."""

from __future__ import annotations

import pytest
import torch

from tests.cdnasim import formats
from tests.cdnasim.compiled import run_triton

M, N, K = 64, 64, 256


@pytest.mark.parametrize("form", ["e4m3", "e5m2", "e2m1"])
def test_gemm_microscaled(form):
    torch.manual_seed(0)
    flavour = {"e4m3": formats.E4M3FN, "e5m2": formats.E5M2, "e2m1": formats.E2M1}[form]
    packed = 2 if form == "e2m1" else 1
    codes = [torch.randint(0, 256, (rows, K // packed), dtype=torch.uint8) for rows in (M, N)]
    if packed == 1:
        codes = [c & 0xBF for c in codes]  # neither NaN nor infinity
    scales = [torch.randint(120, 132, (rows, K // 32), dtype=torch.uint8) for rows in (M, N)]
    out = torch.empty(M, N)
    signature = {"a": "*u8", "a_scale": "*u8", "b": "*u8", "b_scale": "*u8", "out": "*fp32"}
    constants = {"FORMAT": form, "PACKED": packed, "BM": M, "BN": N, "BK": 128}
    run_triton(
        "gemm_microscaled",
        "gfx950",
        signature | {"K": "i32"},
        constants,
        (1,),
        [codes[0], scales[0], codes[1], scales[1], out, K],
        [out],
    )

    def values(code, scale):
        if packed == 2:
            code = torch.stack([code & 15, code >> 4], -1).reshape(len(code), K)
        decoded = torch.from_numpy(flavour.decode(code.numpy())).double()
        return decoded * torch.exp2(scale.double() - 127).repeat_interleave(32, 1)

    want = values(codes[0], scales[0]) @ values(codes[1], scales[1]).T
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
