"""Linears on int4 weights in tiles: the layout against torch's description of it, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.gemm_tile_packed import (
    TilePackedProblem,
    codes_of,
    gemm_w4a16_tile_packed,
)
from tests.lowerings.checks import assert_close, opcheck

BF16 = torch.bfloat16
PROBLEM = TilePackedProblem(
    M=5,
    N=40,
    K=200,
    dtype=BF16,
    weight_dtype=torch.uint8,
    out_dtype=BF16,
    scaling="weight_group",
    bias_dtype=torch.float32,
    group_size=64,
    layout="int4 tiles",
    has_zero=True,
    offset_binary=True,
    padded_n=48,
    padded_k=256,
)
both = pytest.mark.parametrize("tile_n", [8, 16])


def place(row, column, blocks, tile_n):
    """`(word, bit)` of an element, after the comments in int4mm.cu: lane by lane, 4 words each."""
    block, k = divmod(column, 128)
    word_of_lane, k = divmod(k, 32)
    second_16, k = divmod(k, 16)
    if tile_n == 8:  # a lane has elements 2 l, 2 l + 1, 2 l + 8 and 2 l + 9
        second_pair, k = divmod(k, 8)
        lane = row % 8 * 4 + k // 2
    else:  # 4 l to 4 l + 3
        lane, k = row % 16 + 16 * (k // 4), k % 4
        second_pair = k // 2
    tile = row // tile_n * blocks + block
    word = tile * tile_n * 16 + lane * 4 + word_of_lane
    return word, 4 * (4 * (column % 2) + 2 * second_16 + second_pair)


def packed(codes, tile_n):
    """Words [N / 8, K / 128, 32, 4] of codes [N, K] from 0 to 15, one element after the other."""
    N, K = codes.shape
    words = [0] * (N * K // 8)
    for row in range(N):
        for column in range(K):
            word, bit = place(row, column, K // 128, tile_n)
            words[word] |= int(codes[row, column]) << bit
    signed = [w - (1 << 32) if w >= 1 << 31 else w for w in words]
    return torch.tensor(signed, dtype=torch.int32).reshape(N // 8, K // 128, 32, 4)


@both
def test_codes_are_where_torch_puts_them(tile_n):
    codes = torch.randint(0, 16, (32, 256), generator=torch.Generator().manual_seed(0))
    assert torch.equal(codes_of(packed(codes, tile_n), tile_n), (codes - 8).to(torch.int8))


def exact(args, kwargs):
    """The layer in float64."""
    x, words, scales, bias = args
    codes = codes_of(words, kwargs["tile_n"]).double()
    scale, zero = (
        scales[..., i].double().T.repeat_interleave(kwargs["group_size"], 1) for i in (0, 1)
    )
    columns = (codes * scale + zero)[: kwargs["out_features"], : x.shape[-1]]
    return x.double() @ columns.T + bias.double()


@both
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_reference(tile_n, dtype):
    problem = replace(PROBLEM, tile_n=tile_n, dtype=dtype, out_dtype=dtype)
    args, kwargs = problem.sample(seed=1, device="cpu")
    assert gemm_w4a16_tile_packed.problem(*args, **kwargs) == problem
    out = gemm_w4a16_tile_packed(*args, **kwargs)
    assert (out.dtype, tuple(out.shape)) == (dtype, (5, 40))
    assert_close(out, exact(args, kwargs))


def test_operator():
    args, kwargs = PROBLEM.sample(seed=2, device="cpu")
    opcheck(gemm_w4a16_tile_packed, args, kwargs)


MISMATCHES = [
    (1, torch.zeros(6, 2, 32, 4), {}, "weight is [6, 2, 32, 4] of float32, not [N / 8"),
    (1, torch.zeros(5, 2, 32, 4, dtype=torch.int32), {"tile_n": 16}, "tiles of 16 rows do not"),
    (0, torch.zeros(5, 300), {}, "[40, 300] is no part of the weight's [48, 256]"),
    (2, torch.zeros(2, 48, 2), {}, "scale_and_zero is [2, 48, 2], not [256 / 64, 48, 2]"),
    (3, torch.zeros(48), {}, "bias is [48] but the result has 40 columns"),
]


@pytest.mark.parametrize(("at", "wrong", "changed", "sentence"), MISMATCHES)
def test_mismatches_are_sentences(at, wrong, changed, sentence):
    args, kwargs = PROBLEM.sample(seed=6, device="cpu")
    args = [*args[:at], wrong, *args[at + 1 :]]
    found = gemm_w4a16_tile_packed.problem(*args, **{**kwargs, **changed}).mismatch
    assert found is not None
    assert found.startswith(sentence)


@pytest.mark.parametrize(("M", "provider"), [(1, None), (16, None), (64, "triton"), (65, "vendor")])
def test_who_multiplies_on_hopper(M, provider):
    use, problem = Use(arch_named("sm_90")), replace(PROBLEM, M=M)
    found = gemm_w4a16_tile_packed.select(problem, use)
    assert (found.provider and found.provider.name) == provider
    assert found.provider or found.reason.endswith("and torch's kernel 21.4")
    opened = gemm_w4a16_tile_packed.select(replace(problem, M=sympy.Symbol("s0")), use)
    assert opened.provider is gemm_w4a16_tile_packed.providers["vendor"]
    cdna = gemm_w4a16_tile_packed.select(replace(problem, tile_n=16), Use(arch_named("gfx950")))
    assert cdna.provider is gemm_w4a16_tile_packed.providers["triton"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tile_n": 16}, "not tiles of 16 rows and groups of 64"),
        ({"dtype": torch.float16}, "x is float16, torch's kernel reads bfloat16"),
        (
            {"scale_dtype": torch.float32},
            "scale_and_zero is float32, torch's kernel reads bfloat16",
        ),
    ],
)
def test_what_the_library_leaves(change, sentence):
    vendor = gemm_w4a16_tile_packed.providers["vendor"]
    reason = vendor.refusal(replace(PROBLEM, **change), Use(arch_named("sm_90")))
    assert reason is not None
    assert reason.endswith(sentence)
