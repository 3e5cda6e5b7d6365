"""Race launch parameters of the row kernels on one GPU, beside Inductor's code for the formula.

    python benchmarks/race_rows.py [--quick]

First every kernel is checked against its reference over a table of shapes. Then each row of the
baseline table is timed with each candidate `RowConfig`; a line gives microseconds and the ratio to
the floor (least bytes over the copy rate measured in the same run). Up to 64 rows are replayed from
a CUDA graph over enough input sets to exceed the second-level cache.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))

from aiter_inductor.core.op import OPS, Op
from aiter_inductor.kernels.triton import norm_backward, norm_kernel
from aiter_inductor.kernels.triton import quant as quant_kernels
from aiter_inductor.kernels.triton.rows import RowConfig
from aiter_inductor.lowerings import norm, norm_quant, quant
from tests.lowerings.checks import assert_close

FP8 = torch.float8_e4m3fn
GRAPH_ROWS = 64
CACHE_BYTES = 64 << 20
COMPILERS = 14
SMS = (
    torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
)


@dataclass(frozen=True)
class Race:
    """One op at one shape."""

    op: str
    num_rows: int
    N: int
    group_size: int | None = None
    dtype: torch.dtype | None = None

    @property
    def label(self) -> str:
        """As a line of the table begins."""
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.op}{group} {self.num_rows}x{self.N}"

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the op."""
        found: dict[str, Any] = {}
        if self.dtype is not None:
            found["dtype"] = self.dtype
        if self.group_size is not None:
            found["group_size"] = self.group_size
        return found

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """Positional arguments of the op on the GPU."""
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            drawn = torch.randn(*shape, generator=generator, device="cuda")
            return drawn.to(torch.bfloat16)

        rows = (self.num_rows, self.N)
        made = {
            "eps": lambda: 1e-6,
            "scale": lambda: torch.full((1,), 0.02, device="cuda"),
            "weight": lambda: 1 + normal(self.N) / 8,
            "bias": lambda: normal(self.N) / 8,
        }
        parameters = OPS[self.op].signature.parameters.values()
        names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        return tuple(made[n]() if n in made else normal(*rows) for n in names)

    def floor_us(self, copy_rate: float) -> float:
        """Least bytes over the copy rate, in microseconds."""
        problem = OPS[self.op].problem(*self.inputs(0), **self.keywords())
        return float(problem.bytes_moved()) / copy_rate * 1e6


WIDE = [(64, 7168), (4096, 7168), (16384, 8192)]
RACES = [
    *(Race("rms_norm_quant", m, n, dtype=FP8) for m, n in WIDE),
    *(Race("add_rms_norm_quant", m, n, 128, FP8) for m, n in WIDE),
    *(Race("layer_norm_quant", m, n, dtype=FP8) for m, n in WIDE[:2]),
    *(Race("rms_norm", m, n) for m, n in [*WIDE[:2], (1, 4096), (64, 4096), (131072, 128)]),
    *(Race("add_rms_norm", m, n) for m, n in [*WIDE[:2], (4096, 4096), (16384, 2304)]),
    *(Race("layer_norm", m, n) for m, n in WIDE[:2]),
    *(Race("rms_norm_quant", m, n, 128, FP8) for m, n in [(4096, 4096), (4096, 1536), (4096, 512)]),
    *(Race("quant_per_token", m, n, dtype=FP8) for m, n in WIDE[:2]),
    *(Race("quant_per_group", m, n, 128, FP8) for m, n in [*WIDE[:2], (4096, 16384)]),
    *(Race("quant_per_tensor", m, n, dtype=FP8) for m, n in WIDE[:2]),
    *(Race("rms_norm_backward", m, n) for m, n in [(4096, 4096), (8192, 2304), (131072, 128)]),
    *(Race("layer_norm_backward", m, n) for m, n in [(4096, 4096)]),
]
CHECKED_ROWS = ((1, 64), (7, 128), (33, 1000), (64, 7168), (300, 4096), (5, 12288), (3, 65536))


