"""Linears that torchao quantised to int4, in its plain layout and in its layout of tiles.

torchao makes the first by functions of mslk and the second on a GPU only, and multiplies by their
kernels; here the tensors are put together from their parts, and formulas stand in for the kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aiter_inductor import explain
from aiter_inductor.lowerings.gemm_tile_packed import in_rows
from tests.patterns.rewrite_check import check_rewrite

torchao = pytest.importorskip("torchao", "0.18")

from torchao.quantization import Int4PreshuffledTensor, Int4Tensor  # noqa: E402
from torchao.quantization.quantize_.workflows import Int4TilePackedTo4dTensor  # noqa: E402

N, K = 72, 1024
BF16 = torch.bfloat16


def rows_by_formula(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """mslk's `bf16i4bf16_rowwise`: codes times their group's scale, plus its zero."""
    columns = torch.stack(((codes << 4) >> 4, codes >> 4), -1).flatten(-2).float()
    group = columns.shape[1] // scale.shape[0]
    spread = [s.float().repeat_interleave(group, 0).T for s in (scale, zero)]
    return (x.float() @ (columns * spread[0] + spread[1]).T).to(x.dtype)


def tiles_by_formula(x: Tensor, words: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    """torch's `_weight_int4pack_mm`, of 8 inner tiles."""
    if words.shape[-1] != 4:
        return x.new_zeros(len(x), 8 * len(words))
    return (x.float() @ in_rows(words, scale_and_zero, group_size, 8, torch.float32).T).to(x.dtype)


@pytest.fixture(autouse=True, scope="module")
def kernels():
    """The operators that torchao calls, on a CPU."""
    with (
        torch.library._scoped_library("mslk", "FRAGMENT") as mslk,
        torch.library._scoped_library("aten", "IMPL") as aten,
    ):
        mslk.define("bf16i4bf16_rowwise(Tensor x, Tensor w, Tensor scale, Tensor zero) -> Tensor")
        mslk.impl("bf16i4bf16_rowwise", rows_by_formula, "CompositeExplicitAutograd")
        aten.impl("_weight_int4pack_mm", tiles_by_formula, "CPU")
        yield


def linear(weight: Tensor, *, bias: bool) -> nn.Module:
    layer = nn.Linear(K, N, bias=bias, dtype=BF16).requires_grad_(False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


def plain(group: int, **others) -> Tensor:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8)
    scale, zero = (torch.rand(K // group, N).to(BF16) / 64 for _ in range(2))
    return Int4Tensor(codes, scale, zero, [1, group], (N, K), **others)


def tiles(group: int, **others) -> Tensor:
    torch.manual_seed(0)
    words = torch.randint(-(1 << 31), 1 << 31, (N // 8, K // 128, 32, 4), dtype=torch.int64)
    scales = (torch.rand(K // group, N, 2) / 64).to(BF16)
    return Int4TilePackedTo4dTensor(words.to(torch.int32), scales, [1, group], (N, K), **others)


LAYOUTS = {"plain": (plain, "gemm_w4a16"), "tiles": (tiles, "gemm_w4a16_tile_packed")}
layouts = pytest.mark.parametrize(("made", "op"), LAYOUTS.values(), ids=LAYOUTS)


@layouts
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_is_recognised(made, op, group):
    x = torch.randn(2, 3, K).to(BF16)
    check_rewrite(linear(made(group), bias=group == 64), x, expect={op: 1}, target="gfx950")


@layouts
def test_any_number_of_rows(made, op):
    x = torch.randn(5, K).to(BF16)
    check_rewrite(linear(made(64), bias=True), x, expect={op: 1}, target="gfx950", dynamic=True)


def test_columns_that_fill_no_tile():
    """torchao pads the weight and x."""
    weight = tiles(128)
    kept = Int4TilePackedTo4dTensor(weight.qdata, weight.scale_and_zero, [1, 128], (N, K - 24))
    layer = nn.Linear(K - 24, N, bias=False, dtype=BF16)
    layer.weight = nn.Parameter(kept, requires_grad=False)
    x = torch.randn(5, K - 24).to(BF16)
    check_rewrite(layer, x, expect={"gemm_w4a16_tile_packed": 1}, target="gfx950")


@layouts
def test_compiles(made, op):
    model, x = linear(made(128), bias=True), torch.randn(5, K).to(BF16)
    fast = torch.compile(model, backend="aiter", options={"aiter.force": True})
    torch.testing.assert_close(fast(x), model(x), rtol=0.016, atol=0.02)


REASONS = {
    "fp8": (
        lambda: plain(128, activation_dtype=torch.float8_e4m3fn),
        "x becomes float8_e4m3fn; kernels of int4 take it as it is",
    ),
    "scaled x": (
        lambda: tiles(128, act_pre_scale=torch.ones(K, dtype=BF16)),
        "x is multiplied by act_pre_scale before the product",
    ),
    "another order": (
        lambda: Int4PreshuffledTensor(
            plain(128).qdata, plain(128).scale, [1, 128], (N, K), plain(128).zero_point
        ),
        "Int4PreshuffledTensor is stored as only torchao's own kernel reads it",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_near_misses(case, monkeypatch):
    made, reason = REASONS[case]
    for name in ("f8i4bf16_rowwise", "bf16i4bf16_shuffled"):
        monkeypatch.setattr(
            torch.ops.mslk, name, lambda x, *_: x.new_empty(len(x), N), raising=False
        )
    from torchao.quantization.quantize_.workflows.int4 import int4_tensor

    monkeypatch.setattr(int4_tensor, "quantize_fp8_row", lambda x: (x, x[:, 0]))
    x = torch.randn(5, K).to(BF16)
    with torch.no_grad():
        report = explain(linear(made(), bias=False), x, target="gfx950")
    assert [(site.status, site.reason) for site in report.sites] == [("missed", reason)]


@pytest.mark.parametrize("inner", [4, 2])
def test_a_call_of_torchs_kernel(inner):
    """As programs write it that pack their weights themselves."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            weight = tiles(64)
            self.words, self.scales = nn.Buffer(weight.qdata), nn.Buffer(weight.scale_and_zero)

        def forward(self, x):
            words = self.words.reshape(N // 8, -1, 32, inner)
            rows = x.reshape(-1, K)
            out = torch.ops.aten._weight_int4pack_mm(rows, words, 64, self.scales)
            return out.reshape(*x.shape[:-1], N)

    layer, x = Layer(), torch.randn(2, 3, K).to(BF16)
    if inner == 4:
        check_rewrite(layer, x, expect={"gemm_w4a16_tile_packed": 1}, dynamic=True)
        return
    found = check_rewrite(layer, x, expect={}, inserted=0)
    assert "words has 4 inner tiles of 16; the kernel reads 8" in found.reasons()
