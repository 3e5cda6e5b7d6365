"""A training step of quantised linears behind each other: forward and the gradient of the input.

    python benchmarks/fp8_training.py --scheme fp8_blockscale --layers 4 --rows 512 4096

The layers are `quantize_`'s plain PyTorch modules, compiled by Inductor alone and by this backend,
which take turns in one process; it takes the products also where it leaves them to Inductor by
default. Several layers in one graph show what the chip costs, one what the host does; see
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from torch import Tensor, nn

import aiter_inductor
from aiter_inductor.cli.timing import measure, ratio

BACKENDS: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "aiter": {"backend": aiter_inductor.aiter, "options": {"aiter.force": True}},
}


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward; returns the gradient of x."""
    x.grad = None
    layer(x).backward(grad)
    assert x.grad is not None
    return x.grad


def race(scheme: str, layers: int, M: int, K: int, rounds: int) -> str:
    """One line: microseconds of both, their ratio, and how far the gradients are apart."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    on = {"bias": False, "dtype": torch.bfloat16, "device": "cuda"}
    plain = nn.Sequential(*(nn.Linear(K, K, **on) for _ in range(layers)))
    layer = aiter_inductor.quantize_(plain, scheme)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    compiled = {name: torch.compile(layer, dynamic=False, **how) for name, how in BACKENDS.items()}
    grads = [step(each, x, grad).float().clone() for each in compiled.values()]
    apart = float((grads[1] - grads[0]).norm() / grads[0].norm())
    calls = {name: [functools.partial(step, each, x, grad)] for name, each in compiled.items()}
    found = measure(calls, x.device, rounds=rounds)
    shown = ", ".join(f"{name} {timing.median_us:.1f} us" for name, timing in found.items())
    share = ratio(found["aiter"], found["inductor"])
    what = f"{scheme} {layers} x {M}x{K}x{K}"
    return f"{what}: {shown}, ratio {share:.3f}, gradients differ by {apart:.1e}"


def main() -> None:
    """Race every shape given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="fp8_blockscale", help="fp8_rowwise and int8, too")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for rows in given.rows:
        line = race(given.scheme, given.layers, rows, given.features, given.rounds)
        print(line, flush=True)


if __name__ == "__main__":
    main()
