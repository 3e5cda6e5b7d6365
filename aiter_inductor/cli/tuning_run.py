"""Compile, check and time the candidates of one problem."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from aiter_inductor.cli.cases import load_ops
from aiter_inductor.cli.family import Arguments
from aiter_inductor.cli.timing import Call, Timing, measure, rotation
from aiter_inductor.core.arch import Arch
from aiter_inductor.core.op import Op, Use
from aiter_inductor.core.tuned_table import MAX_ERROR
from aiter_inductor.core.tuning import config_text

HELD_BYTES = 12 << 30
"""What the graphs timed together may hold, a result a call."""
FIRST_ROUNDS, LAST_ROUNDS = 2, 9
FINALISTS = 3
MAX_CALLS = 24
"""In one graph; small problems need not read all of the cache's size anew."""


@dataclass(frozen=True)
class Candidate:
    """One provider with one config, and what was measured of it."""

    provider: str
    config: Any
    latency_us: float = 0.0
    error: float = 0.0

    def __str__(self) -> str:
        return f"{self.provider} {config_text(self.config)} {self.latency_us:.1f} µs".replace(
            "  ", " "
        )


@dataclass
class Found:
    """The fastest config of each provider, the fastest first, and why others dropped out."""

    best: list[Candidate] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def candidates_of(op: Op, problem: Any, arch: Arch, only: Sequence[str] = ()) -> list[Candidate]:
    """Everybody who can compute `problem`, with each config worth a trial."""
    use, found = Use(arch, force=True), []
    for provider in op.providers.values():
        if not provider.serves(arch) or (only and provider.name not in only):
            continue
        if provider.refusal(problem, use):
            continue
        if provider.config is None:
            found.append(Candidate(provider.name, None))
            continue
        configs: Any = provider.config()
        tried = dict.fromkeys(configs.candidates(problem, arch))
        found += [Candidate(provider.name, c) for c in tried if c.refuse(problem) is None]
    return found


def fastest(op: Op, problem: Any, candidates: Sequence[Candidate], device: torch.device) -> Found:
    """Check every candidate against the reference, time the right ones, and time the best again."""
    number = min(rotation(float(problem.bytes_moved()), device), MAX_CALLS)
    sets = [problem.sample(seed=seed, device=str(device)) for seed in range(number)]
    found = Found()
    right = list(_checked(op, sets[0], candidates, found))
    timed = _timed(op, sets, right, device, FIRST_ROUNDS)
    timed.sort(key=lambda candidate: candidate.latency_us)
    of_provider = {c.provider: c for c in reversed(timed)}
    again = dict.fromkeys([*timed[:FINALISTS], *of_provider.values()])
    timed = _timed(op, sets, list(again), device, LAST_ROUNDS)
    timed.sort(key=lambda candidate: candidate.latency_us)
    found.best = list({c.provider: c for c in reversed(timed)}.values())
    found.best.sort(key=lambda candidate: candidate.latency_us)
    return found


def compile_ahead(work: Sequence[tuple[str, Any, Sequence[Candidate]]], jobs: int) -> None:
    """Run every candidate once, in processes of their own, which fills the compilers' caches.

    Problems that differ in the number of rows only share their kernels: each candidate runs for one
    of them.
    """
    seen, tasks = set(), []
    for name, problem, candidates in work:
        for candidate in candidates:
            what = (name, replace(problem, M=0), candidate)
            if what not in seen and candidate.config is not None:
                seen.add(what)
                tasks.append((name, problem, candidate))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(jobs, 1), mp_context=context) as pool:
        for done, complaint in enumerate(pool.map(_run_once, tasks, chunksize=4), 1):
            if complaint:
                print(complaint)
            if done % 50 == 0 or done == len(tasks):
                print(f"compiled {done} of {len(tasks)}", file=sys.stderr, flush=True)


def _run_once(task: tuple[str, Any, Candidate]) -> str:
    """Compile one candidate; returns a complaint, or nothing."""
    name, problem, candidate = task
    try:
        args, kwargs = problem.sample(seed=0, device="cuda" if torch.cuda.is_available() else "cpu")
        _run(load_ops()[name], candidate)(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001, whatever a compiler raises: it is reported
        return f"{name} {candidate}: {_first_line(error)}"
    return ""


def _run(op: Op, candidate: Candidate) -> Any:
    run = op.providers[candidate.provider].run
    return run if candidate.config is None else partial(run, config=candidate.config)


def _checked(
    op: Op, inputs: Arguments, candidates: Sequence[Candidate], found: Found
) -> Iterator[Candidate]:
    """The candidates whose results are right, with their error."""
    args, kwargs = inputs
    expected = op.reference(*args, **kwargs).float()
    size = expected.norm().clamp(min=1e-30)
    for candidate in candidates:
        try:
            difference = _run(op, candidate)(*args, **kwargs).float() - expected
            error = float(difference.norm() / size)
        except Exception as problem:  # noqa: BLE001, out of registers, out of shared memory, ...
            found.complaints.append(f"{candidate}: {_first_line(problem)}")
            continue
        if not error <= MAX_ERROR:
            found.complaints.append(f"{candidate}: error {error:.1e} is above {MAX_ERROR:.0e}")
            continue
        yield replace(candidate, error=error)


def _timed(
    op: Op,
    sets: Sequence[Arguments],
    candidates: Sequence[Candidate],
    device: torch.device,
    rounds: int,
) -> list[Candidate]:
    """Time candidates side by side, as many at once as memory holds the results of."""
    moved = float(op.problem(*sets[0][0], **sets[0][1]).bytes_moved())
    together = max(int(HELD_BYTES / (moved * len(sets))), 1)
    found: list[Candidate] = []
    for start in range(0, len(candidates), together):
        chosen = candidates[start : start + together]
        calls = {str(i): _calls(op, c, sets) for i, c in enumerate(chosen)}
        timings = measure(calls, device, graph=device.type == "cuda", rounds=rounds)
        found += [_with(c, timings[str(i)]) for i, c in enumerate(chosen)]
    return found


def _calls(op: Op, candidate: Candidate, sets: Sequence[Arguments]) -> list[Call]:
    run = _run(op, candidate)
    return [partial(run, *args, **kwargs) for args, kwargs in sets]


def _with(candidate: Candidate, timing: Timing) -> Candidate:
    return replace(candidate, latency_us=timing.median_us)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
