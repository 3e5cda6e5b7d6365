"""Quantised products at random sizes, layouts and tiles, under the interpreter, against float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiter_inductor.kernels.triton import gemm, gemm_weight
from aiter_inductor.kernels.triton.gemm_config import GemmConfig
from tests.kernels.triton.test_gemm import assert_product, cdiv, codes, scales, spread
from tests.lowerings.test_gemm import unpacked

FP8 = torch.float8_e4m3fn
LAYOUTS = ("plain", "columns", "gaps", "offset", "reversed rows")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values at other places in memory."""
    if layout == "columns" and x.dim() == 2:
        return x.t().contiguous().t()
    if layout == "gaps":
        return torch.stack((x, x), -1)[..., 0]
    if layout == "offset":  # not aligned to a word
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        room[1:] = x.reshape(-1)
        return room[1:].reshape(x.shape)
    if layout == "reversed rows" and x.dim() == 2:
        return torch.cat((x, x), 1)[:, : x.shape[1]]
    return x


@st.composite
def calls(draw: Any) -> tuple[Any, ...]:
    """`(kind, M, N, K, config, layouts, biased)`."""
    kind = draw(st.sampled_from(("block", "row", "tensor", "int8", "w8 rows", "w8 blocks", "w4")))
    M, N = draw(st.integers(0, 40)), draw(st.integers(1, 70))
    K = draw(st.integers(1, 150))
    tile = draw(st.sampled_from(((16, 16, 32), (16, 32, 64), (32, 64, 32))))
    config = GemmConfig(*tile, split_k=draw(st.sampled_from((1, 1, 3))), group_m=2)
    layouts = draw(st.lists(st.sampled_from(LAYOUTS), min_size=5, max_size=5))
    return kind, M, N, K + K % 2 if kind == "w4" else K, config, layouts, draw(st.booleans())


def product(kind: str, given: list[Any], config: GemmConfig) -> tuple[Any, Any, Any]:
    """`(result, x, weight)`, the operands in float64 as they are dequantised."""
    x, weight, of_x, of_weight, bias = given
    wide: dict[str, Any] = {"out_dtype": torch.float32, "config": config}
    if kind == "block":
        sizes = {"group_size": 64, "block_n": 48, "block_k": 64}
        out = gemm.gemm_fp8_blockscale(x, weight, of_x, of_weight, bias, **sizes, **wide)
        return out, spread(of_x, x, 1, 64), spread(of_weight, weight, 48, 64)
    if kind == "w4":
        out = gemm_weight.gemm_w4a16(x, weight, of_weight, bias, group_size=64, config=config)
        return out, x.double(), spread(of_weight, unpacked(weight), 1, 64)
    if kind == "w8 blocks":
        blocks = {"block_n": 48, "block_k": 64}
        out = gemm_weight.gemm_w8a16(x, weight, of_weight, bias, **blocks, config=config)
        return out, x.double(), spread(of_weight, weight, 48, 64)
    columns = weight.double() * (of_weight if kind == "tensor" else of_weight[:, None])
    if kind == "w8 rows":
        return (
            gemm_weight.gemm_w8a16(x, weight, of_weight, bias, config=config),
            x.double(),
            columns,
        )
    run = {"row": gemm.gemm_fp8_rowwise, "tensor": gemm.gemm_fp8_per_tensor, "int8": gemm.gemm_int8}
    out = run[kind](x, weight, of_x, of_weight, bias, **wide)
    return out, x.double() * of_x.double(), columns


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(calls())
def test_any_size_and_layout(call) -> None:
    kind, M, N, K, config, layouts, biased = call
    of_x = {"block": (M, cdiv(K, 64)), "row": (M, 1), "int8": (M, 1), "tensor": ()}.get(kind)
    blocks = cdiv(N, 48), cdiv(K, 64)
    shape = {"block": blocks, "w8 blocks": blocks, "w4": (N, blocks[1]), "tensor": ()}.get(kind)
    values = torch.int8 if kind == "int8" else FP8
    x = codes(M, K, values, 1) if of_x is not None else torch.randn(M, K)
    weight = codes(N, K, values, 2)
    if kind == "w4":
        weight = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    of_weight = scales(*((N,) if shape is None else shape), seed=6)
    bias = torch.randn(N) if biased else None
    plain = [x, weight, None if of_x is None else scales(*of_x), of_weight, bias]
    given = [
        None if t is None else laid_out(t, layout) for t, layout in zip(plain, layouts, strict=True)
    ]
    out, rows, columns = product(kind, given, config)
    assert out.shape == (M, N)
    assert_product(out, rows, columns, bias, 2e-6)
