"""Where a kernel could run on Hopper but Inductor's code was measured as fast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor import explain
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import OPS, Op, Selection, Use, accept


def select(name: str, *args: object, target: str = "sm_90", **facts: bool) -> Selection:
    op = OPS[name]
    disabled = lambda technology: "hip" if technology == "hip" else None
    return op.select(op.problem(*args), Use(arch_named(target), disabled=disabled, **facts))


def rows(number: int, N: int = 7168) -> tuple[torch.Tensor, torch.Tensor, float]:
    return torch.empty(number, N, dtype=torch.bfloat16), torch.empty(N).bfloat16(), 1e-6


def test_a_norm_alone_is_taken_at_few_rows_and_at_short_ones() -> None:
    triton = OPS["rms_norm"].providers["triton"]
    assert select("rms_norm", *rows(64)).provider is triton
    assert select("rms_norm", *rows(65, N=4096)).provider is triton
    assert select("rms_norm", *rows(65)).reason == (
        "triton: N=7168: 4096x7168 takes 32.6 us on sm_90 and Inductor's code 30.2; hip is disabled"
    )


@pytest.mark.parametrize(("training", "declined"), [(False, False), (True, True)])
def test_layer_norm_of_many_rows_is_hips_and_not_tritons(training: bool, declined: bool) -> None:
    x, weight, eps = rows(4096)
    op, use = OPS["layer_norm"], Use(arch_named("sm_90"), training=training)
    problem = op.problem(x, weight, weight, eps)
    assert "45.5 us on sm_90" in str(op.providers["triton"].decline(problem, use))
    assert bool(op.providers["hip"].decline(problem, use)) == declined


def test_hip_quantises_few_rows_and_whole_rows_of_any_number() -> None:
    use = Use(arch_named("sm_90"))
    by_groups, by_rows = OPS["quant_per_group"], OPS["quant_per_token"]
    few, more = (
        by_groups.problem(rows(number)[0], dtype=torch.float8_e4m3fn, group_size=128)
        for number in (64, 65)
    )
    cede = by_groups.providers["triton"].cede
    assert "64x7168 by groups take an H100 1.75 us" in str(cede(few, use))
    assert cede(more, use) is None
    whole = by_rows.problem(rows(4096)[0], dtype=torch.float8_e4m3fn)
    cede = by_rows.providers["triton"].cede
    assert "4096x7168 by rows take an H200 21.6 us" in str(cede(whole, use))
    assert by_rows.select(whole, use).provider is by_rows.providers["hip"]
    assert cede(whole, Use(arch_named("gfx942"))) is None


def test_force_and_other_chips_take_it_anyway() -> None:
    assert select("rms_norm", *rows(65), force=True).provider is not None
    assert select("rms_norm", *rows(65), target="gfx942").provider is not None


def test_training_waits_for_a_measurement() -> None:
    found = select("rms_norm", *rows(8), training=True)
    assert found.provider is None
    assert "no training step is known to be faster with it on sm_90" in found.reason


@pytest.mark.parametrize(
    ("number", "reorders", "taken"), [(128, False, True), (129, False, False), (129, True, True)]
)
def test_rotations(number: int, reorders: bool, taken: bool) -> None:
    q, k = torch.empty(number, 4, 1, 64), torch.empty(number, 2, 1, 64)
    tables = torch.empty(1, 1, 1, 64), torch.empty(1, 1, 1, 64)
    op = OPS["rope_qk"]
    problem = op.problem(q, k, *tables, interleaved_in=reorders)
    declined = op.providers["triton"].decline(problem, Use(arch_named("sm_90")))
    assert (declined is None) == taken
    assert op.providers["hip"].decline(problem, Use(arch_named("sm_90"))) is None


@pytest.mark.parametrize("name", ["add_rms_norm", "act_and_mul"])
def test_what_inductor_fuses_as_well_is_left_to_it(name: str) -> None:
    x, weight, eps = rows(8)
    found = select(name, x, x, weight, eps) if name == "add_rms_norm" else _activation(x)
    assert found.provider is None
    assert "us on sm_90 and Inductor's code" in found.reason


def _activation(x: torch.Tensor) -> Selection:
    op = OPS["act_and_mul"]
    return op.select(op.problem(x, x, activation="silu"), Use(arch_named("sm_90")))


def test_a_declined_fusion_is_left_to_inductor_as_a_whole() -> None:
    def program(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total = x + residual
        return torch.nn.functional.rms_norm(total, (7168,), weight, 1e-6) + total

    x, weight, _ = rows(8)
    report = explain(program, x, x, weight, target="sm_90", disable=["hip"])
    (site,) = report.sites
    assert (site.pattern, site.status) == ("rms_norm", "inlined")
    assert "4096x7168 takes 62.4 us on sm_90 and Inductor's code 61.4" in site.reason


def with_hip(name: str) -> Op:
    """The op where its HIP kernels can be built, whatever compilers are here."""
    op = OPS[name]
    return replace(
        op, providers={**op.providers, "hip": replace(op.providers["hip"], refuse=accept)}
    )


@pytest.mark.parametrize("number", [8, 4096])
def test_a_residual_before_a_norm_is_hips(number: int) -> None:
    x, weight, eps = rows(number)
    op = with_hip("add_rms_norm")
    problem = op.problem(x, x, weight, eps)
    assert op.select(problem, Use(arch_named("sm_90"))).provider is op.providers["hip"]
    assert op.select(problem, Use(arch_named("sm_90"), training=True)).provider is None


@pytest.mark.parametrize("tokens", [1, 128, 129])
def test_rotations_go_to_hip_where_that_measured_faster(tokens: int) -> None:
    q, table = torch.empty(1, 4, tokens, 64), torch.empty(1, 1, tokens, 64)
    op = with_hip("rope_qk")
    problem = op.problem(q, q, table, table, interleaved_in=True)
    found = op.select(problem, Use(arch_named("sm_90")))
    assert found.provider is op.providers["hip"]
    assert "57.4 us and the Triton kernel 61.5" in found.reason
    assert op.select(problem, Use(arch_named("sm_90"), training=True)).provider is None


@pytest.mark.parametrize(
    ("number", "group_size", "taker"),
    [(64, None, "hip"), (65, None, "hip"), (64, 128, "hip"), (65, 128, "triton")],
)
def test_hip_quantises_few_activations_and_whole_rows_of_any_number(
    number: int, group_size: int | None, taker: str
) -> None:
    x, *_ = rows(number)
    op = with_hip("act_and_mul_quant")
    dtype = torch.float8_e4m3fn
    problem = op.problem(x, x, activation="silu", dtype=dtype, group_size=group_size)
    assert op.select(problem, Use(arch_named("sm_90"))).provider is op.providers[taker]


def test_a_normalisation_that_quantises_goes_to_hip_where_that_measured_faster() -> None:
    both, arguments = with_hip("rms_norm_quant"), rows(64)
    problem = both.problem(*arguments, dtype=torch.float8_e4m3fn)
    found = both.select(problem, Use(arch_named("sm_90")))
    assert found.provider is both.providers["hip"]
    assert "takes an H100 2.17 us and the Triton kernel 3.47" in found.reason
    assert both.select(problem, Use(arch_named("gfx950"))).provider is both.providers["triton"]
