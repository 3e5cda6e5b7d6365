"""Every required model on the CPU against plain Inductor: error, time, memory, compile time.

    python -m benchmarks.models_cpu                          # everything, about 20 minutes
    python -m benchmarks.models_cpu --only llama --seconds 2 # a look
    python -m benchmarks.models_cpu --json models.json

Each case is a process of its own, with a compile cache that only this run shares. Rounds of the two
backends alternate; a ratio is the median over paired rounds, with the interval that holds it with
95 % confidence. It passes if that interval reaches down to the limit: on a machine that is not
quiet look at the interval's width first. Training compares gradients, inference logits; `error` is
the distance from eager, `exact` that from eager in float32 with the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiter_inductor.cli.progress import progress
from benchmarks import compile_time
from benchmarks.model_cases import Case, Outcome
from tests.models.zoo import REQUIRED

Row = tuple[Case, Outcome | str]
ROOT = Path(__file__).parents[1]
TIME_LIMIT, MEMORY_LIMIT, ERROR_LIMIT = 1.02, 1.02, 1.25
ROUNDING = {"float32": 2e-6, "bfloat16": 2e-3}
"""Distances below these are a few last bits of a result and compare with nothing."""
CASE_LIMIT_S = 300


def cases(dtype: str, seconds: float) -> list[Case]:
    """Every model with and without a cache; short and quantised ones; training."""
    usual = [
        Case(model, phase, dtype, seconds=seconds)
        for model in REQUIRED
        for phase in ("prefill", "decode")
    ]
    short = [
        Case(model, phase, other, length=32, seconds=seconds)
        for model in ("llama", "deepseek_v3")
        for phase in ("prefill", "decode")
        for other in ("bfloat16", "float32")
    ]
    quantised = [
        Case("llama", phase, dtype, quantised=scheme, seconds=seconds)
        for scheme in ("fp8_blockscale", "int8")
        for phase in ("prefill", "decode")
    ]
    training = [
        Case(model, "train", "float32", layers=4, batch=2, length=64, seconds=2 * seconds)
        for model in ("llama", "gemma2", "gemma3")
    ]
    return [*usual, *short, *quantised, *training]


def run(case: Case, cache: str) -> Outcome | str:
    """Measure a case in a process; the end of what it said if it failed."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.model_cases"]
    content = json.dumps(dataclasses.asdict(case))
    try:
        done = subprocess.run(
            [*command, content], env=env, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=CASE_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done after {CASE_LIMIT_S} s"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr else f"exit {done.returncode}"
    return Outcome(**json.loads(done.stdout.strip().splitlines()[-1]))


def complaints(case: Case, outcome: Outcome) -> list[str]:
    """What is worse than plain Inductor by more than its limit."""
    found = []
    if outcome.low > TIME_LIMIT:
        found.append(f"time {outcome.ratio:.3f}")
    for name, errors in (("error", outcome.error), ("exact error", outcome.exact_error)):
        allowed = ERROR_LIMIT * errors["inductor"] + ROUNDING[case.dtype]
        if math.isnan(errors["aiter"]) or errors["aiter"] > allowed:
            found.append(f"{name} {errors['aiter']:.2g} against {errors['inductor']:.2g}")
    if (memory := memory_ratio(outcome)) is not None and memory > MEMORY_LIMIT:
        found.append(f"memory {memory:.3f}")
    return found


def memory_ratio(outcome: Outcome) -> float | None:
    """Peak memory over plain Inductor's, where it was measured."""
    peaks = outcome.peak_mb
    return peaks["aiter"] / peaks["inductor"] if peaks else None


def line(case: Case, outcome: Outcome | str) -> str:
    """One row of the table."""
    if isinstance(outcome, str):
        return f"{case!s:44} FAILED: {outcome}"
    memory = memory_ratio(outcome)
    ms, error, exact = outcome.median_ms, outcome.error, outcome.exact_error
    verdict = ", ".join(complaints(case, outcome)) or "ok"
    return (
        f"{case!s:44} {ms['eager']:8.2f} {ms['inductor']:8.2f} {ms['aiter']:8.2f} "
        f"{outcome.ratio:6.3f} {outcome.low:6.3f}-{outcome.high:5.3f} {outcome.rounds:4d}  "
        f"{error['inductor']:7.1e} {error['aiter']:7.1e}  "
        f"{exact['inductor']:7.1e} {exact['aiter']:7.1e} "
        f"{'' if memory is None else f'{memory:.3f}':>6}  {verdict:8} {outcome.sites}"
    )


HEADER = (
    f"{'case':44} {'eager ms':>8} {'inductor':>8} {'aiter':>8} {'ratio':>6} {'95 %':>12} "
    f"{'n':>4}  {'error: inductor, aiter':15}  {'exact: same':15} {'memory':>6}  verdict  sites"
)


def measure_compiling(runs: int, layers: int) -> dict[str, Any]:
    """Seconds to compile a many-layered Llama, and the ratio."""
    found: dict[str, list[tuple[float, float]]] = {b: [] for b in compile_time.BACKENDS}
    turns = [b for n in range(runs) for b in compile_time.BACKENDS[:: 1 if n % 2 == 0 else -1]]
    for backend in progress(turns, f"compiling {layers} layers with "):
        found[backend].append(compile_time.seconds(backend, layers))
    return {"layers": layers, "seconds": found, "ratio": compile_time.ratio(found)}


def measure_cases(chosen: Sequence[Case], file: Path | None) -> list[Row]:
    """Run and print case after case; what is known so far is in `file` after each."""
    rows: list[Row] = []
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="models_cpu_") as cache:
        for case in progress(chosen):
            outcome = run(case, cache)
            rows.append((case, outcome))
            print(line(case, outcome), flush=True)
            write(file, rows, None)
    return rows


def write(file: Path | None, rows: Sequence[Row], compiling: Mapping[str, Any] | None) -> None:
    """Every number as JSON."""
    if file is None:
        return
    content = [
        {
            **dataclasses.asdict(case),
            "outcome": outcome if isinstance(outcome, str) else dataclasses.asdict(outcome),
        }
        for case, outcome in rows
    ]
    file.write_text(json.dumps({"cases": content, "compile_time": compiling}, indent=1) + "\n")


def main() -> int:
    """Print the tables; returns 1 if a case failed or is over a limit."""
    arguments = parse()
    chosen = [
        case
        for case in cases(arguments.dtype, arguments.seconds)
        if not arguments.only or any(word in str(case).split() for word in arguments.only)
    ]
    rows = measure_cases(chosen, arguments.json)
    bad = [f"{c}" for c, o in rows if isinstance(o, str) or complaints(c, o)]
    compiling = None
    if arguments.compile_runs:
        compiling = measure_compiling(arguments.compile_runs, arguments.compile_layers)
        print(compile_time.table(compiling["seconds"]))
        if compiling["ratio"] > compile_time.LIMIT:
            bad.append(f"compile time, ratio {compiling['ratio']:.3f}")
    write(arguments.json, rows, compiling)
    print(f"{len(bad)} over a limit" + "".join(f"\n  {each}" for each in bad))
    return int(bool(bad))


def parse() -> argparse.Namespace:
    """What to run and for how long."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases with one of these words")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing, for each case")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(ROUNDING))
    parser.add_argument("--compile-runs", type=int, default=3, help="0 leaves compile time out")
    parser.add_argument("--compile-layers", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
