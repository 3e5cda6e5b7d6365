"""Attention of heads in two parts: what it means, and what its kernel refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.mla_prefill import MlaPrefillProblem, mla_prefill, parts_unsupported
from tests.lowerings.checks import opcheck

HOPPER = Use(arch_named("sm_90"))


def problem(**change):
    """DeepSeek-V3's, of few tokens and heads."""
    sizes = {"batch": 2, "num_heads": 3, "num_kv_heads": 3, "num_queries": 20, "num_keys": 20}
    widths = {"qk_dim": 192, "rope_dim": 64, "v_dim": 128, "dtype": torch.bfloat16}
    how = {"causal": "top_left", "window": None, "softcap": None, "scale": 0.07, "mask": "none"}
    rest = {"mask_shape": (), "sinks": False, "layout": "bshd"}
    return replace(MlaPrefillProblem(**sizes, **widths, **how, **rest), **change)


def exact(q_nope, q_rope, k_nope, k_rope, v, *, scale, causal, layout):
    k_rope = k_rope.expand(-1, k_nope.shape[1], -1, -1)
    q, k, v = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), v
    return F.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), is_causal=causal != "none", scale=scale
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layout": "bhsd", "dtype": torch.float64},
        {"num_queries": 5, "num_keys": 9},
        {"num_queries": 1, "causal": "none", "qk_dim": 24, "rope_dim": 8, "v_dim": 40},
    ],
    ids=str,
)
def test_it_is_attention_of_whole_heads(change):
    asked = problem(**change)
    args, kwargs = asked.sample(seed=0, device="cpu")
    assert mla_prefill.problem(*args, **kwargs) == asked
    out = mla_prefill(*args, **kwargs)
    wanted = exact(*args, **kwargs)
    tolerance = 1e-10 if asked.dtype == torch.float64 else 1e-2
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    stored = out.transpose(1, 2) if asked.layout == "bshd" else out
    assert stored.is_contiguous()


@pytest.mark.parametrize("change", [{}, {"num_queries": 0}, {"num_keys": 0}], ids=str)
def test_opcheck(change):
    opcheck(mla_prefill, *problem(**change).sample(seed=1, device="cpu"))


def test_no_sequences():
    args, kwargs = problem(batch=0).sample(seed=1, device="cpu")
    assert mla_prefill(*args, **kwargs).shape == (0, 3, 20, 128)


def test_the_shared_part_of_the_keys_is_counted_once():
    asked = problem()
    args, kwargs = asked.sample(seed=0, device="cpu")
    moved = sum(x.numel() for x in args) + mla_prefill(*args, **kwargs).numel()
    assert asked.bytes_moved() == 2 * moved


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "q, k and v are float32; wgmma multiplies bf16 and fp16 here"),
        ({"num_queries": 9}, "S=9 queries: one of 4096 keys takes 97 us on sm_90"),
        ({"qk_dim": 160}, "parts of 96 and 64 elements are not multiples of 64 and 8"),
        ({"qk_dim": 132, "rope_dim": 4}, "qk_dim=132 is not a multiple of 8 up to 256"),
    ],
    ids=str,
)
def test_refusals(change, reason):
    assert reason in (parts_unsupported(problem(**change), HOPPER) or "")


def test_keys_of_every_head_are_refused():
    args, kwargs = problem().sample(seed=0, device="cpu")
    q_nope, q_rope, k_nope, k_rope, v = args
    k_rope = k_rope.expand(-1, 3, -1, -1)
    asked = mla_prefill.problem(q_nope, q_rope, k_nope, k_rope, v, **kwargs)
    reason = "the rotated part of the keys has 3 heads, not 1 for all"
    assert parts_unsupported(asked, HOPPER) == reason


@pytest.mark.parametrize("part", [1, 3])
def test_parts_of_other_sizes_are_refused(part):
    args, kwargs = problem().sample(seed=0, device="cpu")
    parts = [x[:, :, :-1] if i == part else x for i, x in enumerate(args)]
    name = ("q_nope", "q_rope", "k_nope", "k_rope")[part]
    assert parts_unsupported(mla_prefill.problem(*parts, **kwargs), HOPPER).startswith(
        f"{name} is {list(parts[part].shape)}, not {list(args[part].shape)}"
    )


def test_deepseeks_heads_are_taken():
    assert parts_unsupported(problem(), HOPPER) is None
