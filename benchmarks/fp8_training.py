"""A training step of one block-scaled FP8 linear: forward and the gradient of its input.

    python benchmarks/fp8_training.py --shapes 4096x4096x4096 512x4096x4096

The layer is `quantize_(model, "fp8_blockscale")`'s plain PyTorch module, compiled by Inductor alone
and by this backend, which take turns in one process; see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor, nn

import aiter_inductor
from aiter_inductor.cli.timing import measure, ratio

BACKENDS = {"inductor": "inductor", "aiter": aiter_inductor.aiter}


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward; returns the gradient of x."""
    x.grad = None
    layer(x).backward(grad)
    assert x.grad is not None
    return x.grad


def race(M: int, N: int, K: int, rounds: int) -> str:
    """One line: microseconds of both, their ratio, and how far the gradients are apart."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(K, N, bias=False, dtype=torch.bfloat16, device="cuda"))
    layer = aiter_inductor.quantize_(plain, "fp8_blockscale")
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
    compiled = {
        name: torch.compile(layer, backend=backend, dynamic=False)
        for name, backend in BACKENDS.items()
    }
    grads = [step(each, x, grad).float().clone() for each in compiled.values()]
    apart = float((grads[1] - grads[0]).norm() / grads[0].norm())
    calls = {name: [functools.partial(step, each, x, grad)] for name, each in compiled.items()}
    found = measure(calls, x.device, rounds=rounds)
    shown = ", ".join(f"{name} {timing.median_us:.1f} us" for name, timing in found.items())
    share = ratio(found["aiter"], found["inductor"])
    return f"{M}x{N}x{K}: {shown}, ratio {share:.3f}, gradients differ by {apart:.1e}"


def main() -> None:
    """Race every shape given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096x4096", "512x4096x4096"])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape in given.shapes:
        M, N, K = map(int, shape.split("x"))
        print(race(M, N, K, given.rounds), flush=True)


if __name__ == "__main__":
    main()
