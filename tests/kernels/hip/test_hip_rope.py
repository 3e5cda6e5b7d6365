"""rope.hip, built for the host, against the ops' references."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from aiter_inductor.kernels.hip import rope
from aiter_inductor.lowerings import rope as ops
from tests.kernels.hip.comparing import RELATIVE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(batch: int, num_heads: int, seq_len: int, head_dim: int, **how) -> torch.Tensor:
    """[batch, num_heads, seq_len, head_dim], as models view [batch, seq_len, ...] memory."""
    return normal(batch, seq_len, num_heads, head_dim, **how).transpose(1, 2)


def assert_rotated(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for contracted products; dtypes and strides exactly."""
    assert (out.dtype, out.shape, out.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    )
    error = (out.double() - expected.double()).abs()
    assert (error <= 2 * RELATIVE[out.dtype] * expected.double().abs() + 1e-6).all()
    if out.dtype != FP32:
        assert (out != expected).float().mean() <= 0.01


@pytest.mark.parametrize(
    ("pairs_in", "pairs_out", "full"), list(product([False, True], repeat=3)), ids=str
)
def test_layouts(pairs_in, pairs_out, full):
    x = heads(2, 3, 5, 64)
    width = 64 if full else 32
    cos, sin = (normal(2, 1, 5, width, dtype=FP32, seed=seed) for seed in (1, 2))
    args = {"interleaved_in": pairs_in, "interleaved_out": pairs_out, "out_dtype": BF16}
    for transposed in (False, True):
        expected = ops.rope.reference(x, cos, sin, **args, transposed=transposed)
        assert_rotated(rope.rope(x, cos, sin, **args, transposed=transposed), expected)


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(128, 128), (96, 32), (80, 20), (6, 2), (256, 256)], ids=str
)
def test_rope_qk_of_any_width(head_dim, rotary_dim):
    q, k = heads(1, 4, 7, head_dim), heads(1, 2, 7, head_dim, seed=1)
    cos, sin = (normal(1, 1, 7, rotary_dim, seed=seed) for seed in (2, 3))
    expected = ops.rope_qk.reference(q, k, cos, sin, rotary_dim=rotary_dim)
    outs = rope.rope_qk(q, k, cos, sin, rotary_dim=rotary_dim)
    for out, want in zip(outs, expected, strict=True):
        assert_rotated(out, want)


def test_tokens_before_heads():
    q, k = normal(2, 5, 4, 64, dtype=FP16), normal(2, 5, 1, 64, dtype=FP16, seed=1)
    cos, sin = (normal(2, 5, 1, 32, dtype=FP32, seed=seed) for seed in (2, 3))
    for out, want in zip(
        rope.rope_qk(q, k, cos, sin), ops.rope_qk.reference(q, k, cos, sin), strict=True
    ):
        assert_rotated(out, want)


def test_heads_cut_out_of_a_projection():
    qkv = normal(2, 5, 3 * 4 * 64)
    q = qkv[..., :256].view(2, 5, 4, 64).transpose(1, 2)
    cos, sin = (normal(5, 64, seed=seed) for seed in (1, 2))
    assert_rotated(rope.rope(q, cos, sin), ops.rope.reference(q, cos, sin))


def test_tables_whose_tokens_are_innermost():
    q, k = heads(2, 4, 9, 64), heads(2, 2, 9, 64, seed=1)
    cos, sin = (normal(2, 1, 32, 9, dtype=FP32, seed=s).transpose(2, 3) for s in (2, 3))
    expected = ops.rope_qk.reference(q, k, cos, sin)
    for out, want in zip(rope.rope_qk(q, k, cos, sin), expected, strict=True):
        assert_rotated(out, want)


@pytest.mark.parametrize("round_before_weight", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (96, 32)], ids=str)
def test_qk_norm_rope(head_dim, rotary_dim, round_before_weight):
    q, k = heads(2, 4, 3, head_dim), heads(2, 2, 3, head_dim, seed=1)
    q_weight, k_weight = (1 + normal(head_dim, seed=seed) / 16 for seed in (2, 3))
    cos, sin = (normal(1, 1, 3, rotary_dim, seed=seed) for seed in (4, 5))
    args = (q, k, q_weight, k_weight, cos, sin, 1e-6)
    style = {"rotary_dim": rotary_dim, "round_before_weight": round_before_weight}
    expected = ops.qk_norm_rope.reference(*args, **style)
    for out, want in zip(rope.qk_norm_rope(*args, **style), expected, strict=True):
        assert_rotated(out, want)


def test_refusals_are_sentences():
    x, cos = heads(1, 2, 3, 64), normal(3, 64)
    with pytest.raises(ValueError, match="rotary_dim=7 is not an even number up to 64"):
        rope.rope(x, cos, cos, rotary_dim=7)
    with pytest.raises(ValueError, match="cos is 64 wide, neither rotary_dim=32 nor half of it"):
        rope.rope(x, cos, cos, rotary_dim=32)
    with pytest.raises(ValueError, match="heads with last stride 64 are not contiguous"):
        rope.rope(normal(1, 2, 64, 64).transpose(2, 3), normal(64, 64), normal(64, 64))
