"""`mode=`, `options=`, the environment, and what torch.compile does not do for a string backend."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import aiter_inductor
from aiter_inductor import backend
from aiter_inductor.core.config import Options
from aiter_inductor.core.errors import CoverageError, OptionValueError, UnknownOptionError
from tests.models import zoo


class Norm(torch.nn.Module):
    """One RMSNorm under a path, `block.norm`."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.Module()
        self.block.norm = torch.nn.RMSNorm(64, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.norm(x) + 1


def test_no_import_is_needed() -> None:
    assert "aiter" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    "mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
)
def test_modes(mode: str, every_op_taken: None) -> None:
    model, x = Norm(), torch.randn(8, 64)
    out = torch.compile(model, backend="aiter", mode=mode, fullgraph=True)(x)
    torch.testing.assert_close(out, model(x))


def test_inductor_options_reach_inductor() -> None:
    seen = []

    def look(graph: torch.fx.Graph) -> None:
        seen.append(torch._inductor.config.epilogue_fusion)

    options = {"epilogue_fusion": False, "post_grad_custom_post_pass": look}
    torch.compile(Norm(), backend="aiter", options=options)(torch.randn(8, 64))
    assert seen == [False]


def test_an_existing_pass_in_the_slot_still_runs(every_op_taken: None) -> None:
    seen = []
    options = {"post_grad_custom_pre_pass": lambda graph: seen.append(graph)}
    torch.compile(Norm(), backend="aiter", options=options)(torch.randn(8, 64))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"aiter.disabel": ["rope"]}, "'aiter.disabel'; the nearest known one is 'aiter.disable'"),
        ({"max_autotun": True}, "'max_autotun'; the nearest known one is 'max_autotune'"),
        ({"aiter.disable": "rope"}, "option 'aiter.disable' is 'rope' but must be a list of names"),
        ({"aiter.force": 1}, "option 'aiter.force' is 1 but must be True or False"),
    ],
)  # fmt: skip
def test_wrong_options_name_the_nearest(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        torch.compile(Norm(), backend="aiter", options=options)(torch.randn(8, 64))
    assert isinstance(raised.value.inner_exception, UnknownOptionError | OptionValueError)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("name", ["rms_norm", "block", "block.norm", "cpp"])
def test_disable(name: str, every_op_taken: None) -> None:
    compiled = torch.compile(Norm(), backend="aiter", options={"aiter.disable": [name]})
    compiled(torch.randn(8, 64))
    (site,) = aiter_inductor.report(compiled).sites
    assert (site.status, site.reason) == ("inlined", f"{name} is disabled")


@torch.no_grad()
def test_what_is_switched_off_is_so_within_fused_ops_too() -> None:
    """The rest of what a fused op merges is taken by itself."""

    def norms_and_rows(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x + residual, (64,), w, 1e-6)

    model, ids = zoo.build("qwen3"), zoo.token_ids()
    x, w = torch.randn(8, 64), torch.randn(64)

    def taken(report: aiter_inductor.Report) -> set[tuple[str, str]]:
        return {(s.pattern, s.fused_into) for s in report.sites if s.status == "fused"}

    explain = functools.partial(aiter_inductor.explain, model, ids, target="gfx942")
    everything = taken(explain())
    assert {("rope", "qk_norm_rope"), ("rms_norm", "add_rms_norm")} <= everything
    without = explain(disable=["rope"])
    assert "rope" not in dict(taken(without))
    assert ("rms_norm", "rms_norm") in taken(without)  # of q and of k
    assert {s.reason for s in without.sites if s.pattern == "rope"} == {"rope is disabled"}
    without = explain(disable=["rms_norm"])
    assert "rms_norm" not in dict(taken(without))
    assert ("rope", "rope_qk") in taken(without)
    added = aiter_inductor.explain(
        norms_and_rows, x, x, w, target="gfx942", disable=["add_rms_norm"]
    )
    assert taken(added) == {("rms_norm", "rms_norm")}
    (site,) = added.sites
    assert site.reason == "triton takes it, but not as add_rms_norm: add_rms_norm is disabled"


def test_a_name_that_nothing_bears_is_reported() -> None:
    model, x = Norm(), torch.randn(2, 64)
    misspelt = aiter_inductor.explain(model, x, disable=["rms_nrom", "rope"])
    (note,) = misspelt.notes
    assert note == (
        "aiter.disable names 'rms_nrom', which is no pattern, op or provider and no module with a "
        "site here; the nearest name is 'rms_norm'"
    )


def test_disable_by_environment(every_op_taken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_INDUCTOR_DISABLE", "rope, block.nor")
    assert Options.read({}).disable == {"rope", "block.nor"}
    compiled = torch.compile(Norm(), backend="aiter")
    compiled(torch.randn(8, 64))
    assert aiter_inductor.report(compiled).count("rms_norm", "fused") == 1


def test_assert_fused_gives_the_reasons() -> None:
    report = aiter_inductor.explain(Norm(), torch.randn(8, 64))
    with pytest.raises(CoverageError) as raised:
        aiter_inductor.assert_fused(report, rms_norm=1)
    assert str(raised.value).splitlines() == [
        "target cpu",
        "rms_norm: 0 fused, 1 expected",
        "  block.norm: inlined: no rms_norm kernel for cpu: Inductor compiles it",
    ]
    planned = aiter_inductor.explain(Norm(), torch.randn(8, 64), target="gfx942")
    aiter_inductor.assert_fused(planned, rms_norm=1)


def test_report_of_a_model_that_was_not_compiled() -> None:
    with pytest.raises(
        LookupError, match="no graph with parameters of this Norm has been compiled"
    ):
        aiter_inductor.report(Norm())


def test_recompilation_replaces_the_report(every_op_taken: None) -> None:
    compiled = torch.compile(Norm(), backend="aiter")
    for rows in (8, 16, 24):
        compiled(torch.randn(rows, 64))
    report = aiter_inductor.report(compiled)
    assert report.count("rms_norm", "fused") == 1
    assert "num_rows=s" in report.sites[0].problem


@pytest.mark.parametrize(("value", "expected"), [("1", "aiter"), ("0", "inductor")])
def test_one_variable_enables_it(value: str, expected: str) -> None:
    program = (
        "import torch, sys\n"
        "torch.compile(lambda x: x + 1)(torch.ones(2))\n"
        "print('aiter' if 'aiter_inductor.backend' in sys.modules else 'inductor')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "AITER_INDUCTOR": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("how", "replayed"),
    [
        ({}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"options": {"triton.cudagraphs": True}}, True),
    ],
    ids=str,
)
def test_plans_know_whether_cuda_graphs_replay_them(
    how: dict[str, Any], replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, plain = [], backend.plan_module

    def planning(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["replayed"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(backend, "plan_module", planning)
    torch.compile(lambda x: x + 1, backend="aiter", **how)(torch.ones(3))
    assert seen == [replayed]
