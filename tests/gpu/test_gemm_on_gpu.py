"""Quantised linear layers on the accelerator: every provider against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core.arch import arch_of
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.bmm import BmmProblem
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from aiter_inductor.lowerings.gemm_tile_packed import codes_of, in_rows
from tests.lowerings.test_gemm import expected

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")

OPS = load_ops()
BF16, INT8 = torch.bfloat16, torch.int8
SHAPES = [(1, 128, 128), (64, 2176, 7168), (300, 384, 1536), (7, 200, 328), (0, 256, 256)]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "block": (
        "gemm_fp8_blockscale",
        {"scaling": "block", "group_size": 128, "block_n": 128, "block_k": 128},
    ),
    "row": ("gemm_fp8_rowwise", {"scaling": "row"}),
    "tensor": ("gemm_fp8_per_tensor", {"scaling": "tensor"}),
    "int8": ("gemm_int8", {"scaling": "row", "dtype": INT8, "weight_dtype": INT8}),
    "fp8 rows": ("gemm_w8a16", {"scaling": "weight_row", "dtype": BF16}),
    "int8 blocks": (
        "gemm_w8a16",
        {
            "scaling": "weight_block",
            "dtype": BF16,
            "weight_dtype": INT8,
            "block_n": 128,
            "block_k": 128,
        },
    ),
    "int4": (
        "gemm_w4a16",
        {
            "scaling": "weight_group",
            "dtype": BF16,
            "weight_dtype": torch.uint8,
            "group_size": 128,
        },
    ),
    "int4 zeros": (
        "gemm_w4a16",
        {
            "scaling": "weight_group",
            "dtype": BF16,
            "weight_dtype": torch.uint8,
            "group_size": 32,
            "has_zero": True,
            "offset_binary": True,
        },
    ),
}


def offered() -> list[tuple[str, str]]:
    """Every kind with every provider that its op has for a GPU."""
    return [(k, p) for k, (op, _) in KINDS.items() for p in OPS[op].providers if p != "cpp"]


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "name"), offered())
def test_provider(kind: str, name: str, shape: tuple[int, int, int], biased: bool) -> None:
    op, provider = OPS[KINDS[kind][0]], OPS[KINDS[kind][0]].providers[name]
    use = Use(arch_of(torch.device("cuda")), force=True)
    fp8 = use.arch.fp8_dtypes[0]
    fields = {"dtype": fp8, "weight_dtype": fp8, "out_dtype": BF16} | KINDS[kind][1]
    problem = GemmProblem(*shape, **fields)
    if biased:
        problem = replace(problem, bias_dtype=BF16)
    if not provider.serves(use.arch):
        pytest.skip(f"{name} has no kernel for {use.arch}")
    if reason := provider.refusal(problem, use):
        pytest.skip(reason)
    args, kwargs = problem.sample(seed=1, device="cuda")
    poison = torch.full((1 << 24,), torch.nan, device="cuda")
    del poison
    found = provider.run(*args, **kwargs)
    assert found.dtype == BF16
    exact = expected(problem, [a if a is None else a.cpu() for a in args]).cuda()
    largest = exact.abs().max() if exact.numel() else 1.0
    # Half a step of bfloat16 at the value, and sums in float32 of terms that cancel. The library
    # gets weights that are rounded to bfloat16.
    rounds = name == "vendor" and problem.scaling.startswith("weight")
    beside = largest * (4e-3 if rounds else 1e-3)
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + beside).all(), op.name


@pytest.mark.parametrize("rows", [0, 64, 300])
@pytest.mark.parametrize("kind", ["fp8 rows", "int8 blocks", "int4", "int4 zeros"])
def test_weights_alone_with_rows_counted_when_called(kind: str, rows: int) -> None:
    op, fp8 = OPS[KINDS[kind][0]], arch_of(torch.device("cuda")).fp8_dtypes[0]
    if not op.providers["vendor"].serves(arch_of(torch.device("cuda"))):
        pytest.skip("vendor has no choice for this chip")
    fields = {"weight_dtype": fp8, "out_dtype": BF16} | KINDS[kind][1]
    problem = GemmProblem(rows, 392, 1296, **fields, bias_dtype=BF16)
    args, kwargs = problem.sample(seed=1, device="cuda")
    found = op.providers["vendor"].run(*args, **kwargs)
    exact = expected(problem, [a if a is None else a.cpu() for a in args]).cuda()
    # Beyond 128 rows the weight is rounded to bfloat16 too, as plain code does.
    difference = (found.double() - exact).norm()
    assert difference <= exact.norm() * (1.8e-3 if rows <= 128 else 3e-3)


@pytest.mark.parametrize("kind", [k for k in KINDS if "int4" not in k])
def test_more_elements_than_an_int32_counts(kind: str) -> None:
    op = OPS[KINDS[kind][0]]
    fp8 = arch_of(torch.device("cuda")).fp8_dtypes[0]
    fields = {"dtype": fp8, "weight_dtype": fp8, "out_dtype": BF16} | KINDS[kind][1]
    N, K = 270336, 8192
    problem = GemmProblem(8, N, K, **fields)
    last = slice(N - 256, N)
    args, kwargs = problem.sample(seed=1, device="cuda")
    found = op.providers["triton"].run(*args, **kwargs)[:, last]
    torch.cuda.synchronize()
    args, tail = list(args), replace(problem, N=256)
    args[1] = args[1][last]
    if args[-2].dim():
        args[-2] = args[-2][-(256 // 128 if "block" in tail.scaling else 256) :]
    exact = expected(tail, [a if a is None else a.cpu() for a in args]).cuda()
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + exact.abs().max() * 1e-3).all()


@pytest.mark.parametrize("shape", [(3, 1, 512, 128), (2, 300, 392, 1296), (4, 64, 2048, 512)])
@pytest.mark.parametrize("by", ["block", "row", "tensor", "turned"])
def test_batches(by: str, shape: tuple[int, int, int, int]) -> None:
    op = OPS["bmm_fp8"]
    B, M, N, K = shape
    arch = arch_of(torch.device("cuda"))
    fp8 = arch.fp8_dtypes[0]
    sizes: dict[str, Any] = {
        "block": {
            "x_scales": (B, M, -(-K // 128)),
            "weight_scales": (B, -(-N // 128), -(-K // 128)),
        },
        "row": {"x_scales": (B, M, 1), "weight_scales": (B, N, 1), "block_n": 1},
        "tensor": {"x_scales": (1, 1, 1), "weight_scales": (B, 1, 1)},
    }
    sizes["turned"] = {**sizes["block"], "turned": True}
    problem = BmmProblem(B, M, N, K, fp8, fp8, torch.float32, **sizes[by])
    args, kwargs = problem.sample(seed=1, device="cuda")
    found = op.providers["triton"].run(*args, **kwargs)
    exact = op.reference(*(a.cpu() for a in args), **kwargs)
    difference = (found.cpu().double() - exact.double()).norm()
    # Hopper's tensor cores add fp8 products with 14 bits: 1.2e-4 on an H100.
    assert difference <= 6e-4 * exact.double().norm(), op.name


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 16, 77])
def test_int4_in_tiles_as_torch_packs_them(rows: int, group_size: int) -> None:
    """The layout against torch's packing, and the product against its kernel and float64."""
    N, K, tile_n = 272, 1024, 16 if torch.version.hip else 8
    codes = torch.randint(0, 16, (N, K), device="cuda", dtype=torch.int32)
    pairs = ((codes[:, ::2] << 4) | codes[:, 1::2]).to(torch.uint8)
    words = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    assert torch.equal(codes_of(words, tile_n), (codes - 8).to(torch.int8))
    scales = (torch.rand(K // group_size, N, 2, device="cuda") / 64).to(BF16)
    x = torch.randn(rows, K, device="cuda").to(BF16)
    sizes = {"group_size": group_size, "out_features": N, "tile_n": tile_n}
    columns = in_rows(words, scales, group_size, tile_n, torch.float64)
    wanted = x.double() @ columns.T
    for name, limit in (("triton", 2e-3), ("vendor", 1e-2)):
        if (provider := OPS["gemm_w4a16_tile_packed"].providers[name]).serves(arch_of(x.device)):
            found = provider.run(x, words, scales, **sizes)
            assert (found.double() - wanted).norm() <= limit * wanted.norm(), name
    theirs = torch.ops.aten._weight_int4pack_mm(x, words, group_size, scales).double()
    assert (theirs - wanted).norm() <= 1e-2 * wanted.norm()
