"""Race launch parameters of the Triton kernels on the GPU at hand.

    python -m benchmarks.race_kernels --sizes large --only rms_norm    # the large ones on a GPU
    python -m benchmarks.race_kernels --defaults                      # what runs without tuning
    python -m benchmarks.race_kernels --dry --only rope                # no GPU: compile for sm_90

A race is one op at one shape: the default, a few candidates and Inductor's code for the plain
formula. Each becomes a CUDA graph of many launches over input sets that together exceed the
second-level cache twice; the graphs are replayed in rounds, so that drift falls on all alike.
Prints a line each: microseconds and the multiple of the floor, which is the least bytes over the
copy rate measured in the same run. `$OUT/race.json` holds the same where OUT is set.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the pool has a process for each core

import torch
import torch._inductor.config
import triton
from torch._subclasses import FakeTensorMode
from triton.runtime.errors import OutOfResources

from aiter_inductor.kernels.triton import activation, norm_backward, norm_kernel, quant, rope
from benchmarks.races import INDUCTOR, Race, all_races, large_races, named, small_races
from tests.kernels.triton.compiled import compiled
from tests.lowerings.checks import assert_close

LAUNCHING = [activation, norm_backward, norm_kernel, quant, rope]
ROTATED_BYTES = 240 << 20  # read and written; what is read alone is twice an H200's 60 MB cache
MAX_SETS = 128
REPLAY_US = 250.0
LAUNCH_US = 1.5  # the shortest kernel in a graph
WARM_UPS, ROUNDS = 3, 24
BEHIND, ALONE = "hip behind another kernel", "another kernel"
COMPILERS = 14
torch._inductor.config.autotune_local_cache = False  # a choice timed beside other compilers is poor


class CompileOnly:
    """Stands in for `launchable`: compiles into Triton's cache and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.kernel.warmup, grid=(1,))


def compile_one(label: str, inductor: bool, defaults: bool) -> None:
    """Fill a cache with one race's kernels, or with Inductor's; runs in a process of the pool."""
    race = all_races()[label]
    race = replace(race, configs=()) if defaults else race
    args, kwargs = race.problem.sample(seed=0, device="cuda")
    runs = race.runs(kwargs)
    formula = runs.pop(INDUCTOR)
    if inductor:
        formula(*args)
    else:
        launching = [module.launchable for module in LAUNCHING]
        for module in LAUNCHING:
            module.launchable = CompileOnly
        for run in runs.values():
            run(*args)
        for module, kept in zip(LAUNCHING, launching, strict=True):
            module.launchable = kept
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def compile_all(races: list[Race]) -> None:
    """Fill Triton's and Inductor's caches from many processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILERS, mp_context=context) as pool:
        jobs = {
            pool.submit(compile_one, race.label, inductor, not race.configs): race.label
            for inductor in (True, False)
            for race in races
        }
        for job in as_completed(jobs):
            if problem := job.exception():
                print(f"{jobs[job]} does not compile: {str(problem)[:300]}", flush=True)


@dataclass
class Outcome:
    """What a race found; microseconds a launch."""

    race: str
    shape: str
    floor_us: float
    torch_compile_us: float | None = None
    default: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    candidates: dict[str, float] = field(default_factory=dict)
    complaints: dict[str, str] = field(default_factory=dict)


def copy_rate() -> float:
    """Bytes a microsecond, read and written, of a large device copy."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    took = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / float(took) / 1e3


def captured(
    run: Callable[..., Any], sets: list[tuple[Any, ...]], launches: int, pool: Any
) -> torch.cuda.CUDAGraph:
    """A graph of `launches` calls over the input sets in turn, outputs rotating as inputs do."""
    graph, outputs = torch.cuda.CUDAGraph(), deque[Any](maxlen=len(sets))
    with torch.cuda.graph(graph, pool=pool):
        for launch in range(launches):
            outputs.append(run(*sets[launch % len(sets)]))
    return graph


