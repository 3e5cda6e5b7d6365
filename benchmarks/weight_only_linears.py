"""Linears whose weight alone is quantised, against Inductor's code of the same module.

    python benchmarks/weight_only_linears.py --schemes fp8 int4 int8 --rows 1 16 64 256 4096

The layers are `quantize_`'s plain PyTorch modules, each with weights of its own so that every call
reads them from memory; calls are replayed from a CUDA graph. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import aiter_inductor
from aiter_inductor.cli.timing import measure, ratio

COPIES = 6
"""Layers that take turns: of 4096 x 4096 in int4 together as large as an H100's L2."""


def layers_of(scheme: str, N: int, K: int) -> list[nn.Module]:
    """The layers, alike but for their weights."""
    torch.manual_seed(0)
    on = {"bias": False, "dtype": torch.bfloat16, "device": "cuda"}
    plain = nn.Sequential(*(nn.Linear(K, N, **on) for _ in range(COPIES)))
    return list(aiter_inductor.quantize_(plain, f"{scheme}_weight_only"))


def called(layer: nn.Module, buffers: dict[str, Tensor], x: Tensor) -> Any:
    """The layer with other buffers: one graph serves all copies."""
    return torch.func.functional_call(layer, buffers, (x,))


def race(scheme: str, layers: list[nn.Module], M: int, rounds: int, *, dynamic: bool) -> str:
    """One line: microseconds of both, their ratio, and how far the results are apart."""
    torch._dynamo.reset()
    N, K = layers[0].out_features, layers[0].in_features
    calls: dict[str, list[Callable[[], Any]]] = {}
    results = []
    for name, backend in {"inductor": "inductor", "aiter": aiter_inductor.aiter}.items():
        run = torch.compile(
            functools.partial(called, layers[0]), backend=backend, dynamic=dynamic or None
        )
        inputs = []
        for number, layer in enumerate(layers):
            generator = torch.Generator("cuda").manual_seed(number)
            x = torch.randn(M, K, device="cuda", generator=generator).to(torch.bfloat16)
            if dynamic:
                torch._dynamo.mark_dynamic(x, 0)
            inputs.append((dict(layer.named_buffers()), x))
        results.append(run(*inputs[0]).float())
        calls[name] = [functools.partial(run, *given) for given in inputs]
    found = measure(calls, torch.device("cuda"), graph=True, rounds=rounds)
    apart = float((results[1] - results[0]).norm() / results[0].norm())
    shown = ", ".join(f"{name} {timing.median_us:.1f} us" for name, timing in found.items())
    share = ratio(found["aiter"], found["inductor"])
    opened = " open" if dynamic else ""
    return f"{scheme} {M}{opened}x{N}x{K}: {shown}, ratio {share:.2f}, results {apart:.1e} apart"


@torch.no_grad()
def main() -> None:
    """Race every scheme, weight and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", default=["fp8", "int4", "int8"])
    parser.add_argument("--weights", nargs="+", default=["4096x4096", "12288x4096"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 4096])
    parser.add_argument("--dynamic", action="store_true", help="with the number of rows open")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for scheme in given.schemes:
        for shape in given.weights:
            N, K = map(int, shape.split("x"))
            layers = layers_of(scheme, N, K)
            for M in given.rows:
                print(race(scheme, layers, M, given.rounds, dynamic=given.dynamic), flush=True)


if __name__ == "__main__":
    main()
