"""How host functions become providers, and what happens when a kernel does not build."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import aiter_inductor.backend  # noqa: F401  defines all ops
from aiter_inductor.core import jit
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import OPS, Provider, Use, accept
from aiter_inductor.kernels.hip import norm as hip_norm
from aiter_inductor.lowerings import providers

GFX942 = arch_named("gfx942")
ARGUMENTS = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16(), 1e-6


def test_a_failed_build_goes_to_the_next_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise jit.CompileError("norm.hip:12: error: no such instruction")

    monkeypatch.setattr(hip_norm, "rms_norm", broken)
    op = OPS["rms_norm"]
    with pytest.warns(jit.JitWarning, match=r"rms_norm does not run in hip: norm.hip:12: error"):
        found = op.providers["hip"].run(*ARGUMENTS)
    torch.testing.assert_close(found, op.reference(*ARGUMENTS))


def test_without_a_compiler_hip_refuses_with_what_was_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_found(arch: str, settings: object) -> None:
        raise jit.NoCompilerError(f"no compiler for {arch}: hipcc is not on the PATH")

    monkeypatch.setattr(jit, "find_compiler", none_found)
    providers._compiler_missing.cache_clear()
    try:
        op = OPS["rms_norm"]
        use = Use(GFX942, disabled=lambda name: "triton" if name == "triton" else None)
        selection = op.select(op.problem(*ARGUMENTS), use)
    finally:
        providers._compiler_missing.cache_clear()
    assert selection.provider is None
    assert selection.reason == (
        "triton is disabled; hip: no compiler for gfx942: hipcc is not on the PATH"
    )


def test_hip_is_taken_where_triton_is_off() -> None:
    op = OPS["rms_norm"]
    use = Use(GFX942, disabled=lambda name: "triton" if name == "triton" else None)
    selection = op.select(op.problem(*ARGUMENTS), use)
    assert selection.provider is op.providers["hip"]


def test_hip_refuses_a_residual_of_another_dtype() -> None:
    op = OPS["add_rms_norm"]
    x, weight, eps = ARGUMENTS
    use = Use(GFX942, disabled=lambda name: "triton" if name == "triton" else None)
    selection = op.select(op.problem(x, x.float(), weight, eps), use)
    assert selection.provider is None
    assert selection.reason.endswith(
        "hip: x and the residual are bfloat16 and float32; HIP kernels add equal dtypes"
    )


def test_a_provider_that_cedes_runs_only_where_no_later_one_can() -> None:
    op = OPS["rms_norm"]
    taking: dict[str, Provider] = {}
    for name, cede in (("triton", lambda problem, use: "hip took half as long"), ("hip", accept)):
        taking[name] = replace(op.providers[name], refuse=accept, decline=accept, cede=cede)
    ceding = replace(op, providers=taking)
    problem = op.problem(*ARGUMENTS)
    found = ceding.select(problem, Use(GFX942))
    assert (found.provider, found.reason) == (
        taking["hip"],
        "hip takes it: hip took half as long",
    )
    without_hip = Use(GFX942, disabled=lambda name: "hip" if name == "hip" else None)
    assert ceding.select(problem, without_hip).provider is taking["triton"]
