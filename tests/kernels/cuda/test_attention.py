"""Flash attention in CUDA C++: it compiles as meant everywhere, and is right on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from aiter_inductor.kernels.cuda import attention as kernels
from aiter_inductor.kernels.cuda.attention_config import (
    SHARED_BYTES,
    WIDTHS,
    AttentionConfig,
    AttentionVariant,
)
from aiter_inductor.kernels.hip.loading import collecting_modules
from tests.kernels.cuda.compiling import compiled

BF16, FP16 = torch.bfloat16, torch.float16
NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no GPU to run CUDA kernels on"
)


@pytest.mark.parametrize("qk_dim", WIDTHS)
@pytest.mark.parametrize("v_dim", WIDTHS)
def test_every_width_has_a_tile_that_fits(qk_dim, v_dim):
    config = AttentionConfig.default(qk_dim, v_dim, 4096)
    assert config.shared_bytes(qk_dim, v_dim, packed=True) <= SHARED_BYTES
    assert config.block_n >= 64


@pytest.mark.parametrize(
    ("widths", "window", "softcap", "packed", "fp16", "shared", "named"),
    [
        ((128, 128), False, False, False, False, 0, True),
        ((192, 128), False, False, False, True, 1, False),
        ((256, 256), True, True, False, False, 0, False),
        ((64, 64), False, False, True, False, 0, False),
    ],
)
def test_variants_compile_without_spills(
    widths, window, softcap, packed, fp16, shared, named, tmp_path
):
    config = AttentionConfig.default(*widths, 4096, packed=packed)
    kinds = (True, window, softcap, packed, fp16, shared, named)
    variant = AttentionVariant(config, *widths, *kinds)
    artifact = compiled(variant, tmp_path)
    # ptxas says so where it makes products wait for one another.
    assert "serialized" not in artifact.log
    assert "warning" not in artifact.log
    assert " 0 bytes spill stores" in artifact.log or "nvrtc" in artifact.compiler


def test_what_a_call_builds_is_known_without_a_gpu():
    q, k, v = (torch.empty(1, heads, 500, 96, dtype=BF16, device="meta") for heads in (8, 2, 2))
    with collecting_modules("sm_90") as modules:
        kernels.attention(q, k, v, scale=0.1, causal="top_left", window=100)
        kernels.attention_with_lse(q, k, v[..., :64], scale=0.1)
        kernels.mla_prefill(*parts(1, 4, 500, 500, 64, device="meta"), scale=0.1, layout="bshd")
    *defines, in_parts = [dict(module.defines) for module in modules]
    assert (in_parts["QK_DIM"], in_parts["V_DIM"], in_parts["SHARED_COLUMNS"]) == (
        "192",
        "128",
        "1",
    )
    assert [(d["QK_DIM"], d["V_DIM"]) for d in defines] == [("128", "128"), ("128", "64")]
    assert [(d["CAUSAL"], d["WINDOW"]) for d in defines] == [("1", "1"), ("0", "0")]


def heads(batch: int, num: int, tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, num, tokens, width, device="cuda").to(dtype)


def documents(batch, num_tokens, starts):
    """[batch, num_tokens], int32: first keys of documents that start at `starts`, one row's half.

    The other rows start theirs a token earlier.
    """
    at = torch.arange(num_tokens, device="cuda").repeat(batch, 1)
    begins = torch.zeros_like(at)
    for start in starts:
        for row in range(batch):
            begins[row, start - row % 2] = start - row % 2
    return begins.cummax(-1).values.int()


def expected(
    q, k, v, sinks=None, *, scale, causal="none", window=None, softcap=None, first_keys=None
):
    """Output and log-sum-exp in float64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    S, T = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(S, device=q.device)[:, None] + (T - S if causal == "bottom_right" else 0)
    key = torch.arange(T, device=q.device)
    if causal != "none":
        scores = scores.masked_fill(key > at, -math.inf)
    if window is not None:
        scores = scores.masked_fill(key <= at - window, -math.inf)
    if first_keys is not None:
        scores = scores.masked_fill(key < first_keys[:, None, :, None], -math.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    lse = torch.logsumexp(scores, -1)
    unseen = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(unseen, 0.0), -1).masked_fill(unseen, 0.0)[..., :T]
    return weights @ v, lse


