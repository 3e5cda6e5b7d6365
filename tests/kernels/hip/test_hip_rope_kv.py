"""rope_kv.hip, built for the host, and on a GPU where there is one, against its op's reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.hip import rope_kv
from aiter_inductor.lowerings.kv_cache import rope_kv_cache_write
from aiter_inductor.lowerings.rope_kv_problem import RopeKvCacheProblem
from tests.lowerings.checks import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FN = torch.float8_e4m3fn
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROBLEM = RopeKvCacheProblem(
    83, 2, 64, 64, 4, 16, BF16, BF16, num_heads=6, rotary_dim=64, table_width=64
)
HALVES = {"table_width": 32, "table_dtype": FP32}
STYLES = {
    "plain": {},
    "positions": {**HALVES, "num_positions": 50},
    "gpt-j": {"interleaved_in": True, "interleaved_out": True},
    "deepseek": {**HALVES, "interleaved_in": True},
    "partial": {"rotary_dim": 20, "table_width": 20},
    "fp32": {"dtype": FP32},
    "fp16": {"dtype": FP16, "cache_dtype": FP16},
    "fp8": {"cache_dtype": FN, "scaled": True},
    "wide": {"head_dim": 256, "v_head_dim": 256, "rotary_dim": 256, "table_width": 256},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["paged", "packed"])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_style(device, layout, style):
    args, kwargs = replace(PROBLEM, layout=layout, **style).sample(seed=0, device=device)
    ours = rope_kv_cache_write.outcome(rope_kv.rope_kv_cache_write, args, kwargs)
    theirs = rope_kv_cache_write.outcome(rope_kv_cache_write.reference, args, kwargs)
    for out, expected in zip(ours, theirs, strict=True):
        assert out.stride() == expected.stride()
        assert_close(out, expected, what=layout)
        # Where a product was contracted, a tie may round the other way.
        assert out.dtype == FP32 or (out.float() != expected.float()).float().mean() <= 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_heads_cut_out_of_a_projection(device):
    args, kwargs = PROBLEM.sample(seed=0, device=device)
    qkv = torch.cat(args[:3], 1).flatten(1)
    parts = qkv.split([6 * 64, 2 * 64, 2 * 64], -1)
    args = (*(part.unflatten(-1, (-1, 64)) for part in parts), *args[3:])
    ours = rope_kv_cache_write.outcome(rope_kv.rope_kv_cache_write, args, kwargs)
    assert_close(ours, rope_kv_cache_write.outcome(rope_kv_cache_write.reference, args, kwargs))


def test_no_tokens():
    args, kwargs = replace(PROBLEM, num_tokens=0).sample(seed=0, device="cpu")
    assert rope_kv.rope_kv_cache_write(*args, **kwargs).shape == (0, 6, 64)


def test_pairs_that_are_not_aligned_are_refused():
    args, _ = PROBLEM.sample(seed=0, device="cpu")
    wide = torch.cat((args[0], args[0]), -1)[..., 1:65]
    with pytest.raises(ValueError, match="pairs that lie side by side are not aligned"):
        rope_kv.rope_kv_cache_write(wide, *args[1:], interleaved_in=True, interleaved_out=True)
