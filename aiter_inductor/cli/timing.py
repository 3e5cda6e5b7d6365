"""Time several ways to compute the same thing, side by side in one run.

Rounds alternate between the variants, so that clock changes and other work on the machine fall on
all of them alike. A variant is a list of calls that do the same to different inputs: together they
are larger than the last-level cache, so that every call reads from memory, as in a model.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

Call = Callable[[], object]
Round = Callable[[], float]
"""Runs a variant once over its inputs; returns microseconds a call."""

MIN_ROUND_US = 2000.0
MIN_ROUNDS = 5
BUDGET_S = 20.0
MAX_ROTATED = 256


@dataclass(frozen=True)
class Timing:
    """Latencies of one variant, one entry a round.

    Attributes:
        rounds_us: microseconds a call.
    """

    rounds_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        """The median over rounds."""
        return statistics.median(self.rounds_us)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a fraction of the median."""
        if len(self.rounds_us) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds_us, n=4)
        return (high - low) / 2 / self.median_us


@dataclass(frozen=True)
class Ceilings:
    """What this chip reaches, measured in the same run as everything compared with it.

    Attributes:
        copy_gbps: bytes read and written by a large copy, GB/s.
        matmul_tflops: bf16 on an accelerator, fp32 on a CPU.
    """

    copy_gbps: float
    matmul_tflops: float

    def floor_us(self, size_bytes: float, flops: float) -> float:
        """The least time that moving `size_bytes` and doing `flops` takes here."""
        return max(size_bytes / self.copy_gbps / 1e3, flops / self.matmul_tflops / 1e6)


def ratio(ours: Timing, theirs: Timing) -> float:
    """Median over rounds of ours / theirs, paired by round."""
    pairs = zip(ours.rounds_us, theirs.rounds_us, strict=True)
    return statistics.median(a / b for a, b in pairs)


def measure(
    variants: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    graph: bool = False,
    rounds: int = 30,
) -> dict[str, Timing]:
    """Time all variants, alternating between them.

    Args:
        variants: for each name the calls of one round, on different inputs.
        device: where they compute.
        graph: time replays of a CUDA graph of all calls, which leaves out what the host costs.
        rounds: measurements of each variant, after a warm-up; fewer where that many would take
            longer than `BUDGET_S`.
    """
    prepared = {name: _round(calls, device, graph) for name, calls in variants.items()}
    order = list(prepared)
    start = time.perf_counter()
    for name in order:
        prepared[name]()
    affordable = int(BUDGET_S / (time.perf_counter() - start))
    rounds = min(rounds, max(affordable, MIN_ROUNDS))
    found: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            for name in order if number % 2 == 0 else reversed(order):
                found[name].append(prepared[name]())
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(latencies)) for name, latencies in found.items()}


def rotation(size_bytes: float, device: torch.device) -> int:
    """How many sets of inputs of `size_bytes` each together exceed the last-level cache twice."""
    cache_bytes = 32 << 20
    if device.type == "cuda":
        cache_bytes = max(torch.cuda.get_device_properties(device).L2_cache_size, 64 << 20)
        if torch.version.hip:
            cache_bytes = 256 << 20  # the Infinity Cache behind the L2s is not reported
    return min(max(math.ceil(2 * cache_bytes / max(size_bytes, 1.0)), 2), MAX_ROTATED)


@lru_cache
def ceilings(device: torch.device) -> Ceilings:
    """Measure the copy and matmul rates of `device`."""
    large = device.type == "cuda"
    words = (1 << 28) if large else (1 << 25)
    source = torch.empty(words, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    size = 8192 if large else 1024
    dtype = torch.bfloat16 if large else torch.float32
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    timings = measure(
        {"copy": [lambda: target.copy_(source)], "matmul": [lambda: a @ b]}, device, rounds=10
    )
    copy_us, matmul_us = timings["copy"].median_us, timings["matmul"].median_us
    return Ceilings(2 * 4 * words / copy_us / 1e3, 2 * size**3 / matmul_us / 1e6)


def _round(calls: Sequence[Call], device: torch.device, graph: bool) -> Round:
    for call in calls:
        call()
    if device.type != "cuda":
        return _repeated(calls, _on_host)
    torch.cuda.synchronize(device)
    return _repeated([_captured(calls)] if graph else calls, _on_device, len(calls) if graph else 1)


def _repeated(
    calls: Sequence[Call], clock: Callable[[Sequence[Call], int], float], each: int = 1
) -> Round:
    """A round of so many passes over `calls` that the clock's resolution does not matter."""
    once_us = clock(calls, 1)
    passes = max(1, round(MIN_ROUND_US / max(once_us, 1.0)))
    return lambda: clock(calls, passes) / (passes * len(calls) * each)


def _on_host(calls: Sequence[Call], passes: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(passes):
        for call in calls:
            call()
    return (time.perf_counter_ns() - start) / 1e3


def _on_device(calls: Sequence[Call], passes: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(passes):
        for call in calls:
            call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _captured(calls: Sequence[Call]) -> Call:
    """One replay of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
