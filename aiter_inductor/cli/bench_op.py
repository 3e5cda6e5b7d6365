"""Measure one op: plain code eager, under Inductor, under this backend, and each provider alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import aiter_inductor
from aiter_inductor.cli.cases import Case
from aiter_inductor.cli.family import Arguments
from aiter_inductor.cli.rows import Row
from aiter_inductor.cli.timing import Call, Ceilings, Timing, ceilings, measure, ratio, rotation
from aiter_inductor.core.arch import arch_of
from aiter_inductor.core.op import Use


def measure_case(case: Case, device: torch.device, *, graph: bool, rounds: int) -> list[Row]:
    """Time every variant of `case` in one run.

    Args:
        case: what to compute.
        device: where.
        graph: time replays of a CUDA graph; has no effect on a CPU.
        rounds: measurements of each variant.
    """
    torch._dynamo.reset()
    inputs = draw(case, device)
    expected = case.op.outcome(case.plain, *inputs[0])
    functions, notes = variants(case, device, inputs[0])
    calls = {name: _calls(function, inputs) for name, function in functions.items()}
    errors = {
        name: error(case.op.outcome(function, *inputs[0]), expected)
        for name, function in functions.items()
    }
    timings = measure(calls, device, graph=graph and device.type == "cuda", rounds=rounds)
    kernels = {name: device_work(call[0], device).kernels for name, call in calls.items()}
    rows = []
    for name in notes:
        if name not in timings:
            rows.append(Row(str(case), name, None, note=notes[name]))
            continue
        row = _row(case, name, timings[name], timings["inductor"], ceilings(device))
        rows.append(replace(row, kernels=kernels[name], error=errors[name], note=notes[name]))
    return rows


def draw(case: Case, device: torch.device) -> list[Arguments]:
    """So many random inputs that together they exceed the cache."""
    number = rotation(float(case.problem.bytes_moved()), device)
    return [case.problem.sample(seed=seed, device=str(device)) for seed in range(number)]


def variants(
    case: Case, device: torch.device, inputs: Arguments
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Functions by name, and a note for each and for those that cannot run."""
    args, kwargs = inputs
    functions = {
        "eager": case.plain,
        "inductor": torch.compile(case.plain, dynamic=False, fullgraph=True, backend="inductor"),
        "aiter": torch.compile(case.plain, dynamic=False, fullgraph=True, backend="aiter"),
    }
    report = aiter_inductor.explain(case.plain, *args, **kwargs)
    seen = dict.fromkeys(
        f"{site.fused_into or site.pattern}: {site.reason}" for site in report.sites
    )
    notes = {"eager": "", "inductor": "", "aiter": "; ".join(seen) or "nothing recognised"}
    use = Use(arch_of(device), force=True)
    for name, provider in case.op.providers.items():
        if not provider.serves(use.arch):
            continue
        refusal = provider.refusal(case.problem, use)
        notes[name] = refusal or provider.decline(case.problem, use) or ""
        if refusal is None:
            functions[name] = provider.run
    return functions, notes


def error(found: Any, expected: Any) -> float:
    """Largest difference over largest magnitude, over all results; quantised ones as numbers."""
    worst = 0.0
    for ours, theirs in zip(_tensors(found), _tensors(expected), strict=True):
        a, b = ours.float(), theirs.float()
        if not b.numel():
            continue
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return worst


@dataclass(frozen=True)
class DeviceWork:
    """What one call does on an accelerator; None on a CPU.

    Attributes:
        kernels: launches; copies and fills count.
        busy_us: the sum of their times, under the profiler.
    """

    kernels: int | None
    busy_us: float | None


def device_work(call: Call, device: torch.device) -> DeviceWork:
    """Count and time the kernels of one call."""
    if device.type != "cuda":
        return DeviceWork(None, None)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    on_device = [e for e in profiled.events() or () if "CUDA" in str(e.device_type)]
    return DeviceWork(len(on_device), sum(e.time_range.elapsed_us() for e in on_device))


def _calls(function: Callable[..., Any], inputs: Sequence[Arguments]) -> list[Call]:
    return [partial(function, *args, **kwargs) for args, kwargs in inputs]


def _row(case: Case, name: str, timing: Timing, inductor: Timing, found: Ceilings) -> Row:
    """Of the two rates only the one that bounds the op."""
    size_bytes, flops = float(case.problem.bytes_moved()), float(case.problem.flops())
    latency_us = timing.median_us
    bound_by_memory = size_bytes / found.copy_gbps > flops / found.matmul_tflops / 1e3
    return Row(
        case=str(case),
        variant=name,
        latency_us=latency_us,
        spread=timing.spread,
        against_inductor=ratio(timing, inductor),
        gbps=size_bytes / latency_us / 1e3 if bound_by_memory else None,
        tflops=None if bound_by_memory else flops / latency_us / 1e6,
        against_floor=latency_us / found.floor_us(size_bytes, flops),
    )


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    yield from (result,) if isinstance(result, torch.Tensor) else result
