"""What a call costs the host: of an RMSNorm, by the ways there are to make it, and of other ops.

    python benchmarks/host_time.py
    python benchmarks/host_time.py ops    # compiled kernels, as generated code calls them

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
from torch import Tensor

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


def ops() -> Mapping[str, Callable[[], object]]:
    """Calls of kernels that a compiler built, as generated code makes them, by name."""
    load_ops()

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    def product(M: int, N: int, K: int) -> Callable[[], object]:
        x, weight = (random(rows, K, dtype=torch.float8_e4m3fn) for rows in (M, N))
        of_x, of_weight = (random(rows, K // 128, dtype=torch.float32) for rows in (M, N // 128))
        how = {"group_size": 128, "block_n": 128, "block_k": 128, "out_dtype": torch.bfloat16}
        return lambda: direct.gemm_fp8_blockscale(
            x, weight, of_x, of_weight, None, **how, provider="cuda"
        )

    q, k, v = random(8, 32, 1, 128), random(8, 8, 4096, 128), random(8, 8, 4096, 128)
    mask = torch.ones(8, 1, 1, 4096, device="cuda", dtype=torch.bool)
    tables = torch.arange(8 * 256, device="cuda", dtype=torch.int32).view(8, 256)
    lengths = torch.full((8,), 4096, device="cuda", dtype=torch.int32)
    pages = random(8 * 256, 16, 8, 128)
    queries, keys = random(2, 32, 512, 128), random(2, 8, 512, 128)
    latent_q, latent = random(8, 128, 576), random(8 * 64, 64, 576)
    x = random(64, 4096)
    return {
        "decode attention, dense": lambda: direct.attention(
            q, k, v, mask, scale=0.1, provider="hip"
        ),
        "decode attention, paged": lambda: direct.paged_attention(
            q[:, :, 0], pages, pages, tables, lengths, scale=0.1, provider="hip"
        ),
        "product, 64 rows by blocks": product(64, 4096, 4096),
        "product, 4096 rows by blocks": product(4096, 512, 512),
        "attention": lambda: direct.attention(
            queries, keys, keys, scale=0.1, causal="top_left", provider="cuda"
        ),
        "latent attention, paged": lambda: direct.mla_paged_decode(
            latent_q, latent, tables[:, :64], lengths, scale=0.1, provider="cuda"
        ),
        "quantisation by groups": lambda: direct.quant_per_group(
            x, dtype=torch.float8_e4m3fn, group_size=128, provider="hip"
        ),
    }


@torch.no_grad()
def main() -> None:
    """Print a line for each way, or each op."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("norm", "ops"), default="norm")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--N", type=int, default=4096)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name())
    calls = ops() if arguments.what == "ops" else ways(arguments.rows, arguments.N)
    for name, call in calls.items():
        call()
        print(f"{name:32} {host_us(call):6.2f} us", flush=True)


if __name__ == "__main__":
    main()
