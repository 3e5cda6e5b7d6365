"""Latent attention: reference, absorbed form, masks, tracing, cost formula and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from aiter_inductor.core.arch import KNOWN, arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.mla import mla_decode
from aiter_inductor.lowerings.mla_problem import MlaProblem
from tests.lowerings.checks import assert_close, assert_same_layout, opcheck, oracle

SMALL = MlaProblem(3, 4, 2, 17, 32, 16, 8, 24, torch.float32)
DEEPSEEK = MlaProblem(1, 128, 1, 4096, 512, 128, 64, 128, torch.bfloat16)
FP8 = torch.float8_e4m3fn
ABSORBED = mla_decode.providers["torch"].run


def expanded_attention(
    q_nope, q_rope, latent, k_rope, weight, mask, kv_scale=None, *, scale, causal=False
):
    """The model's own way: a projection, keys of all heads, and torch's attention."""
    if kv_scale is not None:
        latent, k_rope = (x.float() * kv_scale for x in (latent, k_rope))
    num_heads, nope = q_nope.shape[1], q_nope.shape[-1]
    kv = F.linear(latent, weight).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    shared = k_rope.unsqueeze(1).expand(-1, num_heads, -1, -1)
    query, key = torch.cat((q_nope, q_rope), -1), torch.cat((kv[..., :nope], shared), -1)
    return F.scaled_dot_product_attention(
        query, key, kv[..., nope:], attn_mask=mask, scale=scale, is_causal=causal
    )


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_the_models_attention(mask, causal):
    if causal and mask != "none":
        pytest.skip("torch takes no mask beside is_causal")
    args, kwargs = replace(SMALL, mask=mask, causal=causal).sample(seed=0, device="cpu")
    found = mla_decode.reference(*args, **kwargs)
    expected = expanded_attention(*args, **kwargs)
    assert_close(found, expected)
    assert_same_layout(found, expected)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 130), (5, 64)])
def test_absorbed_is_the_reference(mask, causal, dtype, q_len, kv_len):
    problem = replace(SMALL, q_len=q_len, kv_len=kv_len, mask=mask, causal=causal, dtype=dtype)
    args, kwargs = problem.sample(seed=1, device="cpu")
    found = ABSORBED(*args, **kwargs)
    # Two roundings to 8 bits more than the oracle has: of the absorbed query and of the latent sum.
    assert_close(found, oracle(mla_decode, args, kwargs), loosen=3)
    assert_same_layout(found, mla_decode.reference(*args, **kwargs))


@pytest.mark.parametrize("run", [mla_decode.reference, ABSORBED])
def test_fp8_rows_count_their_scale(run):
    args, kwargs = replace(SMALL, cache_dtype=FP8).sample(seed=7, device="cpu")
    assert args[2].dtype == args[3].dtype == FP8
    assert_close(run(*args, **kwargs), expanded_attention(*args, **kwargs), loosen=3)


def test_absorbing_is_as_exact_as_the_models_form():
    args, kwargs = replace(DEEPSEEK, num_heads=8, kv_len=1000).sample(seed=2, device="cpu")
    exact = oracle(mla_decode, args, kwargs)
    errors = [
        (run(*args, **kwargs).double() - exact).abs().max()
        for run in (ABSORBED, expanded_attention)
    ]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("run", [mla_decode.reference, ABSORBED])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_row_that_sees_nothing_is_zero_and_others_stay(run, kind):
    args, kwargs = replace(SMALL, mask="bool").sample(seed=3, device="cpu")
    seen = args[5].clone()
    seen[1, :, 0] = False
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    found = run(*args[:5], mask, **kwargs)
    assert torch.equal(found[1, :, 0], torch.zeros(4, 24))
    before = run(*args, **kwargs)
    torch.testing.assert_close(found[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(found[1, :, 1], before[1, :, 1])


@pytest.mark.parametrize("run", [mla_decode.reference, ABSORBED])
def test_one_sequences_nan_stays_its_own(run):
    args, kwargs = SMALL.sample(seed=4, device="cpu")
    args[2][1] = torch.nan
    found = run(*args, **kwargs)
    assert found[1].isnan().all()
    assert not found[[0, 2]].isnan().any()


def test_empty_batch():
    args, kwargs = replace(SMALL, batch_size=0).sample(seed=0, device="cpu")
    assert ABSORBED(*args, **kwargs).shape == (0, 4, 2, 24)


def test_opcheck():
    for mask in ("none", "bool"):
        args, kwargs = replace(SMALL, mask=mask).sample(seed=5, device="cpu")
        opcheck(mla_decode, args, kwargs)


def test_absorbed_never_makes_keys_of_all_heads():
    problem = replace(DEEPSEEK, kv_len=1024, num_heads=16)
    args, kwargs = problem.sample(seed=6, device="cpu")
    graph = make_fx(lambda *given: ABSORBED(*given, **kwargs))(*args).graph
    largest = max(n.meta["val"].numel() for n in graph.nodes if "val" in n.meta)
    assert largest == args[4].numel()
    assert largest < 1024 * 16 * (128 + 128)


@pytest.mark.parametrize("arch", sorted(KNOWN))
def test_every_chip_gets_the_absorbed_form(arch):
    selected = mla_decode.select(DEEPSEEK, Use(arch_named(arch))).provider
    assert selected is not None


def test_refusals_name_the_values():
    use = Use(arch_named("cpu"))
    training = mla_decode.select(DEEPSEEK, Use(arch_named("cpu"), training=True)).reason
    assert training == "gradients flow through it and mla_decode has no backward"
    args, kwargs = SMALL.sample(seed=0, device="cpu")
    mixed = MlaProblem.of(*args[:2], args[2].bfloat16(), *args[3:], **kwargs)
    assert "float32, float32, bfloat16, float32, float32" in mla_decode.select(mixed, use).reason
    quantised = MlaProblem.of(*args[:2], args[2].to(FP8), *args[3:], **kwargs)
    assert "float8_e4m3fn, float32, float32, not of one" in mla_decode.select(quantised, use).reason
    other = replace(DEEPSEEK, cache_dtype=FP8)
    reason = mla_decode.select(other, Use(arch_named("gfx942"))).reason
    assert "gfx942 has no instructions for float8_e4m3fn" in reason
    assert mla_decode.select(other, Use(arch_named("sm_90"))).provider.name == "cuda"


@pytest.mark.parametrize(
    "q_len, kv_len, pays",
    [(1, 4096, True), (4, 4096, True), (64, 4096, True), (165, 4096, False), (512, 512, False)],
)
def test_cost_formula_counts_operations(q_len, kv_len, pays):
    problem = replace(DEEPSEEK, q_len=q_len, kv_len=kv_len)
    assert pays == (problem.flops() < problem.expanding_flops())
    reason = problem.absorbing_costs_more()
    assert (reason is None) == pays
    if reason:
        assert f"q_len={q_len}" in reason
        assert f"{kv_len} keys" in reason


def test_cost_formula_with_open_dimensions():
    length = sympy.Symbol("s0", positive=True, integer=True)
    assert replace(DEEPSEEK, kv_len=length, batch_size=length).absorbing_costs_more() is None
    many = replace(DEEPSEEK, q_len=171, kv_len=length).absorbing_costs_more()
    assert many is not None
    assert "171" in many
    unknown = replace(DEEPSEEK, q_len=length).absorbing_costs_more()
    assert unknown == "q_len=s0 is not known when compiling; absorbing pays for few tokens"


def test_bytes_moved_counts_the_latent_cache():
    longer = replace(DEEPSEEK, kv_len=DEEPSEEK.kv_len + 1)
    assert longer.bytes_moved() - DEEPSEEK.bytes_moved() == 576 * 2
