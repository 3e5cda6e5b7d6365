"""Four documents packed in a row: whole layers and attention alone, forward and backward.

    python benchmarks/packed_documents.py --tokens 4096 8192

Layers of Llama-3-8B's shape are called as transformers is for packed rows, with `position_ids` that
begin anew and no mask; plain Inductor reads the mask [1, 1, S, S] that transformers builds. Then
attention alone on the same documents: SDPA with that mask as Inductor compiles it, and the op with
the first key of every query.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import aiter_inductor
from aiter_inductor.cli import models
from aiter_inductor.cli.bench_op import error
from aiter_inductor.cli.timing import measure, ratio
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_backward import attention_backward, attention_with_lse

SHARES = (0.25, 0.17, 0.37, 0.21)
"""How the tokens of a row are divided."""
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SETS = 3


def positions(num_tokens: int) -> Tensor:
    """[1, num_tokens]: 0, 1, ... of each document."""
    lengths = [int(share * num_tokens) for share in SHARES[:-1]]
    lengths.append(num_tokens - sum(lengths))
    return torch.cat([torch.arange(n) for n in lengths])[None].cuda()


def measure_layers(num_tokens: int, layers: int, rounds: int) -> None:
    """Print what a forward pass and one with gradients take."""
    torch._dynamo.reset()
    model = models.build("llama-3-8b", device=torch.device("cuda"), layers=layers).model
    embedded = torch.randn(1, num_tokens, 4096, device="cuda", dtype=torch.bfloat16)
    directions = torch.randn_like(embedded)
    at = positions(num_tokens)
    runs = {name: torch.compile(model, backend=name) for name in ("inductor", "aiter")}

    def forward(name: str) -> Tensor:
        with torch.no_grad():
            found: Tensor = runs[name](
                inputs_embeds=embedded, position_ids=at, use_cache=False
            ).last_hidden_state
        return found

    def step(name: str) -> Tensor:
        model.zero_grad(set_to_none=True)
        out = runs[name](inputs_embeds=embedded, position_ids=at, use_cache=False)
        # Not a mean of squares: behind a norm that is 1 whatever the weights.
        (out.last_hidden_state * directions).sum().backward()
        found: Tensor | None = model.layers[0].self_attn.q_proj.weight.grad
        assert found is not None
        return found

    for title, run in (("forward", forward), ("forward and backward", step)):
        results = {name: run(name).clone() for name in runs}
        sites = [s for s in aiter_inductor.report(runs["aiter"]).sites if s.pattern == "attention"]
        taken = {f"{site.fused_into} by {site.provider}" for site in sites}
        timings = measure({n: [partial(run, n)] for n in runs}, embedded.device, rounds=rounds)
        times = ", ".join(f"{name} {t.median_us:.0f} us" for name, t in timings.items())
        print(f"{num_tokens} tokens, {layers} layers, {title}: {times}, inductor / aiter "
              f"{1 / ratio(timings['aiter'], timings['inductor']):.2f}; {taken}; apart "
              f"{error(results['aiter'], results['inductor']):.1e}")  # fmt: skip


def measure_attention(num_tokens: int, rounds: int) -> None:
    """Print attention alone, replayed, and its backward pass, launched call by call."""
    at = positions(num_tokens)
    number = (at == 0).cumsum(-1)
    seen = number[:, None, :, None] == number[:, None, None, :]
    seen = seen & torch.ones(num_tokens, num_tokens, dtype=torch.bool, device="cuda").tril()
    first_keys = torch.searchsorted(number, number, out_int32=True)
    how = {"scale": HEAD_DIM**-0.5, "causal": "top_left"}

    def heads(count: int) -> Tensor:
        rows = torch.randn(1, num_tokens, count, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        return rows.transpose(1, 2)

    sets = [(heads(HEADS), heads(KV_HEADS), heads(KV_HEADS), heads(HEADS)) for _ in range(SETS)]

    @partial(torch.compile, dynamic=False)
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def ours(name: str) -> Callable[..., object]:
        run = attention.providers[name].run
        return lambda q, k, v, _: run(q, k, v, None, None, first_keys, **how)

    forward: dict[str, Callable[..., object]] = {name: ours(name) for name in ("cuda", "triton")}
    forward["inductor, mask"] = lambda q, k, v, _: masked(q, k, v)
    print(f"{num_tokens} tokens, attention: {timed(forward, sets, rounds, graph=True)}")

    saved = [attention_with_lse(*each[:3], None, None, first_keys, **how) for each in sets]
    backward: dict[str, Callable[..., object]] = {}
    for name in ("cuda", "triton"):
        run = attention_backward.providers[name].run
        backward[name] = lambda q, k, v, grad, out, lse, run=run: run(
            grad, q, k, v, out, lse, None, None, None, first_keys, **how
        )
    leaves = [[x.detach().requires_grad_() for x in each[:3]] for each in sets]
    outs = {each[0].data_ptr(): masked(*leaf) for each, leaf in zip(sets, leaves, strict=True)}
    of = {each[0].data_ptr(): leaf for each, leaf in zip(sets, leaves, strict=True)}
    backward["inductor, mask"] = lambda q, k, v, grad, out, lse: torch.autograd.grad(
        outs[q.data_ptr()], of[q.data_ptr()], grad, retain_graph=True
    )
    given = [(*each, *both) for each, both in zip(sets, saved, strict=True)]
    print(f"{num_tokens} tokens, backward: {timed(backward, given, rounds, graph=False)}")


def timed(
    runs: dict[str, Callable[..., object]],
    sets: list[tuple[Tensor, ...]],
    rounds: int,
    *,
    graph: bool,
) -> str:
    """The median of each."""
    calls = {name: [partial(run, *each) for each in sets] for name, run in runs.items()}
    with torch.set_grad_enabled(not graph):
        timings = measure(calls, torch.device("cuda"), graph=graph, rounds=rounds)
    return ", ".join(f"{name} {t.median_us:.1f} us" for name, t in timings.items())


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for num_tokens in args.tokens:
        measure_attention(num_tokens, args.rounds)
        measure_layers(num_tokens, args.layers, args.rounds)


if __name__ == "__main__":
    main()
