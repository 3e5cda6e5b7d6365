"""Race the attention kernels with torch's own, forward and backward, on the GPU of this machine.

Prints microseconds a call, the median over alternating rounds, each call on inputs that the L2 does
not hold, and the rate of a large matrix product in the same run. Forward passes are replays of a
CUDA graph; torch's autograd launches backward ones. Where SDPA has no word for what is asked,
flex_attention stands for torch.

    python benchmarks/attention.py
    python benchmarks/attention.py --only backward --width 256 --rounds 10
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from aiter_inductor.cli.timing import ceilings, measure, rotation
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_backward import attention_backward, attention_with_lse

BF16 = torch.bfloat16
TORCH = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Attention of `tokens` queries over as many keys, in bf16."""

    batch: int
    num_heads: int
    num_kv_heads: int
    tokens: int
    qk_dim: int
    v_dim: int
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        kind = "causal" if self.causal else "all keys"
        kind += f", window {self.window}" if self.window else ""
        kind += f", softcap {self.softcap:g}" if self.softcap else ""
        widths = f"{self.qk_dim}/{self.v_dim}"
        heads = f"{self.num_heads}/{self.num_kv_heads}"
        return f"{self.batch}x{self.tokens} heads {heads} of {widths}, {kind}"

    @property
    def scale(self) -> float:
        """On the scores."""
        return float(self.qk_dim**-0.5)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and a gradient of the result."""

        def heads(num: int, width: int) -> Tensor:
            return torch.randn(self.batch, num, self.tokens, width, device="cuda", dtype=BF16)

        keys = heads(self.num_kv_heads, self.qk_dim), heads(self.num_kv_heads, self.v_dim)
        return heads(self.num_heads, self.qk_dim), *keys, heads(self.num_heads, self.v_dim)

    @property
    def how(self) -> dict[str, Any]:
        """Keywords of the ops."""
        causal = "top_left" if self.causal else "none"
        options = {"window": self.window, "softcap": self.softcap}
        return {"scale": self.scale, "causal": causal, **options}

    def flops(self, backward: bool) -> float:
        """Two products over the pairs that are seen, five backward."""
        widths = 3 * self.qk_dim + 2 * self.v_dim if backward else self.qk_dim + self.v_dim
        pairs = self.tokens**2 / (2 if self.causal else 1)
        if self.window:
            pairs -= max(self.tokens - self.window, 0) ** 2 / 2
        return 2 * self.batch * self.num_heads * pairs * widths


FORWARD = (
    Shape(1, 128, 128, 4096, 192, 128),
    Shape(2, 32, 8, 4096, 128, 128),
    Shape(2, 16, 16, 8192, 128, 128, causal=False),
    Shape(2, 64, 8, 4096, 64, 64),
    Shape(2, 16, 16, 4096, 256, 256),
    Shape(1, 32, 8, 1024, 128, 128),
)
BACKWARD = (
    Shape(2, 32, 8, 4096, 128, 128),
    Shape(2, 16, 16, 4096, 128, 128),
    Shape(2, 16, 16, 4096, 128, 128, causal=False),
    Shape(1, 32, 8, 16384, 128, 128),
    Shape(2, 64, 8, 4096, 64, 64),
    Shape(2, 32, 32, 4096, 64, 64, causal=False),
    Shape(1, 128, 128, 4096, 192, 128),
    Shape(2, 16, 16, 4096, 256, 256),
    Shape(1, 16, 8, 4096, 256, 256, softcap=50.0),
    Shape(1, 16, 8, 8192, 256, 256, window=4096, softcap=50.0),
    Shape(1, 16, 8, 4096, 256, 256, window=1024),
    Shape(1, 32, 16, 4096, 128, 128, softcap=50.0),
    Shape(1, 64, 8, 4096, 64, 64, window=128),
    Shape(4, 32, 8, 1024, 128, 128),
    Shape(1, 32, 8, 512, 128, 128),
    Shape(16, 12, 12, 512, 64, 64, causal=False),
)


def forward_runs(shape: Shape) -> Iterator[tuple[str, Callable[..., object]]]:
    """Ways to compute the result from q, k and v, those that run."""
    for name in ("cuda", "triton"):
        run = attention.providers[name].run
        yield name, lambda q, k, v, _, run=run: run(q, k, v, **shape.how)
    for name, theirs in torchs_own(shape).items():
        yield name, lambda q, k, v, _, theirs=theirs: theirs(q, k, v)


def backward_runs(shape: Shape) -> Iterator[tuple[str, Callable[..., object]]]:
    """Ways to compute the gradients of q, k and v, without the forward pass."""
    how = shape.how
    kept: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    def ours(provider: str) -> Callable[..., object]:
        def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> object:
            key = (provider, q.data_ptr())
            if key not in kept:
                kept[key] = attention_with_lse.providers[provider].run(q, k, v, **how)
            made = attention_backward.providers[provider]
            return made.run(grad, q, k, v, *kept[key], **how)

        return run

    def of_torch(name: str, theirs: Callable[..., Tensor]) -> Callable[..., object]:
        def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> object:
            key = (name, q.data_ptr())
            if key not in kept:
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                kept[key] = (*leaves, theirs(*leaves))
            *leaves, out = kept[key]
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        return run

    for name in ("cuda", "triton"):
        yield name, ours(name)
    for name, theirs in torchs_own(shape).items():
        yield name, of_torch(name, theirs)


def torchs_own(shape: Shape) -> dict[str, Callable[..., Tensor]]:
    """SDPA by its kernels, or flex_attention where SDPA has no word for it, of q, k and v."""
    if shape.window is not None or shape.softcap is not None:
        return {"flex": flex(shape)}
    grouped = shape.num_heads != shape.num_kv_heads

    def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=shape.causal, scale=shape.scale, enable_gqa=grouped
                )

        return run

    return {name: sdpa(backend) for name, backend in TORCH.items()}


def flex(shape: Shape) -> Callable[..., Tensor]:
    """flex_attention, compiled, with the mask in blocks and the cap as a change of scores."""

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        behind = i - j < (shape.window or shape.tokens)
        return (i >= j) & behind if shape.causal else behind

    def capped(score: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
        cap = shape.softcap or 1.0
        return cap * torch.tanh(score / cap)

    blocks = create_block_mask(seen, None, None, shape.tokens, shape.tokens, device="cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {"block_mask": blocks, "scale": shape.scale, "enable_gqa": True}
    if shape.softcap is not None:
        options["score_mod"] = capped
    return lambda q, k, v: compiled(q, k, v, **options)  # type: ignore[no-any-return]


def race(shape: Shape, backward: bool, rounds: int, matmul_tflops: float) -> None:
    """Print one line a way, the fastest first."""
    device = torch.device("cuda")
    sets = [shape.inputs() for _ in range(rotation(4.0 * shape.inputs()[0].nbytes, device))]
    runs = backward_runs(shape) if backward else forward_runs(shape)
    variants: dict[str, list[Run]] = {}
    for name, run in runs:
        try:
            for given in sets:
                run(*given)
        except (RuntimeError, ValueError) as error:
            print(f"  {name}: {str(error).splitlines()[0]}")
            continue
        variants[name] = [lambda run=run, given=given: run(*given) for given in sets]
    timings = measure(variants, device, graph=not backward, rounds=rounds)
    flops = shape.flops(backward)
    floor = flops / matmul_tflops / 1e6
    print(f"{'backward' if backward else 'forward'} {shape}: floor {floor:.0f} us")
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median_us):
        us = timing.median_us
        print(f"  {name:8} {us:8.1f} us ±{timing.spread:.1%}  {flops / us / 1e6:5.0f} TFLOP/s")


def main() -> None:
    """Parse the command line and race."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("forward", "backward"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--width", type=int, nargs="*", help="of queries; all if left out")
    args = parser.parse_args()
    found = ceilings(torch.device("cuda"))
    versions = f"torch {torch.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, matmul {found.matmul_tflops:.0f} TFLOP/s")
    for backward, shapes in ((False, FORWARD), (True, BACKWARD)):
        if args.only in (None, "backward" if backward else "forward"):
            for shape in (s for s in shapes if not args.width or s.qk_dim in args.width):
                race(shape, backward, args.rounds, found.matmul_tflops)


if __name__ == "__main__":
    main()
