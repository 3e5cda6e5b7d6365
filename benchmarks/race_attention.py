"""Race the flash kernel's launch parameters on the GPU at hand against torch's own attention.

    python benchmarks/race_attention.py             # every shape
    python benchmarks/race_attention.py gqa window  # some
    python benchmarks/race_attention.py --defaults  # of the launch parameters, the default ones

A line each: microseconds (median of 3 rounds of 10 calls) and TFLOP/s over the pairs that are seen.
Results are compared with the op's reference before they are timed, at 512 tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from aiter_inductor.kernels.triton.attention import AttentionConfig, attention
from aiter_inductor.lowerings.attention import attention as op

CALLS, ROUNDS = 10, 3
WINDOW, SOFTCAP = 128, 50.0
CONFIGS = tuple(
    AttentionConfig(*sizes)
    for sizes in (
        (64, 32, 4, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 3),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 3),
    )
)


@dataclass(frozen=True)
class Race:
    """Causal attention of bf16 heads at one shape."""

    batch: int
    num_heads: int
    num_kv_heads: int
    qk_dim: int
    v_dim: int
    how: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False
    num_tokens: int = 4096

    def inputs(self, num_tokens: int) -> tuple[Any, ...]:
        """q, k, v, no mask, sinks or None."""
        shapes = (
            (self.num_heads, self.qk_dim),
            (self.num_kv_heads, self.qk_dim),
            (self.num_kv_heads, self.v_dim),
        )
        generator = torch.Generator("cuda").manual_seed(0)
        like: dict[str, Any] = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
        heads = (torch.randn(self.batch, H, num_tokens, D, **like) for H, D in shapes)
        return *heads, None, torch.randn(self.num_heads, **like) if self.sinks else None

    def keywords(self) -> dict[str, Any]:
        """Of the op."""
        return {"scale": self.qk_dim**-0.5, "causal": "top_left", **self.how}

    def flops(self) -> int:
        """Both products over the pairs that are seen."""
        window = self.how.get("window", self.num_tokens)
        pairs = sum(min(i + 1, window) for i in range(self.num_tokens))
        return 2 * self.batch * self.num_heads * pairs * (self.qk_dim + self.v_dim)


RACES = {
    "mla": Race(1, 128, 128, 192, 128),
    "gqa": Race(2, 32, 8, 128, 128),
    "narrow": Race(1, 32, 8, 64, 64),
    "window": Race(1, 64, 8, 64, 64, {"window": WINDOW}, sinks=True),
    "softcap": Race(1, 16, 8, 256, 256, {"softcap": SOFTCAP}),
    "softcap_window": Race(1, 16, 8, 256, 256, {"softcap": SOFTCAP, "window": 4096}, False, 8192),
    "wide_window": Race(1, 8, 4, 256, 256, {"window": 1024}),
    "long_window": Race(1, 32, 8, 128, 128, {"window": 4096}, False, 8192),
    "sinks": Race(1, 64, 8, 64, 64, {"window": 4096}, sinks=True),
}


def torchs_own(race: Race) -> Callable[..., Tensor]:
    """SDPA, or flex_attention where SDPA has no word for it; sinks scale flex's result."""
    if not race.how:
        return lambda q, k, v, mask, sinks: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < race.how.get("window", race.num_tokens))

    def capped(score: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    blocks = create_block_mask(seen, None, None, race.num_tokens, race.num_tokens, device="cuda")
    flex: Any = torch.compile(flex_attention, dynamic=False)
    score_mod = capped if "softcap" in race.how else None

    def run(q: Tensor, k: Tensor, v: Tensor, mask: None, sinks: Tensor | None) -> Tensor:
        how = {"score_mod": score_mod, "block_mask": blocks, "enable_gqa": True}
        if sinks is None:
            return flex(q, k, v, **how)  # type: ignore[no-any-return]
        out, lse = flex(q, k, v, return_lse=True, **how)
        kept = torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)
        return out * kept  # type: ignore[no-any-return]

    return run


def lines(race: Race, only_defaults: bool) -> Iterator[tuple[float, str]]:
    """Microseconds and name of torch's own, the CUDA kernel and each Triton config."""
    inputs, few, how = race.inputs(race.num_tokens), race.inputs(512), race.keywords()
    own = torchs_own(race)
    yield time_us(lambda: own(*inputs)), "torch"
    if torch.cuda.get_device_capability() == (9, 0) and not torch.version.hip:
        run = op.providers["cuda"].run
        yield time_us(lambda: run(*inputs, **how)), "cuda"
    expected = op.reference(*few, **how).float()
    for config in (None, *(() if only_defaults else CONFIGS)):
        error = (attention(*few, **how, config=config).float() - expected).abs().max().item()
        assert error < 0.02, f"{config} is wrong by {error:g}"
        us = time_us(lambda config=config: attention(*inputs, **how, config=config))
        yield us, "default" if config is None else str(config)


def time_us(call: Callable[[], Any]) -> float:
    """The median over rounds of the mean over calls."""
    call()
    rounds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        rounds.append(start.elapsed_time(end) * 1e3 / CALLS)
    return sorted(rounds)[ROUNDS // 2]


def main() -> None:
    """Run the races named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("races", nargs="*", metavar="RACE", help=f"of {', '.join(RACES)}")
    parser.add_argument("--defaults", action="store_true", help="no other launch parameters")
    args = parser.parse_args()
    if unknown := set(args.races) - RACES.keys():
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(RACES)}")
    print(torch.cuda.get_device_name(), torch.__version__)
    for name in args.races or RACES:
        race = RACES[name]
        print(f"{name}: {race}")
        for us, label in sorted(lines(race, args.defaults)):
            print(f"  {us:9.1f} us {race.flops() / us / 1e6:6.0f} TFLOP/s  {label}")


if __name__ == "__main__":
    main()
