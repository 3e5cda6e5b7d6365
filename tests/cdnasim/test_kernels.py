"""Whole kernels, compiled by Triton and by clang for both architectures, against torch."""

from __future__ import annotations

import pytest
import torch

from cdnasim import FindingKind, SimulationError, TraceRequest, static_figures
from tests.cdnasim.compiled import ARCHS, FP8, FP8_NAME, compile_hip, compile_triton, run_triton

pytestmark = pytest.mark.parametrize("arch", ARCHS)
ALIGNED = pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])


def fp8_bytes(x):
    return x.view(torch.uint8)


@ALIGNED
@pytest.mark.parametrize(("rows", "N"), [(8, 1024), (3, 999)])
def test_rms_norm(arch, aligned, rows, N):
    if aligned and N % 16:
        pytest.skip("N=999 is not a multiple of 16")
    torch.manual_seed(0)
    x, weight, out = (
        torch.randn(rows, N).bfloat16(),
        torch.randn(N).bfloat16(),
        torch.empty(rows, N).bfloat16(),
    )
    signature = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "N": "i32", "eps": "fp32"}
    run_triton(
        "rms_norm",
        arch,
        signature,
        {"BLOCK": 1024},
        (rows,),
        [x, weight, out, N, 1e-6],
        [out],
        aligned=aligned,
    )
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6) * weight.float()
    torch.testing.assert_close(out, y.bfloat16(), rtol=8e-3, atol=1e-3)