CASES = {
    "one tile": ((1, 2, 1, 128, 128, 128, 128), {}),
    "causal": ((2, 4, 2, 512, 512, 128, 128), {"causal": "top_left"}),
    "many items a block": ((2, 24, 6, 1100, 1100, 128, 128), {"causal": "top_left"}),
    "ragged": ((1, 3, 3, 77, 301, 128, 128), {}),
    "fewer keys": ((1, 2, 1, 700, 90, 128, 128), {"causal": "bottom_right"}),
    "a cache before": ((1, 8, 2, 130, 1000, 128, 128), {"causal": "bottom_right"}),
    "one query": ((2, 4, 4, 1, 333, 64, 64), {"causal": "bottom_right"}),
    "latent": ((1, 4, 4, 600, 600, 192, 128), {"causal": "top_left"}),
    "wide": ((1, 4, 2, 300, 300, 256, 256), {"causal": "top_left"}),
    "odd widths": ((2, 3, 1, 200, 260, 72, 40), {"causal": "bottom_right"}),
    "three warpgroups": ((1, 4, 2, 2100, 2100, 64, 64), {"causal": "top_left"}),
    "window": ((1, 4, 2, 900, 900, 64, 64), {"causal": "top_left", "window": 128}),
    "window behind only": ((1, 2, 2, 300, 300, 128, 128), {"window": 50}),
}


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_float64(name, dtype):
    (batch, num_heads, kv_heads, S, T, qk_dim, v_dim), how = CASES[name]
    q = heads(batch, num_heads, S, qk_dim, dtype)
    k, v = heads(batch, kv_heads, T, qk_dim, dtype), heads(batch, kv_heads, T, v_dim, dtype)
    exact, exact_lse = expected(q, k, v, scale=qk_dim**-0.5, **how)
    out, lse = kernels.attention_with_lse(q, k, v, scale=qk_dim**-0.5, **how)
    assert torch.linalg.norm(out.double() - exact) <= error(dtype) * torch.linalg.norm(exact)
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(kernels.attention(q, k, v, scale=qk_dim**-0.5, **how), out)


STARTS = (1, 2, 3, 127, 128, 129, 300, 640, 641, 895)


@NEEDS_GPU
@pytest.mark.parametrize("how", [{}, {"window": 100}, {"softcap": 4.0}], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_documents_are_each_by_itself(widths, how):
    q = heads(2, 6, 901, widths[0], BF16)
    k, v = heads(2, 2, 901, widths[0], BF16), heads(2, 2, 901, widths[1], BF16)
    first_keys, sinks = documents(2, 901, STARTS), torch.randn(6, device="cuda").to(BF16)
    how = {**how, "scale": widths[0] ** -0.5, "causal": "top_left"}
    exact, exact_lse = expected(q, k, v, sinks, first_keys=first_keys, **how)
    out, lse = kernels.attention_with_lse(q, k, v, None, sinks, first_keys, **how)
    assert torch.linalg.norm(out.double() - exact) <= error(BF16) * torch.linalg.norm(exact)
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(kernels.attention(q, k, v, None, sinks, first_keys, **how), out)


def error(dtype: torch.dtype) -> float:
    """Relative, in norm: the weights and the output are rounded once each."""
    return torch.finfo(dtype).eps * 0.4


def parts(batch, num_heads, S, T, rope, dtype=BF16, device="cuda"):
    """Heads of 128 and `rope` elements, as views of what a model's projections give."""
    q = torch.randn(batch, S, num_heads, 128 + rope, device=device).to(dtype).transpose(1, 2)
    kv = torch.randn(batch, T, num_heads, 256, device=device).to(dtype).transpose(1, 2)
    k_rope = torch.randn(batch, 1, T, rope, device=device).to(dtype)
    return q[..., :128], q[..., 128:].contiguous(), kv[..., :128], k_rope, kv[..., 128:]


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    ("sizes", "causal"),
    [
        ((2, 6, 700, 700, 64), "top_left"),
        ((1, 3, 77, 301, 32), "bottom_right"),
        ((1, 2, 300, 90, 64), "bottom_right"),
        ((1, 24, 1100, 1100, 64), "top_left"),
        ((1, 2, 130, 500, 128), "none"),
    ],
    ids=str,
)
def test_heads_in_two_parts(sizes, causal, layout, dtype):
    given = parts(*sizes, dtype)
    q_nope, q_rope, k_nope, k_rope, v = given
    k = torch.cat((k_nope, k_rope.expand(*k_nope.shape[:-1], -1)), -1)
    exact, _ = expected(torch.cat((q_nope, q_rope), -1), k, v, scale=0.07, causal=causal)
    out = kernels.mla_prefill(*given, scale=0.07, causal=causal, layout=layout)
    assert torch.linalg.norm(out.double() - exact) <= error(dtype) * torch.linalg.norm(exact)
    assert (out.transpose(1, 2) if layout == "bshd" else out).is_contiguous()


