"""What one call of an RMSNorm costs the host, by the ways there are to make it.

Microseconds a call without waiting for the device: the least of several runs, each short enough
that its launches fit into the device's queue.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core import direct

CALLS = 400
RUNS = 7
EPS = 1e-6


def host_us(call: Callable[[], object]) -> float:
    """The least host time of a call over `RUNS` runs."""
    least = float("inf")
    for _ in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        least = min(least, (time.perf_counter_ns() - start) / CALLS / 1e3)
    return least


def ways(num_rows: int, N: int) -> Mapping[str, Callable[[], object]]:
    """Calls by name; the last three are of a compiled function, guards and all."""
    x = torch.randn(num_rows, N, device="cuda", dtype=torch.bfloat16)
    weight, out = torch.randn(N, device="cuda", dtype=torch.bfloat16), torch.empty_like(x)
    op = load_ops()["rms_norm"]

    def compiled(backend: str, *disable: str) -> Callable[[], object]:
        def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, (N,), weight, EPS)

        options: Any = {"aiter.disable": list(disable), "aiter.force": True} if disable else None
        made = torch.compile(norm, backend=backend, options=options)
        return lambda: made(x, weight)

    return {
        "operator of aten, out=": lambda: torch.mul(x, x, out=out),
        "HIP through the dispatcher": lambda: op(x, weight, EPS, provider="hip"),
        "HIP as generated code calls it": lambda: direct.rms_norm(x, weight, EPS, provider="hip"),
        "compiled, Inductor's kernel": compiled("inductor"),
        "compiled, the Triton kernel": compiled("aiter", "hip"),
        "compiled, the HIP kernel": compiled("aiter", "triton"),
    }


@torch.no_grad()
def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--N", type=int, default=4096)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name())
    for name, call in ways(arguments.rows, arguments.N).items():
        call()
        print(f"{name:32} {host_us(call):6.2f} us", flush=True)


if __name__ == "__main__":
    main()