@ALIGNED
def test_rope(arch, aligned):
    torch.manual_seed(0)
    heads = 16 if aligned else 3
    x, cos, sin = torch.randn(7, heads, 128).bfloat16(), torch.randn(7, 64), torch.randn(7, 64)
    out = torch.empty_like(x)
    signature = {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "out": "*bf16", "num_heads": "i32"}
    args = [x, cos, sin, out, heads]
    run_triton(
        "rope", arch, signature, {"HALF": 64}, (7, heads), args, [out], aligned=aligned, num_warps=1
    )
    low, high = x.float().chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    want = torch.cat([low * c - high * s, high * c + low * s], -1)
    torch.testing.assert_close(out.float(), want, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize(("rows", "N"), [(4, 512), (3, 208)])
def test_silu_and_mul_quant(arch, rows, N):
    torch.manual_seed(0)
    dtype = FP8[arch]
    x, out, scale = (
        torch.randn(rows, 2 * N).bfloat16(),
        torch.empty(rows, N).to(dtype),
        torch.empty(rows),
    )
    signature = {"x": "*bf16", "out": "*" + FP8_NAME[arch], "scale": "*fp32", "N": "i32"}
    constants = {"LARGEST": torch.finfo(dtype).max, "BLOCK": 512}
    run_triton(
        "silu_and_mul_quant", arch, signature, constants, (rows,), [x, out, scale, N], [out, scale]
    )
    gate, up = x.float().chunk(2, -1)
    y = torch.nn.functional.silu(gate) * up
    want = y.abs().amax(-1) / torch.finfo(dtype).max
    torch.testing.assert_close(scale, want, rtol=1e-6, atol=0)
    differing = (fp8_bytes(out) != fp8_bytes((y / want[:, None]).to(dtype))).float().mean()
    assert differing < 0.002, "bytes may differ by ties only"


@ALIGNED
@pytest.mark.parametrize(("M", "N", "K"), [(64, 128, 256), (70, 128, 128)])
def test_gemm_block_scale(arch, aligned, M, N, K):
    if not aligned and M == 70:
        pytest.skip("one ragged shape is enough: byte-wise loads of the ragged one take seconds")
    torch.manual_seed(0)
    dtype = FP8[arch]
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    a_scale, b_scale, out = (
        torch.rand(M, K // 128),
        torch.rand(N // 128, K // 128),
        torch.empty(M, N).bfloat16(),
    )
    pointers = dict.fromkeys(("a", "b"), "*" + FP8_NAME[arch]) | {
        "out": "*bf16",
        "a_scale": "*fp32",
        "b_scale": "*fp32",
    }
    signature = pointers | dict.fromkeys("MNK", "i32")
    args = [a, b, out, a_scale, b_scale, M, N, K]
    # 70 rows are not a multiple of 16: that signature promises nothing.
    grid = (-(-M // 64), -(-N // 128))
    run = run_triton(
        "gemm_block_scale",
        arch,
        signature,
        {"BM": 64, "BN": 128, "BK": 128},
        grid,
        args,
        [out],
        aligned=aligned and M % 16 == 0,
    )
    x = a.float() * a_scale.repeat_interleave(128, 1)
    y = b.float() * b_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert ((out.float() - x @ y.T).norm() / (x @ y.T).norm()) < 4e-3
    profile = run.profile()
    assert profile.cycles_by_unit["matrix"] > 0
    assert "mfma" in profile.table(3)


def test_flash_attention(arch):
    torch.manual_seed(0)
    heads, length, depth = 2, 100, 64
    q, k, v = (torch.randn(heads, length, depth).bfloat16() for _ in range(3))
    out = torch.empty_like(q)
    signature = dict.fromkeys(("Q", "K", "V", "out"), "*bf16") | {"scale": "fp32", "length": "i32"}
    args = [q, k, v, out, depth**-0.5, length]
    run_triton(
        "flash_attention",
        arch,
        signature,
        {"BM": 64, "BN": 32, "D": depth},
        (2, heads),
        args,
        [out],
        aligned=False,
    )
    want = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True
    )
    torch.testing.assert_close(out.float(), want, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("n8", [256, 77])
def test_hip_row_quant(arch, n8):
    torch.manual_seed(0)
    dtype = FP8[arch]
    x, out, scale = (
        torch.randn(5, n8 * 8).bfloat16(),
        torch.empty(5, n8 * 8).to(dtype),
        torch.empty(5),
    )
    compile_hip(arch, "row_quant").launch((5,), (256,), [x, out, scale, n8], poison=[out, scale])
    want = x.float().abs().amax(-1) / torch.finfo(dtype).max
    torch.testing.assert_close(scale, want, rtol=1e-6, atol=0)
    differing = (fp8_bytes(out) != fp8_bytes((x.float() / want[:, None]).to(dtype))).float().mean()
    assert differing < 0.01, "bytes may differ by ties only, which bf16 inputs often are"


def test_constant_table(arch):
    index, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    compile_hip(arch, "look_up").launch((1,), (64,), [index, out])
    assert out.tolist() == [3, 1, 4, 1, 5, 9, 2, 6] * 8


def test_finding_names_the_line_of_the_hip_source(arch):
    """Claiming one row more than the tensor has reads past its end."""
    x, out, scale = (
        torch.randn(2, 2048).bfloat16(),
        torch.empty(3, 2048).to(FP8[arch]),
        torch.empty(3),
    )
    with pytest.raises(SimulationError) as caught:
        compile_hip(arch, "row_quant").launch((3,), (256,), [x, out, scale, 256])
    (found,) = caught.value.findings
    assert found.kind is FindingKind.OUT_OF_BOUNDS
    assert found.workgroup == (2, 0, 0)
    assert found.place.source is not None
    assert found.place.source.split("/")[-1] == "row_quant.hip:34"
    assert "global_load_dwordx4" in found.place.text


def test_trace_of_one_wave(arch):
    x, out, scale = (
        torch.randn(2, 2048).bfloat16(),
        torch.empty(2, 2048).to(FP8[arch]),
        torch.empty(2),
    )
    request = TraceRequest(workgroup=(1, 0, 0), wave=2, limit=20)
    run = compile_hip(arch, "row_quant").launch((2,), (256,), [x, out, scale, 256], trace=request)
    assert len(run.trace) == 20
    assert run.trace[0].exec_mask == (1 << 64) - 1
    loaded = next(entry for entry in run.trace if "global_load_dwordx4" in entry.place.text)
    words = x.view(torch.int32).reshape(2, 256, 4)[1, 128:192, 0]
    assert loaded.result.view("int32").tolist() == words.tolist()


def test_static_figures(arch):
    """A matrix kernel: no spills, wide loads, a loop with matrix operations in it."""
    pointers = dict.fromkeys(("a", "b"), "*" + FP8_NAME[arch]) | {
        "out": "*bf16",
        "a_scale": "*fp32",
        "b_scale": "*fp32",
    }
    signature = tuple((pointers | dict.fromkeys("MNK", "i32")).items())
    constants = (("BM", 64), ("BN", 128), ("BK", 128))
    kernel, shared, items = compile_triton("gemm_block_scale", arch, signature, constants, True, 4)
    figures = static_figures(kernel, shared_bytes=shared, work_items=items)
    assert figures.vgpr_spills == figures.sgpr_spills == figures.scratch_bytes == 0
    assert figures.vgprs == kernel.metadata[".vgpr_count"] > 64
    assert figures.lds_bytes == shared > 0
    assert 1 <= figures.occupancy <= 8
    assert 4 < figures.bytes_per_load <= 16
    assert figures.inner_loop is not None
    assert 0.1 < figures.mfma_share < 1