def candidates(race: Race, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Named `config` keywords to race; the default first."""
    yield "default", {}
    if race.op == "quant_per_tensor":
        return
    if race.op.endswith("backward"):
        yield from _backward_candidates(race)
        return
    N = race.group_size if race.op == "quant_per_group" else race.N
    whole = triton.next_power_of_2(N)
    blocks = [whole] if whole <= 1024 else [b for b in (1024, 2048, 4096, 8192) if b <= whole]
    few = race.num_rows <= GRAPH_ROWS
    for block, warps in itertools.product(blocks, (1, 2, 4, 8, 16)):
        chunks = triton.cdiv(N, block)
        for rows in (1, 2, 4, 8, 16, 32) if whole <= 1024 else (1,):
            held = block * chunks * rows / (32 * warps)
            wasted = block * chunks > whole or block * rows < 128 * warps
            if not 8 <= held <= 64 or (few and held > 32) or wasted:
                continue
            config = RowConfig(block, rows, warps)
            yield _named(config)
            if few or quick or held > 32:
                continue
            for per_sm, stages in ((32 // warps, 1), (64 // warps, 1), (16 // warps, 2)):
                programs = max(per_sm, 1) * SMS
                if race.num_rows > programs * rows:
                    yield _named(replace(config, programs=programs, num_stages=stages))


def _backward_candidates(race: Race) -> Iterator[tuple[str, dict[str, Any]]]:
    block = triton.next_power_of_2(race.N)
    for warps, rows, per_sm in itertools.product((4, 8, 16), (1, 2, 4, 8), (1, 2, 4)):
        if 8 <= block * rows / (32 * warps) <= 32 and per_sm * warps <= 32:
            yield _named(RowConfig(block, rows, warps, per_sm * SMS))


def _named(config: RowConfig) -> tuple[str, dict[str, Any]]:
    persistent = f" p{config.programs}s{config.num_stages}" if config.programs else ""
    return f"b{config.block} r{config.rows} w{config.num_warps}{persistent}", {"config": config}


def host_function(op: Op) -> Callable[..., Any]:
    """The Triton host function behind the op's provider, which takes `config` too."""
    return op.providers["triton"].run


def checks() -> Iterator[Race]:
    """Every op with a kernel, at each checked shape, dtype and group size."""
    names = [n for n, op in OPS.items() if "triton" in op.providers and n in _module_ops()]
    for name, (num_rows, N) in itertools.product(names, CHECKED_ROWS):
        parameters = OPS[name].signature.parameters
        grouped = "group_size" in parameters
        only_groups = name.endswith("per_group")
        if (name.endswith("backward") and N > 16384) or (only_groups and N % 64):
            continue
        dtypes = [FP8, torch.int8] if "dtype" in parameters else [None]
        groups = [64] if only_groups else [None, 64] if grouped and N % 64 == 0 else [None]
        for dtype, group in itertools.product(dtypes, groups):
            yield Race(name, num_rows, N, group, dtype)


def check_all() -> int:
    """Compare each kernel with its reference on the GPU; the number of comparisons that failed."""
    failed = 0
    for race in checks():
        op, args = OPS[race.op], race.inputs(1)
        expected = op.reference(*args, **race.keywords())
        try:
            actual = host_function(op)(*args, **race.keywords())
            torch.cuda.synchronize()
            if race.op == "quant_int4_per_group":
                assert (actual[0] != expected[0]).float().mean() < 0.02
                actual, expected = actual[1], expected[1]
            assert_close(actual, expected, what=race.label)
        except Exception as problem:  # noqa: BLE001  one failure must not hide the next
            failed += 1
            print(f"FAILED {race.label} {race.dtype}: {str(problem)[:300]}", flush=True)
    return failed


class CompileOnly:
    """Stands in for `launchable`: compiles into Triton's cache and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.kernel.warmup, grid=(1,))


def compile_one(job: tuple[Race, dict[str, Any]]) -> None:
    """Compile what one candidate launches; runs in a process of the pool."""
    race, extra = job
    for module in (norm_kernel, norm_backward, quant_kernels):
        module.launchable = CompileOnly
    try:
        host_function(OPS[race.op])(*race.inputs(0), **race.keywords(), **extra)
    except Exception as problem:  # noqa: BLE001  the race reports it again
        print(f"{race.label} {extra} does not compile: {str(problem)[:200]}", flush=True)
    torch.cuda.empty_cache()


def compile_all(races: list[Race], quick: bool) -> None:
    """Fill Triton's cache from many processes."""
    jobs = [(race, {}) for race in checks()]
    jobs += [(race, extra) for race in races for _, extra in candidates(race, quick)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILERS, mp_context=context) as pool:
        for done, _ in enumerate(pool.map(compile_one, jobs, chunksize=4)):
            if done % 100 == 0:
                print(f"compiled {done} of {len(jobs)}", flush=True)


def _module_ops() -> set[str]:
    modules = (norm, norm_quant, quant)
    return {v.name for module in modules for v in vars(module).values() if isinstance(v, Op)}


def measure(run: Callable[..., Any], race: Race, size_bytes: float) -> float:
    """Median microseconds of `run(*inputs)`."""
    if race.num_rows > GRAPH_ROWS:
        args = race.inputs(0)
        run(*args)
        return (
            float(
                triton.testing.do_bench(lambda: run(*args), warmup=4, rep=16, return_mode="median")
            )
            * 1e3
        )
    sets = [race.inputs(seed) for seed in range(min(int(CACHE_BYTES / size_bytes) + 1, 64))]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for args in sets:
            run(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = [run(*args) for args in sets]
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(sets))
    del kept
    return sorted(times)[len(times) // 2]


def copy_rate() -> float:
    """Bytes a second, read and written, of a large device copy."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    took = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / float(took) * 1e3


def run_race(race: Race, rate: float, quick: bool) -> None:
    """Print a line for each candidate of one race, then the winner."""
    op, keywords = OPS[race.op], race.keywords()
    floor = race.floor_us(rate)
    size = floor * rate / 1e6
    results = []
    for name, extra in candidates(race, quick):
        try:
            run = functools.partial(host_function(op), **keywords, **extra)
            took = measure(run, race, size)
        except Exception as problem:  # noqa: BLE001  a candidate may ask for too many resources
            print(f"{race.label:45} {name:28} failed: {str(problem)[:120]}", flush=True)
            continue
        results.append((took, name))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op.reference(*a, **keywords), dynamic=False)
    results.append((measure(compiled, race, size), "torch.compile"))
    for took, name in sorted(results)[:12]:
        print(f"{race.label:45} {name:28} {took:8.2f} us  {took / floor:6.2f} x floor")
    by_name = {name: took for took, name in results}
    best = min(results)
    print(
        f"WINNER {race.label:38} {best[1]:28} {best[0]:8.2f} us  {best[0] / floor:6.2f} x floor; "
        f"default {by_name['default']:.2f} = {by_name['default'] / floor:.2f}; "
        f"torch.compile {by_name['torch.compile']:.2f}; floor {floor:.2f}",
        flush=True,
    )


def main() -> None:
    """Check, then race."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave persistent candidates out")
    parser.add_argument("--only", default="", help="races whose label contains this")
    parser.add_argument("--budget-s", type=float, default=230, help="stop starting races after")
    chosen = parser.parse_args()
    began = time.monotonic()
    races = [race for race in RACES if chosen.only in race.label]
    compile_all(races, chosen.quick)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    failed = check_all()
    print(f"checks: {failed} failed, {time.monotonic() - began:.0f} s", flush=True)
    rate = copy_rate()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"copy rate {rate / 1e9:.0f} GB/s; {versions}")
    for race in races:
        if time.monotonic() - began > chosen.budget_s:
            print(f"no time left for {race.label}")
            continue
        run_race(race, rate, chosen.quick)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