@NEEDS_GPU
def test_parts_that_tma_cannot_read_are_copied():
    q_nope, q_rope, k_nope, k_rope, v = parts(1, 4, 200, 200, 64)
    wanted = kernels.mla_prefill(q_nope, q_rope, k_nope, k_rope, v, scale=0.07, causal="top_left")
    odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (q_rope, k_rope)]
    found = kernels.mla_prefill(q_nope, odd[0], k_nope, odd[1], v, scale=0.07, causal="top_left")
    assert torch.equal(found, wanted)


@NEEDS_GPU
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_strided_heads_and_both_layouts(layout):
    qkv = torch.randn(2, 190, 12, 128, device="cuda").to(BF16)
    q, k, v = qkv.transpose(1, 2).split((8, 2, 2), 1)
    out = kernels.attention(q, k, v, scale=0.1, causal="top_left", layout=layout)
    exact, _ = expected(q, k, v, scale=0.1, causal="top_left")
    assert torch.linalg.norm(out.double() - exact) <= error(BF16) * torch.linalg.norm(exact)
    dense = out if layout == "bhsd" else out.transpose(1, 2)
    assert dense.is_contiguous()


@NEEDS_GPU
def test_heads_that_tma_cannot_address_are_copied():
    wide = torch.randn(1, 4, 100, 67, device="cuda").to(BF16)
    q = k = v = wide[..., 1:65]
    out = kernels.attention(q, k, v, scale=0.1)
    exact, _ = expected(q, k, v, scale=0.1)
    assert torch.linalg.norm(out.double() - exact) <= error(BF16) * torch.linalg.norm(exact)


@NEEDS_GPU
def test_sinks_take_their_share():
    q, k, v = (heads(1, num, 256, 64, BF16) for num in (8, 2, 2))
    sinks = torch.randn(8, device="cuda").to(BF16)
    how = {"scale": 0.125, "causal": "top_left", "window": 32}
    out, lse = kernels.attention_with_lse(q, k, v, None, sinks, **how)
    exact, exact_lse = expected(q, k, v, sinks, **how)
    assert torch.linalg.norm(out.double() - exact) <= error(BF16) * torch.linalg.norm(exact)
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@NEEDS_GPU
def test_queries_that_see_no_key_give_zeros():
    q, k, v = (heads(1, 2, tokens, 128, BF16) for tokens in (300, 40, 40))
    out, lse = kernels.attention_with_lse(q, k, v, scale=0.1, causal="bottom_right")
    assert not out[:, :, :260].any()
    assert out[:, :, 260:].any(-1).all()
    assert (lse[:, :, :260] == -math.inf).all()
    assert lse[:, :, 260:].isfinite().all()
    out, lse = kernels.attention_with_lse(q, k[:, :, :0], v[:, :, :0], scale=0.1)
    assert not out.any()
    assert (lse == -math.inf).all()


@NEEDS_GPU
def test_large_scores_neither_overflow_nor_lose_the_largest():
    q, k, v = (heads(1, 2, 640, 128, BF16) for _ in range(3))
    q = q * 40
    out = kernels.attention(q, k, v, scale=1.0, causal="top_left")
    exact, _ = expected(q, k, v, scale=1.0, causal="top_left")
    assert torch.linalg.norm(out.double() - exact) <= error(BF16) * torch.linalg.norm(exact)


@NEEDS_GPU
@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_error_is_no_larger_than_that_of_torchs_flash(width):
    q, k, v = (heads(2, 4, 1000, width, BF16) for _ in range(3))
    how = {"scale": width**-0.5, "causal": "top_left"}
    exact, _ = expected(q, k, v, **how)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ours = kernels.attention(q, k, v, **how)
    off, theirs_off = (torch.linalg.norm(x.double() - exact).item() for x in (ours, theirs))
    assert off <= 1.02 * theirs_off


