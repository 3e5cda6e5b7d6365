"""Seconds to compile a many-layered tiny Llama: this backend against plain Inductor.

Every measurement is a process of its own with all compile caches off; the two backends alternate.
Processor seconds, of the process and of the compilers it starts, are what other work on the
machine disturbs least, so they are compared; wall seconds are shown.

    python benchmarks/compile_time.py --layers 32 --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from aiter_inductor.cli.progress import progress

ROOT = Path(__file__).parents[1]
BACKENDS = ("inductor", "aiter")
LIMIT = 1.10

ONE = """
import json, resource, sys, time
import torch
from tests.models import zoo

backend, layers = sys.argv[1], int(sys.argv[2])
model, ids = zoo.build("llama", layers=layers), zoo.token_ids()

def processor_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)

# A first, small compilation pays for imports and worker processes.
torch.compile(torch.nn.functional.silu, backend=backend)(torch.ones(8))
wall, used = time.perf_counter(), processor_seconds()
with torch.no_grad():
    torch.compile(model, backend=backend)(input_ids=ids, use_cache=False)
print(json.dumps([processor_seconds() - used, time.perf_counter() - wall]))
"""


def seconds(backend: str, layers: int) -> tuple[float, float]:
    """Processor and wall seconds of one compilation in a fresh process."""
    # Compilers started by a pool are not this process's children until they end.
    env = {
        **os.environ,
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", ONE, backend, str(layers)]
    run = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    used, wall = json.loads(run.stdout)
    return used, wall


def ratio(found: Mapping[str, Sequence[tuple[float, float]]]) -> float:
    """Processor time over plain Inductor's: the median over pairs of runs."""
    pairs = zip(found["aiter"], found["inductor"], strict=True)
    return statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)


def table(found: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Medians of both backends, and their ratio."""
    lines = []
    for backend, measured in found.items():
        used, wall = (statistics.median(column) for column in zip(*measured, strict=True))
        lines.append(f"{backend:9} {used:6.1f} s of processors, {wall:6.1f} s in all")
    return "\n".join([*lines, f"ratio {ratio(found):.3f} (limit {LIMIT})"])


def main() -> int:
    """Print the medians and their ratio; returns 1 if it is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {backend: [] for backend in BACKENDS}
    for backend in progress(BACKENDS * arguments.runs, "compiling with "):
        found[backend].append(seconds(backend, arguments.layers))
    print(table(found))
    return int(ratio(found) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
