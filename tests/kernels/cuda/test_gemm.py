"""The fp8 products: which tiles can be built, and on a GPU that every result is that of float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aiter_inductor.core.arch import arch_named
from aiter_inductor.kernels.cuda.gemm import (
    GemmVariant,
    gemm_fp8_blockscale,
    gemm_fp8_per_tensor,
    gemm_fp8_rowwise,
)
from aiter_inductor.kernels.cuda.gemm_config import GemmConfig
from aiter_inductor.kernels.hip.loading import collecting_modules
from aiter_inductor.kernels.hip.quant import quant_per_group
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from tests.kernels.cuda.compiling import compiled

FP8, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
MODEL_SHAPES = [
    (M, N, K) for M in (1, 16, 64, 128, 4096) for N, K in ((2176, 7168), (7168, 16384), (576, 512))
]
# A bf16 result is rounded by 2^-9 at most, 1.7e-3 in the norm; the rest is the tensor cores' sums.
LARGEST_ERROR = {BF16: 2e-3, FP16: 6e-4, FP32: 6e-4}

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="torch sees no GPU with wgmma",
)


def operands(M: int, N: int, K: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    x, weight = normal(M, K).to(FP8), normal(N, K).to(FP8)
    x_scale = normal(M, -(-K // 128)).abs() + 0.1
    return x, weight, x_scale, (normal(-(-N // 128), -(-K // 128)).abs() + 0.1) / K**0.5


def exact(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    K, N = x.shape[1], weight.shape[0]
    rows = x.double() * x_scale.double().repeat_interleave(128, 1)[:, :K]
    spread = weight_scale.double().repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    return rows @ (weight.double() * spread).t()


def assert_product(found: Tensor, wanted: Tensor) -> None:
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error < LARGEST_ERROR[found.dtype], f"{error:.2e}"


def poison() -> None:
    """What the allocator hands out next is full of NaN."""
    torch.full((1 << 26,), float("nan"), device="cuda")


def problem_of(M: int, N: int, K: int) -> GemmProblem:
    blocks = {"group_size": 128, "block_n": 128, "block_k": 128}
    return GemmProblem(M, N, K, FP8, FP8, BF16, "block", **blocks)


def tokens(block_m: int, block_n: int, stages: int, split: int, per_sm: int) -> GemmConfig:
    return GemmConfig(1, block_m, block_n, 128, stages, split, 1, per_sm)


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_defaults_and_candidates_fit_the_chip(shape):
    problem, hopper = problem_of(*shape), arch_named("sm_90")
    tried = [c for c in GemmConfig.candidates(problem, hopper) if c.refuse(problem) is None]
    assert len(set(tried)) > 5
    assert GemmConfig.default(problem, 132).refuse(problem) is None


@pytest.mark.parametrize(
    ("N", "K", "block_n", "split"),
    [(512, 4096, 64, 8), (2176, 7168, 128, 6), (4096, 1536, 128, 3), (18432, 7168, 128, 1)],
)
def test_few_rows_take_up_to_a_block_a_multiprocessor(N, K, block_n, split):
    found = GemmConfig.default(problem_of(64, N, K), 132)
    assert (found.swap, found.block_n, found.cluster) == (1, block_n, split)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (GemmConfig(block_m=64), "tiles of 64x256 by 128 are no whole products"),
        (GemmConfig(block_n=320, width=160), "tiles of 128x320 for 1 blocks are no copies of TMA"),
        (GemmConfig(width=256), "256 accumulators a thread exceed 208"),
        (GemmConfig(stages=5), "278608 bytes of shared memory exceed 232448"),
        (tokens(136, 128, 4, 4, 1), "tiles of 136x128 are no whole swapped products"),
        (tokens(64, 128, 4, 9, 1), "K is cut into 9 > 8 parts"),
        (tokens(64, 128, 5, 4, 2), "126656 bytes of shared memory exceed 115712"),
    ],
    ids=str,
)
def test_tiles_that_cannot_be_built_are_sentences(config, sentence):
    assert config.refuse(problem_of(64, 256, 7168)) == sentence


@pytest.mark.parametrize(
    "variant",
    [
        GemmVariant(GemmConfig(), "block", BF16, None, True),
        GemmVariant(GemmConfig(0, 256, 128, 128, 3, 2), "row", BF16, BF16, True),
        GemmVariant(GemmConfig(0, 128, 192, 96, 4, 2), "block", FP16, FP32, True),
        GemmVariant(tokens(64, 128, 4, 4, 2), "block", BF16, None, False),
        GemmVariant(tokens(16, 64, 8, 8, 1), "tensor", FP32, FP16, False),
    ],
    ids=str,
)
def test_sources_compile_without_spills(variant, tmp_path):
    artifact = compiled(variant, tmp_path)
    assert "warning" not in artifact.log
    assert " 0 bytes spill stores" in artifact.log or "nvrtc" in artifact.compiler


@pytest.mark.parametrize(
    ("M", "source"), [(64, "gemm_fp8_tokens.cu"), (4096, "gemm_fp8_tiles.cu")], ids=str
)
def test_meta_tensors_name_the_module_that_prebuild_needs(M, source):
    def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight = empty(M, 512, dtype=FP8), empty(256, 512, dtype=FP8)
    with collecting_modules("sm_90") as modules:
        out = gemm_fp8_blockscale(x, weight, empty(M, 4), empty(2, 4))
    assert (out.shape, out.dtype, out.device.type) == ((M, 256), BF16, "meta")
    assert [module.sources[0].name for module in modules] == [source]


@on_gpu
@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(),
        GemmConfig(cluster=2, band=3),
        GemmConfig(0, 128, 128, 128, 6),
        GemmConfig(0, 256, 128, 128, 4),
        GemmConfig(0, 128, 192, 96, 4, 2),
        GemmConfig(0, 128, 160, 160, 5),
        GemmConfig(0, 128, 112, 112, 6),
        tokens(64, 128, 4, 4, 2),
        tokens(16, 64, 6, 7, 1),
        tokens(128, 128, 3, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [
        (300, 1160, 1552),
        (1, 136, 128),
        (129, 391, 400),
        (64, 2176, 7168),
        (2200, 2256, 400),
        (2200, 4360, 128),
    ],
    ids=str,
)
def test_every_tile_of_every_shape(config, shape):
    x, weight, x_scale, weight_scale = operands(*shape)
    wanted = exact(x, weight, x_scale, weight_scale)
    of_columns = x_scale.t().contiguous().t()
    for scale in (x_scale, of_columns):
        poison()
        assert_product(gemm_fp8_blockscale(x, weight, scale, weight_scale, config=config), wanted)


@on_gpu
@pytest.mark.parametrize("M", [1, 64, 300])
@pytest.mark.parametrize("bias_dtype", [None, BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("out_dtype", [BF16, FP16, FP32], ids=str)
def test_scales_results_and_biases(M, out_dtype, bias_dtype):
    x, weight, x_scale, weight_scale = operands(M, 520, 1024)
    bias = None if bias_dtype is None else torch.randn(520, device="cuda").to(bias_dtype)
    more = 0.0 if bias is None else bias.double()
    wanted = exact(x, weight, x_scale, weight_scale) + more
    kinds = {"out_dtype": out_dtype}
    assert_product(gemm_fp8_blockscale(x, weight, x_scale, weight_scale, bias, **kinds), wanted)
    of_x, of_weight = x_scale[:, :1], torch.rand(520, device="cuda") / 32
    plain = x.double() @ weight.double().t()
    wanted = plain * of_x.double() * of_weight.double() + more
    assert_product(gemm_fp8_rowwise(x, weight, of_x, of_weight, bias, **kinds), wanted)
    wanted = plain * of_x[0].double() * of_weight[0].double() + more
    assert_product(gemm_fp8_per_tensor(x, weight, of_x[0], of_weight[0], bias, **kinds), wanted)


@on_gpu
def test_no_rows_leading_dimensions_and_strides():
    x, weight, x_scale, weight_scale = operands(6, 256, 512)
    empty = gemm_fp8_blockscale(x[:0], weight, x_scale[:0], weight_scale)
    assert empty.shape == (0, 256)
    wanted = exact(x, weight, x_scale, weight_scale)
    found = gemm_fp8_blockscale(
        x.view(2, 3, 512), weight, x_scale.view(2, 3, 4), weight_scale, out_dtype=FP32
    )
    assert found.shape == (2, 3, 256)
    assert_product(found.view(6, 256), wanted)
    columns = torch.empty(512, 256, dtype=FP8, device="cuda").t().copy_(weight)
    assert_product(gemm_fp8_blockscale(x, columns, x_scale, weight_scale), wanted)


@on_gpu
def test_a_weight_beyond_2_31_elements():
    N, K = 131072 + 128, 16384
    x, weight, x_scale, _ = operands(4, 128, K)
    large = weight.repeat(N // 128, 1)
    weight_scale = torch.ones(N // 128, K // 128, device="cuda") / 128
    weight_scale[-1] *= 3
    assert large.numel() > 2**31
    for config in (tokens(8, 128, 4, 1, 1), GemmConfig()):
        found = gemm_fp8_blockscale(x, large, x_scale, weight_scale, config=config)
        for first in (0, N - 128):
            part = slice(first, first + 128)
            wanted = exact(x, weight, x_scale, weight_scale[first // 128 :][:1])
            assert_product(found[:, part], wanted)


@on_gpu
def test_graphs_and_streams_run_it():
    x, weight, x_scale, weight_scale = operands(64, 512, 1024)
    eager = gemm_fp8_blockscale(x, weight, x_scale, weight_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gemm_fp8_blockscale(x, weight, x_scale, weight_scale)
    found.fill_(float("nan"))
    graph.replay()
    assert torch.equal(found, eager)


@on_gpu
def test_a_result_beyond_2_31_elements():
    """Its last rows and columns are right."""
    M, N, K = 8192, 270336, 128
    x, tail, x_scale, _ = operands(M, 256, K)
    weight = torch.zeros(N, K, dtype=torch.uint8, device="cuda").view(FP8)
    weight[-256:], weight[:256] = tail, tail.flip(0)
    blocks = torch.rand(N // 128, 1, device="cuda") + 0.1
    out = gemm_fp8_blockscale(x, weight, x_scale, blocks)
    assert out.numel() > 2**31
    last = x[-8:], x_scale[-8:]
    assert_product(out[-8:, -256:], exact(last[0], tail, last[1], blocks[-2:]))
    assert_product(out[-8:, :256], exact(last[0], tail.flip(0), last[1], blocks[:2]))
    assert not out[-8:, 256:-256].any()


@on_gpu
@pytest.mark.parametrize("leading", [(0,), (2, 0, 3)], ids=str)
def test_no_rows(leading):
    x, weight, x_scale, weight_scale = operands(1, 256, 512)
    empty = x.expand(*leading, 512), weight, x_scale.expand(*leading, 4)
    assert gemm_fp8_blockscale(*empty, weight_scale).shape == (*leading, 256)
    one = torch.ones((), device="cuda")
    assert gemm_fp8_per_tensor(*empty[:2], one, one).shape == (*leading, 256)
    of_rows = torch.ones(*leading, 1, device="cuda"), torch.ones(256, device="cuda")
    assert gemm_fp8_rowwise(*empty[:2], *of_rows).shape == (*leading, 256)


@on_gpu
@pytest.mark.parametrize("M", [64, 2048])
def test_a_kernel_that_begins_early_reads_what_the_one_ahead_wrote(M):
    """Each product quantises the last one's result, and its weight is copied just before it."""
    N = 2048
    x, weight, _, weight_scale = operands(M, N, N)
    weights = [operands(1, N, N, seed=i)[1] for i in range(8)]
    held = torch.empty_like(weight)
    first = x.to(BF16)

    def chain(*, apart: bool) -> list[Tensor]:
        rows, found = first, []
        for each in weights:
            q, scale = quant_per_group(rows, group_size=128, dtype=FP8)
            held.copy_(each)
            rows = gemm_fp8_blockscale(q, held, scale, weight_scale)
            found.append(rows)
            if apart:
                torch.cuda.synchronize()
        return found

    wanted = chain(apart=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = chain(apart=False)
    for _ in range(20):
        for out in replayed:
            out.fill_(float("nan"))
        graph.replay()
        for out, other in zip(replayed, wanted, strict=True):
            assert torch.equal(out, other)
