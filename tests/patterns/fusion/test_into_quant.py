"""A norm or activation whose only reader quantises it becomes one op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.rewrite_check import Rewritten, check_rewrite

FP8 = torch.float8_e4m3fnuz
QMAX = torch.finfo(FP8).max


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*(shape or (2, 5, 256))).to(dtype)


def mark(x: Tensor, dynamic: bool) -> Tensor:
    """`x` with its leading sizes dynamic, as a serving system would have them."""
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
    return x


def rms(x: Tensor, weight: Tensor) -> Tensor:
    f = x.float()
    return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def per_token(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = y.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / QMAX
    return (y.float() / scale).clamp(-QMAX, QMAX).to(FP8), scale


def per_group(y: Tensor) -> tuple[Tensor, Tensor]:
    groups = y.float().reshape(*y.shape[:-1], -1, 128)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-6) / QMAX
    q = (groups / scale).clamp(-QMAX, QMAX).to(FP8)
    return q.reshape(y.shape), scale.squeeze(-1)


def flattened(y: Tensor) -> tuple[Tensor, Tensor]:
    return per_token(y.view(-1, y.shape[-1]))


def op_names(done: Rewritten) -> list[str]:
    return [decision.match.op.name for decision in done.decisions]


@pytest.mark.parametrize("quant", [per_token, per_group, flattened])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("marked", [False, True])
def test_rms_norm(
    quant: Callable[[Tensor], tuple[Tensor, Tensor]],
    residual: bool,
    dtype: torch.dtype,
    marked: bool,
) -> None:
    def program(x: Tensor, other: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = x + other if residual else x
        return (*quant(rms(total, weight)), *((total,) if residual else ()))

    pattern = "quant_per_group" if quant is per_group else "quant_per_token"
    args = rows(dtype=dtype), rows(dtype=dtype), 1 + 0.1 * rows(256, dtype=dtype)
    mark(args[0], marked), mark(args[1], marked)
    done = check_rewrite(program, *args, expect={"rms_norm": 1, pattern: 1})
    assert op_names(done) == ["add_rms_norm_quant" if residual else "rms_norm_quant"]


@pytest.mark.parametrize("quant", [per_token, per_group])
def test_layer_norm(quant: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def program(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return quant(F.layer_norm(x, (256,), weight, bias))

    pattern = "quant_per_group" if quant is per_group else "quant_per_token"
    done = check_rewrite(
        program, rows(), rows(256), rows(256), expect={"layer_norm": 1, pattern: 1}
    )
    assert op_names(done) == ["layer_norm_quant"]


@pytest.mark.parametrize("quant", [per_token, per_group])
@pytest.mark.parametrize("marked", [False, True])
def test_activation(quant: Callable[[Tensor], tuple[Tensor, Tensor]], marked: bool) -> None:
    def program(gate_up: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_up.chunk(2, -1)
        return quant(F.silu(gate) * up)

    pattern = "quant_per_group" if quant is per_group else "quant_per_token"
    done = check_rewrite(
        program, mark(rows(2, 5, 512), marked), expect={"silu_and_mul": 1, pattern: 1}
    )
    assert op_names(done) == ["act_and_mul_quant"]


def test_static_scale() -> None:
    def program(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return (rms(x, weight).float() / scale).clamp(-QMAX, QMAX).to(FP8)

    done = check_rewrite(
        program,
        rows(),
        rows(256),
        torch.full((1,), 0.05),
        expect={"rms_norm": 1, "quant_static": 1},
    )
    assert op_names(done) == ["rms_norm_quant_static"]


def test_another_lower_bound_keeps_them_apart() -> None:
    def program(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return (rms(x, weight).float() / scale).round().clamp(-128, 127).to(torch.int8)

    arguments = rows(), rows(256), torch.full((1,), 0.05)
    done = check_rewrite(program, *arguments, expect={"rms_norm": 1, "quant_static": 1})
    assert op_names(done) == ["rms_norm", "quant_static"]
    assert any("lower bound is -128, fused kernels keep the symmetric one" in n for n in done.notes)


def test_a_second_reader_keeps_them_apart() -> None:
    def program(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = rms(x, weight)
        return *per_token(y), y.sum(-1)

    done = check_rewrite(program, rows(), rows(256), expect={"rms_norm": 1, "quant_per_token": 1})
    assert op_names(done) == ["rms_norm", "quant_per_token"]
    assert any("is read by" in note and "too, so it has to be written anyway" in note
               for note in done.notes), done.notes  # fmt: skip


def test_tokens_of_a_part_of_a_row_are_groups() -> None:
    def program(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return per_token(rms(x, weight).reshape(-1, 128))

    done = check_rewrite(program, rows(), rows(256), expect={"rms_norm": 1, "quant_per_group": 1})
    assert op_names(done) == ["rms_norm_quant"]


def test_rows_of_another_length_keep_them_apart() -> None:
    def program(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return per_token(rms(x, weight).reshape(-1, 512))

    done = check_rewrite(
        program, rows(2, 4, 256), rows(256), expect={"rms_norm": 1, "quant_per_token": 1}
    )
    assert op_names(done) == ["rms_norm", "quant_per_token"]