@NEEDS_GPU
def test_nan_reaches_only_what_sees_it():
    q, k, v = (heads(1, num, 300, 128, BF16) for num in (4, 2, 2))
    q[0, 1, 4], k[0, 1, 200] = math.nan, math.nan
    out, lse = kernels.attention_with_lse(q, k, v, scale=0.1, causal="top_left")
    hit = out.isnan().any(-1)
    assert torch.equal(hit, lse.isnan())
    assert hit[0, 1, 4]
    assert hit[0, 2:, 200:].all()
    assert hit.sum() == 1 + 2 * 100


@NEEDS_GPU
def test_no_batch():
    q = torch.empty(0, 4, 30, 128, dtype=BF16, device="cuda")
    out, lse = kernels.attention_with_lse(q, q, q, scale=0.1)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


@NEEDS_GPU
def test_a_captured_graph_counts_its_items_anew_at_each_replay():
    q, k, v = (heads(1, 40, 700, 128, BF16) for _ in range(3))
    out = kernels.attention(q, k, v, scale=0.1, causal="top_left")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.attention(q, k, v, scale=0.1, causal="top_left")
    for _ in range(3):
        captured.fill_(math.nan)
        graph.replay()
        assert torch.equal(captured, out)


@NEEDS_GPU
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("how", [{}, {"causal": "top_left", "window": 90}], ids=str)
def test_scores_are_capped(width, how):
    """Scores up to about 40, which a cap of 15 bends much."""
    q, k, v = (heads(1, num, 400, width, BF16) for num in (4, 2, 2))
    q, scale = q * 10, width**-0.5
    out, lse = kernels.attention_with_lse(q, k, v, scale=scale, softcap=15.0, **how)
    exact, exact_lse = expected(q, k, v, scale=scale, softcap=15.0, **how)
    assert torch.linalg.norm(out.double() - exact) <= error(BF16) * torch.linalg.norm(exact)
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@NEEDS_GPU
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize(
    "how",
    [{}, {"causal": "top_left"}, {"causal": "bottom_right", "window": 90}],
    ids=str,
)
def test_packed_sequences_are_each_by_itself(widths, how):
    """Sequences of NaN lie between: not even 0 times one of them is taken in."""
    lengths = ((70, 70), (1, 1), (64, 200), (3, 3), (0, 5), (500, 430), (65, 128), (9, 0))
    scale = widths[0] ** -0.5
    parts = []
    for S, T in lengths:
        q, k, v = (
            heads(1, num, tokens, width, BF16)
            for num, tokens, width in ((4, S, widths[0]), (2, T, widths[0]), (2, T, widths[1]))
        )
        if (S, T) in ((1, 1), (3, 3)):
            q, k, v = (torch.full_like(x, math.nan) for x in (q, k, v))
        parts.append((q, k, v, *kernels.attention_with_lse(q, k, v, scale=scale, **how)))
    q, k, v, out = (
        torch.cat([part[i].squeeze(0).transpose(0, 1) for part in parts]) for i in range(4)
    )
    lse = torch.cat([part[4].squeeze(0) for part in parts], 1)
    starts = torch.tensor([(0, 0), *lengths], device="cuda").cumsum(0).int()
    how = {"max_seqlen_q": 500, "scale": scale, **how}
    found, found_lse = kernels.attention_varlen_with_lse(q, k, v, *starts.unbind(1), **how)
    assert torch.equal(found.isnan(), out.isnan())
    assert torch.allclose(found.float(), out.float(), rtol=0.02, atol=0.01, equal_nan=True)
    assert torch.allclose(found_lse, lse, rtol=1e-4, atol=1e-4, equal_nan=True)
    alone = kernels.attention_varlen(q, k, v, *starts.unbind(1), **how)
    assert torch.equal(alone.nan_to_num(), found.nan_to_num())


def test_masks_are_refused_with_their_sizes():
    q = torch.empty(1, 1, 4, 64, dtype=BF16)
    with pytest.raises(ValueError, match=r"reads no mask, and one of \(4, 4\) is given"):
        kernels.attention(q, q, q, torch.ones(4, 4, dtype=torch.bool), scale=1.0)
