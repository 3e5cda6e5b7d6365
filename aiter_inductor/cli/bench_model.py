"""Measure one model: eager, under Inductor, under this backend; inference or a training step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

import aiter_inductor
from aiter_inductor.cli import models
from aiter_inductor.cli.bench_op import device_work, error
from aiter_inductor.cli.model_programs import (
    INPUT_SETS,
    ModelRequest,
    Program,
    programs_of,
)
from aiter_inductor.cli.progress import progress
from aiter_inductor.cli.rows import Row
from aiter_inductor.cli.timing import Call, measure, ratio
from aiter_inductor.core import inductor
from aiter_inductor.core.errors import OptionValueError
from aiter_inductor.core.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Prepared:
    """A variant that has been called once: its distance from eager, and what was done to it."""

    program: Program
    error: float
    note: str


def parse_tokens(text: str) -> tuple[int, int]:
    """`(64, 1)` from `64x1`.

    Raises:
        OptionValueError: for anything else.
    """
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise OptionValueError("--tokens", text, "BATCHxLENGTH, such as 64x1")
    return int(found[1]), int(found[2])


def measure_model(request: ModelRequest, device: torch.device, *, rounds: int) -> list[Row]:
    """Time every variant of `request` in one run."""
    torch._dynamo.reset()
    model = models.build(request.name, device=device, dtype=request.dtype, layers=request.layers)
    ids = [
        models.token_ids(model, *request.shape, device=device, seed=seed)
        for seed in range(INPUT_SETS)
    ]
    with inductor.many_compilations():
        prepared = _prepare(model, request, ids[0])
        calls: dict[str, list[Call]] = {
            name: [partial(each.program.run, tokens) for tokens in ids]
            for name, each in prepared.items()
        }
        timings = measure(calls, device, rounds=rounds)
        peaks = {name: _peak_bytes(each[0], device) for name, each in calls.items()}
        work = {name: device_work(each[0], device) for name, each in calls.items()}
    return [
        Row(
            case=str(request),
            variant=name,
            latency_us=timing.median_us,
            spread=timing.spread,
            against_inductor=ratio(timing, timings["inductor"]),
            kernels=work[name].kernels,
            busy_us=work[name].busy_us,
            error=prepared[name].error,
            peak_bytes=peaks[name],
            note=prepared[name].note,
        )
        for name, timing in timings.items()
    ]


def _prepare(
    model: PreTrainedModel, request: ModelRequest, ids: torch.Tensor
) -> Mapping[str, _Prepared]:
    """Compile every variant and compare what it gives for `ids` with the first one's results."""
    prepared = {}
    expected: tuple[torch.Tensor, ...] = ()
    programs = programs_of(model, request)
    for variant in progress(list(programs), "first call, "):
        found = programs[variant].results(ids)
        expected = expected or found
        note = summary(aiter_inductor.report(model)) if variant.backend == "aiter" else ""
        prepared[variant.name] = _Prepared(programs[variant], error(found, expected), note)
    return prepared


def summary(report: Report) -> str:
    """Sites by status, and how many of them each fused op took."""
    status = Counter(site.status for site in report.sites)
    taken = Counter(site.fused_into for site in report.sites if site.status == "fused")
    counted = ", ".join(f"{number} {name}" for name, number in status.items())
    into = ", ".join(f"{op} {number}" for op, number in taken.items())
    return f"{counted} ({into})" if into else counted


def _peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that a call holds beyond what was held before it."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