def replay(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Median microseconds of a replay of each graph, all queued in rounds without a pause."""
    names = list(graphs)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for turn in range(WARM_UPS + ROUNDS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            if turn >= WARM_UPS:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(1e3 * start.elapsed_time(end) for start, end in pairs)
        for name, pairs in events.items()
    }


def behind_another(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`run` behind a kernel that lets nobody come early, and that kernel alone."""
    counter = torch.zeros(1, device="cuda")

    def behind(*args: Any) -> Any:
        counter.add_(1)
        return run(*args)

    return {BEHIND: behind, ALONE: lambda *_: counter.add_(1)}


def run_race(race: Race, rate: float, *, behind: bool = False, resident: bool = False) -> Outcome:
    """Compare every candidate with the reference, then time them and Inductor's code.

    Args:
        behind: time the HIP kernel behind another one too.
        resident: two sets of inputs, which the second cache keeps if they are small.
    """
    size_bytes = race.problem.bytes_moved()
    found = Outcome(race.name, race.shape, size_bytes / rate)
    num_sets = 2 if resident else min(max(math.ceil(ROTATED_BYTES / size_bytes), 2), MAX_SETS)
    launches = math.ceil(REPLAY_US / max(found.floor_us, LAUNCH_US) / num_sets) * num_sets
    samples = [race.problem.sample(seed=seed, device="cuda") for seed in range(num_sets)]
    sets, kwargs = [args for args, _ in samples], samples[0][1]
    expected = race.op.reference(*sets[0], **kwargs)
    torch._dynamo.reset()
    graphs, pool = {}, torch.cuda.graph_pool_handle()
    runs = race.runs(kwargs)
    if behind and "hip" in runs:
        runs |= behind_another(runs["hip"])
    for name, run in runs.items():
        try:
            actual = run(*sets[0])
            if name not in (INDUCTOR, ALONE):
                assert_close(actual, expected, what=name)
        except (AssertionError, OutOfResources) as problem:
            found.complaints[name] = str(problem)[:300]
            if isinstance(problem, OutOfResources):
                continue
        torch.cuda.synchronize()
        graphs[name] = captured(run, sets, launches, pool)
    took = {name: replay_us / launches for name, replay_us in replay(graphs).items()}
    found.torch_compile_us = took.pop(INDUCTOR, None)
    if ALONE in took:
        took[BEHIND] -= took.pop(ALONE)
    found.candidates = took
    right = {name: us for name, us in took.items() if name not in found.complaints}
    fastest = min(right, key=right.__getitem__, default="")
    for key, name in (("default", "default"), ("best", fastest)):
        if name in took:
            setattr(found, key, {"config": describe(race, name), "us": took[name]})
    return found


def describe(race: Race, name: str) -> dict[str, Any]:
    """A candidate's launch parameters; the HIP kernels choose theirs themselves."""
    configs = race.candidates()
    if name not in configs:
        return {"name": name}
    config = configs[name] or race.default
    return {"name": named(config), **asdict(config)}


def show(found: Outcome) -> None:
    """Print a race, the fastest first."""
    lines = {**found.candidates, INDUCTOR: found.torch_compile_us or math.nan}
    label = f"{found.race} {found.shape}"
    for name, us in sorted(lines.items(), key=lambda line: line[1]):
        complaint = found.complaints.get(name, "")[:60]
        print(f"{label:42} {name:26} {us:8.2f} us {us / found.floor_us:7.2f} x floor  {complaint}")
    print(f"{label:42} {'floor':26} {found.floor_us:8.2f} us", flush=True)


def compile_without_gpu(race: Race) -> None:
    """Compile each candidate for sm_90 from inputs that have shapes and no memory."""
    with FakeTensorMode():
        args, kwargs = race.problem.sample(seed=0, device="cpu")
        runs = race.runs(kwargs)
        for name in race.candidates():
            kernels = compiled(LAUNCHING, functools.partial(runs[name], *args), "sm_90")
            shared = max(kernel.metadata.shared for kernel in kernels)
            config = named(race.default) if name == "default" else ""
            print(f"{race.label:42} {name:26} {shared:6} B shared  {config}", flush=True)


def main() -> None:
    """Compile, then race."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="races whose label contains this")
    parser.add_argument("--sizes", choices=("large", "small", "all"), default="all")
    parser.add_argument("--budget-s", type=float, default=280, help="stop starting races after")
    parser.add_argument("--defaults", action="store_true", help="no other launch parameters")
    parser.add_argument("--compiled", action="store_true", help="the caches are filled already")
    parser.add_argument(
        "--behind", action="store_true", help="HIP kernels also where no launch comes early"
    )
    parser.add_argument(
        "--resident", action="store_true", help="inputs in the second cache, as behind their maker"
    )
    parser.add_argument("--dry", action="store_true", help="only compile, for sm_90, without a GPU")
    chosen = parser.parse_args()
    began = time.monotonic()
    sizes = {"large": large_races, "small": small_races, "all": lambda: all_races().values()}
    races = [race for race in sizes[chosen.sizes]() if chosen.only in race.label]
    if chosen.defaults:
        races = [replace(race, configs=()) for race in races]
    if chosen.dry:
        for race in races:
            compile_without_gpu(race)
        return
    if not chosen.compiled:
        compile_all(races)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    run = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_us": copy_rate(),
    }
    print(run)
    outcomes = []
    for race in races:
        if time.monotonic() - began > chosen.budget_s:
            print(f"no time left for {race.label}")
            continue
        outcomes.append(
            run_race(
                race,
                run["copy_bytes_per_us"],
                behind=chosen.behind,
                resident=chosen.resident,
            )
        )
        show(outcomes[-1])
        if folder := os.environ.get("OUT"):
            written = json.dumps({**run, "races": [asdict(found) for found in outcomes]}, indent=1)
            Path(folder, "race.json").write_text(written)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
