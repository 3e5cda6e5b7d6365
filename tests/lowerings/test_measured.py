"""Where a kernel could run on Hopper but Inductor's code was measured as fast."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor import explain
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import OPS, Selection, Use


def select(name: str, *args: object, target: str = "sm_90", **facts: bool) -> Selection:
    op = OPS[name]
    disabled = lambda technology: "hip" if technology == "hip" else None
    return op.select(op.problem(*args), Use(arch_named(target), disabled=disabled, **facts))


def rows(number: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    return torch.empty(number, 128, dtype=torch.bfloat16), torch.empty(128).bfloat16(), 1e-6


def test_a_norm_alone_is_taken_at_few_rows() -> None:
    assert select("rms_norm", *rows(64)).provider is OPS["rms_norm"].providers["triton"]
    assert select("rms_norm", *rows(65)).reason == (
        "triton: 65 rows: no gain over Inductor's code is measured on sm_90 above 64; "
        "hip is disabled"
    )


def test_force_and_other_chips_take_it_anyway() -> None:
    assert select("rms_norm", *rows(65), force=True).provider is not None
    assert select("rms_norm", *rows(65), target="gfx942").provider is not None


def test_training_waits_for_a_measurement() -> None:
    found = select("rms_norm", *rows(8), training=True)
    assert found.provider is None
    assert "its backward is not measured against Inductor's on sm_90" in found.reason


@pytest.mark.parametrize(("number", "taken"), [(128, True), (129, False)])
def test_rotations(number: int, taken: bool) -> None:
    q, k = torch.empty(number, 4, 1, 64), torch.empty(number, 2, 1, 64)
    tables = torch.empty(1, 1, 1, 64), torch.empty(1, 1, 1, 64)
    assert (select("rope_qk", q, k, *tables).provider is not None) == taken


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
        return torch.nn.functional.rms_norm(total, (128,), weight, 1e-6) + total

    x, weight, _ = rows(8)
    report = explain(program, x, x, weight, target="sm_90")
    (site,) = report.sites
    assert (site.pattern, site.status) == ("rms_norm", "inlined")
    assert "64x7168 takes 3.51 us on sm_90 and Inductor's code 3.28" in site.reason
