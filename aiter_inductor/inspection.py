"""Look at what the backend does, or would do, to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from aiter_inductor.backend import Plan, plan_module, sum_reports
from aiter_inductor.core import config, inductor
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.record import recall
from aiter_inductor.core.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    target: str | None = None,
    dynamic: bool | None = None,
    disable: Sequence[str] = (),
    code_objects: bool = False,
    **kwargs: Any,
) -> Report:
    """What `backend="aiter"` makes of `model(*args, **kwargs)`.

    The model is captured and runs once, eagerly; no graph is compiled and no kernel is built.

    Args:
        model: a module or function; a compiled one is looked through.
        target: plan for this chip (`gfx942`, `gfx950`, `sm_90`, `cpu`) instead of the one here.
        dynamic: as for `torch.compile`.
        disable: as the option `aiter.disable`, over the environment as there.
        code_objects: name, for every fused site, the code objects that its kernel is loaded from
            on an AMD chip. Triton compiles its kernels to tell, unless it did so before.

    Raises:
        UnknownTargetError: for a target that is not known.
    """
    options = config.Options.read({"aiter.disable": disable} if disable else {})
    options = replace(options, target=arch_named(target).name if target else None)
    reports: dict[str, Report] = {}

    def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        plans = plan_module(gm, options).values()
        reports[inductor.compilation()] = sum_reports(
            [_with_code(p) if code_objects else p.report for p in plans]
        )
        return gm.forward

    plain = getattr(model, "_orig_mod", model)
    with inductor.captured_by(capture, plain, dynamic) as captured:
        captured(*args, **kwargs)
    if reports:
        return sum_reports(list(reports.values()))
    note = "nothing was captured: no tensor operation ran that was not compiled before"
    return Report(target or "cpu", 0, (), (note,))


def _with_code(planned: Plan) -> Report:
    if not planned.report.target.startswith("gfx"):
        return planned.report
    from aiter_inductor.cli.code_objects import with_code_objects

    return with_code_objects(planned.report, planned.decisions)


def report(model: torch.nn.Module) -> Report:
    """The report of a model in use, gathered while it was compiled; compiles nothing.

    Raises:
        LookupError: if no graph with parameters of `model` was compiled by this backend.
    """
    reports = recall([*model.parameters(), *model.buffers()])
    if not reports:
        raise LookupError(
            f"no graph with parameters of this {type(model).__name__} has been compiled with "
            "backend='aiter' in this process; another instance of its class, whose code it may "
            "share, has a report of its own"
        )
    return sum_reports(reports)
