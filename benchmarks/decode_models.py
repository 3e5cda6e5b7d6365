"""One token of whole models after a long prompt, under this backend and plain Inductor.

    python benchmarks/decode_models.py llama-3-8b:static llama-3-8b:dynamic deepseek-v3:dynamic
    python benchmarks/decode_models.py llama-3-8b:static --batch 64 --without rope_into_cache
    python benchmarks/decode_models.py small-qwen3:static --device cpu --batch 2 --cached 64

A model of `aiter_inductor/cli/models.py` and the kind of its cache, which is filled once and put
back to that length before every step. Steps are timed as calls and, where they can be captured, as
replays of CUDA graphs; all versions take turns. `--without` adds one that leaves something out, and
`--mode reduce-overhead` has the compilers make the graphs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import aiter_inductor
from aiter_inductor.cli import models
from aiter_inductor.cli.bench_model import summary
from aiter_inductor.cli.bench_op import error
from aiter_inductor.cli.timing import Call, measure, ratio

CHUNK = 512
"""Tokens of the prompt at once: eager attention holds the scores of so many queries."""
ROOM = 64
"""Tokens that a static cache holds beyond the prompt."""


def filled_cache(model: PreTrainedModel, prompt: Tensor, kind: str) -> Any:
    """A cache that holds `prompt` [batch, tokens], `dynamic` or `static`."""
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + ROOM)
    for start in range(0, prompt.shape[1], CHUNK):
        model.model(
            input_ids=prompt[:, start : start + CHUNK], past_key_values=cache, use_cache=True
        )
    return cache


def as_filled(model: PreTrainedModel, cache: Any) -> Callable[[], Any]:
    """A function that gives the cache at its present length, however steps moved it on.

    Layers with a window shift their rows in a static cache: those hold the steps' tokens then.
    """
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    lengths = [getattr(layer, "cumulative_length", None) for layer in cache.layers]
    filled = [n.clone() if isinstance(n, Tensor) else n for n in lengths]

    def static() -> Any:
        for layer, length, before in zip(cache.layers, lengths, filled, strict=True):
            if isinstance(length, Tensor):
                length.copy_(before)
            elif length is not None:
                layer.cumulative_length = length
        return cache

    def dynamic() -> Any:
        again = DynamicCache(config=model.config)
        for layer, (keys, values), length in zip(again.layers, kept, filled, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if length is not None:
                layer.cumulative_length = length
        return again

    return static if isinstance(cache, StaticCache) else dynamic


@torch.no_grad()
def measure_decoding(name: str, kind: str, args: argparse.Namespace) -> None:
    """Print what took attention, errors against eager, and both times."""
    device = torch.device(args.device)
    torch._dynamo.reset()
    model = models.build(name, device=device)
    prompt = models.token_ids(model, args.batch, args.cached, device=device)
    token = models.token_ids(model, args.batch, 1, device=device, seed=1)
    cache = as_filled(model, filled_cache(model, prompt, kind))

    def step(run: Callable[..., Any]) -> Tensor:
        logits: Tensor = run(input_ids=token, past_key_values=cache(), use_cache=True).logits
        return logits

    runs = {b: torch.compile(model, backend=b, mode=args.mode) for b in ("aiter", "inductor")}
    if args.without:
        options: dict[str, Any] = {"aiter.disable": [args.without]}
        if args.mode:
            options |= torch._inductor.list_mode_options(args.mode)
        left_out = torch.compile(model, backend="aiter", options=options)
        runs[f"aiter without {args.without}"] = left_out
    wanted = step(model)
    errors = {"aiter": error(step(runs["aiter"]), wanted)}
    report = aiter_inductor.report(model)
    errors |= {b: error(step(run), wanted) for b, run in runs.items() if b != "aiter"}
    calls: dict[str, list[Call]] = {b: [partial(step, run)] for b, run in runs.items()}
    takers = {s.provider for s in report.sites if s.pattern in ("attention", "mla_decode")}
    print(f"{name}, {kind} cache, batch {args.batch}, {args.cached} cached: {summary(report)}")
    print(f"  attention by {takers}; errors {errors}")
    for graph in (False, True) if device.type == "cuda" and not args.mode else (False,):
        try:
            timings = measure(calls, device, rounds=args.rounds, graph=graph)
        except RuntimeError as failure:
            print(f"  no CUDA graph: {failure}")
            continue
        times = ", ".join(f"{b} {t.median_us:.0f} us" for b, t in timings.items())
        others = ((b, ratio(timings["aiter"], t)) for b, t in timings.items() if b != "aiter")
        against = ", ".join(f"aiter / {b} {value:.3f}" for b, value in others)
        print(f"  {'graphs' if graph else 'calls'}: {times}, {against}")


def main() -> None:
    """Measure every case that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", help="MODEL:dynamic or MODEL:static")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mode", help="torch.compile's, of all versions")
    parser.add_argument("--without", help="a pattern that one more version does not use")
    for option, default in (("batch", 8), ("cached", 4096), ("rounds", 15)):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args()
    for case in args.cases:
        measure_decoding(*case.split(":"), args)


if __name__ == "__main__":
    main()
