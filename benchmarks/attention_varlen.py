"""Race attention over packed sequences with torch's own, forward and backward, on this GPU.

Sequences of 77 to 2048 tokens, 8192 together, causal, bf16. Microseconds a call, the median over
alternating rounds, each call on inputs that the L2 does not hold. Forward passes are replays of a
CUDA graph. Torch's are its flash kernels for `cu_seqlens`, flex_attention with a block mask, and
cuDNN, which reads the mask of the packed row.

    python benchmarks/attention_varlen.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from aiter_inductor.cli.timing import ceilings, measure
from aiter_inductor.lowerings.attention_varlen import attention_varlen
from aiter_inductor.lowerings.attention_varlen_backward import (
    attention_varlen_backward,
    attention_varlen_with_lse,
)

LENGTHS = (1024, 300, 2048, 77, 1500, 512, 900, 1831)
HEADS = ((32, 8, 128), (64, 8, 64))
SETS = 3
Run = Callable[..., object]


def starts(device: str = "cuda") -> Tensor:
    """[num_sequences + 1], int32."""
    return torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)


def forward_runs(width: int) -> dict[str, Run]:
    """Ways to compute the result from q, k, v [total, heads, width] and a gradient."""
    cu, longest, how = starts(), max(LENGTHS), _how(width)
    number = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).cuda()
    total = sum(LENGTHS)

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (number[i] == number[j]) & (i >= j)

    blocks = create_block_mask(seen, None, None, total, total, device="cuda")
    mask = (number[:, None] == number) & torch.ones(total, total, device="cuda").tril().bool()
    mask = mask[None, None]
    flex: Any = torch.compile(flex_attention, dynamic=False)

    def of_ours(name: str) -> Run:
        run = attention_varlen.providers[name].run
        return lambda q, k, v, _: run(q, k, v, cu, cu, **how)

    def by_flex(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> object:
        return flex(*map(_heads, (q, k, v)), block_mask=blocks, enable_gqa=True)

    def by_cudnn(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            heads = map(_heads, (q, k, v))
            return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)

    return {
        "cuda": of_ours("cuda"),
        "triton": of_ours("triton"),
        "flash": lambda q, k, v, _: _flash(q, k, v, cu, longest, how["scale"]),
        "flex": by_flex,
        "cuDNN": by_cudnn,
    }


def backward_runs(width: int) -> dict[str, Run]:
    """Ways to compute the gradients of q, k and v, without the forward pass."""
    cu, longest, how = starts(), max(LENGTHS), _how(width)
    kept: dict[tuple[str, int], Any] = {}

    def of_ours(name: str) -> Run:
        forward = attention_varlen_with_lse.providers[name].run
        backward = attention_varlen_backward.providers[name].run

        def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> object:
            key = (name, q.data_ptr())
            if key not in kept:
                kept[key] = forward(q, k, v, cu, cu, **how)
            return backward(grad, q, k, v, *kept[key], cu, cu, **how)

        return run

    def by_flash(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> object:
        key = ("flash", q.data_ptr())
        if key not in kept:
            kept[key] = _flash(q, k, v, cu, longest, how["scale"])
        out, lse, seed, unused, _ = kept[key]
        lengths = (cu, cu, longest, longest)
        backward = torch.ops.aten._flash_attention_backward
        rest = (0.0, True, seed, unused)
        return backward(grad, q, k, v, out, lse, *lengths, *rest, scale=how["scale"])

    return {"cuda": of_ours("cuda"), "triton": of_ours("triton"), "flash": by_flash}


def _how(width: int) -> dict[str, Any]:
    return {"max_seqlen_q": max(LENGTHS), "scale": width**-0.5, "causal": "top_left"}


def _heads(packed: Tensor) -> Tensor:
    """[total, H, D] as [1, H, total, D]."""
    return packed.transpose(0, 1)[None]


def _flash(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> Any:
    """torch's flash kernel over packed sequences: the result and what its backward reads."""
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=scale)


def race(name: str, runs: dict[str, Run], heads: tuple[int, int, int], rounds: int) -> None:
    """Print one line: the fastest first."""
    num_heads, kv_heads, width = heads
    sets = [
        [
            torch.randn(sum(LENGTHS), num, width, device="cuda", dtype=torch.bfloat16)
            for num in (num_heads, kv_heads, kv_heads, num_heads)
        ]
        for _ in range(SETS)
    ]
    variants: dict[str, list[Callable[[], object]]] = {}
    for way, run in runs.items():
        try:
            for given in sets:
                run(*given)
        except RuntimeError as error:
            print(f"  {way}: {str(error).splitlines()[0]}")
            continue
        variants[way] = [lambda run=run, given=given: run(*given) for given in sets]
    timings = measure(variants, torch.device("cuda"), graph=name == "forward", rounds=rounds)
    found = sorted((t.median_us, way) for way, t in timings.items())
    line = ", ".join(f"{way} {us:.1f} us" for us, way in found)
    print(f"{name}, heads {num_heads}/{kv_heads} of {width}: {line}")


def main() -> None:
    """Parse the command line and race."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    found = ceilings(torch.device("cuda"))
    versions = f"torch {torch.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, matmul {found.matmul_tflops:.0f} TFLOP/s")
    for heads in HEADS:
        race("forward", forward_runs(heads[2]), heads, args.rounds)
        race("backward", backward_runs(heads[2]), heads, args.rounds)


if __name__ == "__main__":
    main()
