"""Gradients of flash attention in CUDA C++: the build everywhere, float64 and autograd on a GPU."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from aiter_inductor.kernels.cuda.attention import attention_with_lse
from aiter_inductor.kernels.cuda.attention_backward import (
    attention_backward,
    attention_varlen_backward,
)
from aiter_inductor.kernels.cuda.attention_backward_config import (
    BackwardTiles,
    BackwardVariant,
    Kind,
)
from aiter_inductor.kernels.cuda.attention_backward_wide_config import (
    BLOCK_BYTES,
    KeysVariant,
    QueriesVariant,
    WideTiles,
)
from aiter_inductor.kernels.cuda.attention_config import WIDTHS
from tests.kernels.cuda.compiling import compiled
from tests.kernels.cuda.test_attention import (
    NEEDS_GPU,
    STARTS,
    documents,
    error,
    expected,
    heads,
)

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("widths", "kind"),
    [
        ((64, 64), Kind(causal=True, window=False, packed=False, fp16=True)),
        ((128, 128), Kind(causal=True, window=True, packed=True, fp16=False)),
        ((64, 128), Kind(causal=False, window=False, packed=False, fp16=False)),
        ((128, 128), Kind(True, window=False, packed=False, fp16=False, first_keys=True)),
    ],
    ids=str,
)
def test_variants_compile_without_spills(widths, kind, tmp_path):
    # A packed sequence has numbers of its own, read again where one walk ends, and so has a
    # document, in tiles that hold the end of one.
    spilled = 32 if kind.packed or kind.first_keys else 0
    assert_compiles(BackwardVariant(BackwardTiles.default(*widths), kind), tmp_path, spilled)


@pytest.mark.parametrize(
    ("widths", "kind", "softcap"),
    [
        ((256, 256), Kind(causal=True, window=True, packed=False, fp16=False), True),
        ((256, 256), Kind(causal=True, window=False, packed=True, fp16=False), False),
        ((192, 128), Kind(causal=True, window=False, packed=False, fp16=False), False),
        ((128, 128), Kind(causal=True, window=False, packed=True, fp16=False), True),
        ((256, 256), Kind(causal=True, window=True, packed=False, fp16=True), False),
    ],
    ids=str,
)
def test_kernels_for_wide_heads_compile_without_spills(widths, kind, softcap, tmp_path):
    tiles = WideTiles.default(*widths)
    # Probabilities of fp16 heads come in fp32, for which the widest leave a few registers too few.
    spilled = 52 if kind.fp16 else 0
    assert_compiles(KeysVariant(tiles.keys, *widths, kind, softcap), tmp_path, spilled)
    assert_compiles(QueriesVariant(tiles.queries, *widths, kind, softcap), tmp_path)


@pytest.mark.parametrize("qk_dim", WIDTHS)
@pytest.mark.parametrize("v_dim", WIDTHS)
def test_every_width_has_blocks_that_fit(qk_dim, v_dim):
    tiles = WideTiles.default(qk_dim, v_dim)
    assert tiles.keys.shared_bytes(qk_dim, v_dim, fp16=True) <= BLOCK_BYTES
    assert tiles.queries.shared_bytes(qk_dim, v_dim) <= BLOCK_BYTES


def assert_compiles(variant, tmp_path, spilled=0):
    """As meant: products do not wait for one another, and sums stay in registers."""
    artifact = compiled(variant, tmp_path)
    # ptxas says so where it makes products wait for one another.
    assert "serialized" not in artifact.log
    assert "warning" not in artifact.log or spilled
    found = re.search(r"(\d+) bytes spill stores", artifact.log)
    assert int(found[1] if found else 0) <= spilled


CASES = {
    "one block": ((1, 1, 1, 64, 128, 128, 128), {}),
    "causal": ((2, 4, 4, 512, 512, 128, 128), {"causal": "top_left"}),
    "shared keys, ragged": ((2, 6, 2, 301, 301, 128, 128), {"causal": "top_left"}),
    "a cache before": ((1, 4, 1, 130, 900, 128, 128), {"causal": "bottom_right"}),
    "fewer keys": ((1, 2, 2, 500, 200, 128, 128), {"causal": "bottom_right"}),
    "odd widths": ((1, 4, 2, 260, 190, 96, 72), {}),
    "64": ((2, 4, 2, 333, 333, 64, 64), {"causal": "top_left"}),
    "64, all keys": ((1, 2, 2, 130, 700, 40, 64), {}),
    "latent": ((1, 4, 2, 333, 333, 192, 128), {"causal": "top_left"}),
    "wide": ((2, 4, 2, 333, 333, 256, 256), {"causal": "top_left"}),
    "wide, all keys": ((1, 2, 2, 130, 700, 256, 256), {}),
    "wide, window": ((1, 4, 2, 300, 420, 256, 256), {"causal": "bottom_right", "window": 90}),
    "wide, softcap": (
        (1, 4, 2, 301, 301, 256, 256),
        {"causal": "top_left", "softcap": 2.0, "window": 100},
    ),
    "wide, fewer keys": ((1, 2, 2, 500, 200, 256, 256), {"causal": "bottom_right"}),
    # Gradients of two keys are their difference, in which the output's rounding counts: of a few
    # rows it may be half as large again as its mean.
    "wide, two keys": ((16, 8, 8, 5, 2, 256, 256), {"causal": "top_left"}),
    "wide, odd": ((1, 4, 2, 260, 190, 200, 232), {}),
    "wide, long": ((1, 2, 1, 2100, 2100, 256, 256), {"causal": "top_left"}),
    "wider values": ((1, 4, 2, 260, 190, 64, 256), {"causal": "top_left"}),
    "softcap": ((1, 4, 2, 333, 333, 128, 128), {"causal": "top_left", "softcap": 2.0}),
    "latent, window": ((1, 2, 2, 300, 420, 192, 128), {"causal": "bottom_right", "window": 90}),
    "long": ((1, 2, 1, 2100, 2100, 128, 128), {}),
    "window": ((1, 4, 2, 700, 700, 128, 128), {"causal": "top_left", "window": 100}),
    "window behind only": ((1, 2, 2, 300, 420, 128, 128), {"window": 50}),
}


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_float64(name, dtype):
    (batch, num_heads, kv_heads, S, T, qk_dim, v_dim), how = CASES[name]
    q, grad = (heads(batch, num_heads, S, width, dtype) for width in (qk_dim, v_dim))
    k, v = (heads(batch, kv_heads, T, width, dtype) for width in (qk_dim, v_dim))
    assert_gradients(q, k, v, grad, **how)


@NEEDS_GPU
def test_sinks_and_the_gradient_of_the_log_sum_exp():
    q, grad = (heads(1, 8, 256, 128, BF16) for _ in range(2))
    k, v = (heads(1, 2, 256, 128, BF16) for _ in range(2))
    sinks, grad_lse = torch.randn(8, device="cuda").to(BF16), torch.randn(1, 8, 256, device="cuda")
    assert_gradients(q, k, v, grad, sinks, grad_lse, causal="top_left", window=32)


@NEEDS_GPU
def test_strided_heads():
    qkv = torch.randn(2, 190, 12, 128, device="cuda").to(BF16)
    q, k, v = qkv.transpose(1, 2).split((8, 2, 2), 1)
    grad = torch.randn(2, 190, 8, 128, device="cuda").to(BF16).transpose(1, 2)
    assert_gradients(q, k, v, grad, causal="top_left")


@NEEDS_GPU
@pytest.mark.parametrize("width", [64, 128, 256])
def test_errors_are_no_larger_than_those_of_torchs_flash(width):
    q, k, v, grad = (heads(2, 4, 1000, width, BF16) for _ in range(4))
    how = {"scale": width**-0.5, "causal": "top_left"}
    out, lse = attention_with_lse(q, k, v, **how)
    ours = attention_backward(grad, q, k, v, out, lse, **how)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    exact_out, _ = expected(*exact, **how)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = torch.autograd.grad(
            F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, grad
        )
    wanted = torch.autograd.grad(exact_out, exact, grad.double())
    for mine, other, right in zip(ours, theirs, wanted, strict=False):
        off, others_off = (torch.linalg.norm(x.double() - right) for x in (mine, other))
        assert off <= 1.02 * others_off


@NEEDS_GPU
@pytest.mark.parametrize("width", [128, 256])
def test_gradients_repeat_to_the_last_bit_where_asked(width, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    q, k, v, grad = (heads(2, 16, 700, width, BF16) for _ in range(4))
    how = {"scale": 0.0625, "causal": "top_left"}
    out, lse = attention_with_lse(q, k, v, **how)
    first, *others = (attention_backward(grad, q, k, v, out, lse, **how) for _ in range(20))
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@NEEDS_GPU
@pytest.mark.parametrize("width", [128, 256])
def test_nan_reaches_only_the_heads_that_read_it(width):
    q, grad = (heads(2, 4, 200, width, BF16) for _ in range(2))
    k, v = (heads(2, 2, 200, width, BF16) for _ in range(2))
    q[0, 1, 4] = math.nan
    out, lse = attention_with_lse(q, k, v, scale=0.1, causal="top_left")
    dq, dk, dv, _ = attention_backward(grad, q, k, v, out, lse, scale=0.1, causal="top_left")
    hit = dq.isnan().any(-1)
    assert hit[0, 1, 4]
    assert hit.sum() == 1
    for found in (dk, dv):
        hit = found.isnan().any(-1)
        assert hit[0, 0, :5].all()
        assert not hit[0, 1].any()
        assert not hit[1].any()


@NEEDS_GPU
def test_no_keys_and_no_queries_give_zeros():
    q, k = heads(1, 2, 30, 128, BF16), heads(1, 2, 0, 128, BF16)
    out, lse = attention_with_lse(q, k, k, scale=0.1)
    dq, dk, dv, dsinks = attention_backward(out, q, k, k, out, lse, scale=0.1)
    assert not dq.any()
    assert (dk.shape, dv.shape, dsinks.shape) == (k.shape, k.shape, (0,))
    dq, dk, dv, _ = attention_backward(k, k, q, q, k, lse[:, :, :0], scale=0.1)
    assert not dk.any()
    assert not dv.any()


@NEEDS_GPU
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_documents_are_each_by_itself(widths, window):
    q, grad = (heads(2, 6, 901, width, BF16) for width in widths)
    k, v = (heads(2, 2, 901, width, BF16) for width in widths)
    first_keys = documents(2, 901, STARTS)
    assert_gradients(q, k, v, grad, first_keys=first_keys, causal="top_left", window=window)


def assert_gradients(q, k, v, grad, sinks=None, grad_lse=None, first_keys=None, **how):
    """Against autograd in float64."""
    scale = q.shape[-1] ** -0.5
    out, lse = attention_with_lse(q, k, v, None, sinks, first_keys, scale=scale, **how)
    found = attention_backward(
        *(grad, q, k, v, out, lse, None, sinks, grad_lse, first_keys), scale=scale, **how
    )
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        exact.append(sinks.double().requires_grad_())
    exact_out, exact_lse = expected(*exact, scale=scale, first_keys=first_keys, **how)
    total = (exact_out * grad.double()).sum()
    if grad_lse is not None:
        total = total + (exact_lse * grad_lse.double()).sum()
    for ours, theirs in zip(found, torch.autograd.grad(total, exact), strict=False):
        off = torch.linalg.norm(ours.double() - theirs)
        assert off <= 1.5 * error(q.dtype) * torch.linalg.norm(theirs), tuple(ours.shape)
    assert (found[3].numel() > 0) == (sinks is not None)


@NEEDS_GPU
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("how", [{}, {"causal": "top_left"}, {"causal": "bottom_right"}], ids=str)
def test_packed_sequences_are_each_by_itself(widths, how):
    """Sequences of NaN lie between: not even 0 times one of them is taken in."""
    lengths = ((70, 70), (1, 1), (64, 200), (3, 3), (0, 5), (200, 130), (65, 128), (9, 0))
    num_heads, kv_heads, scale = 4, 2, widths[0] ** -0.5
    parts = []
    for S, T in lengths:
        q, grad = (heads(1, num_heads, S, width, BF16) for width in widths)
        k, v = (heads(1, kv_heads, T, width, BF16) for width in widths)
        if (S, T) in ((1, 1), (3, 3)):
            q, k, v, grad = (torch.full_like(x, float("nan")) for x in (q, k, v, grad))
        out, lse = attention_with_lse(q, k, v, scale=scale, **how)
        found = attention_backward(grad, q, k, v, out, lse, scale=scale, **how)
        parts.append((grad, q, k, v, out, lse, *found[:3]))
    grad, q, k, v, out, dq, dk, dv = (
        torch.cat([part[i].squeeze(0).transpose(0, 1) for part in parts])
        for i in (0, 1, 2, 3, 4, 6, 7, 8)
    )
    lse = torch.cat([part[5].squeeze(0) for part in parts], 1)
    starts = torch.tensor([(0, 0), *lengths], device="cuda").cumsum(0).int()
    found = attention_varlen_backward(
        *(grad, q, k, v, out, lse, starts[:, 0], starts[:, 1]),
        **(how | {"max_seqlen_q": 200, "scale": scale}),
    )
    for ours, alone in zip(found[:3], (dq, dk, dv), strict=True):
        assert torch.equal(ours.isnan(), alone.isnan())
        kept = ~alone.isnan()
        close = torch.isclose(ours[kept].float(), alone[kept].float(), rtol=0.02, atol=0.01)
        assert close.all()
