"""How many kernels one layer of each model launches, under plain Inductor and under this backend.

The difference between a model of two layers and one of one: what surrounds the layers cancels, and
of DeepSeek, whose first layer is dense, one with experts is left. Where layers alternate, the mean
of a pair. Needs a GPU. Each count is taken in a process of a pool: compiling is what takes time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the pool has a process for each core

import torch
from transformers import PreTrainedModel, StaticCache

from aiter_inductor.cli.bench_op import device_work
from aiter_inductor.cli.progress import progress
from aiter_inductor.quantization import quantize_
from tests.models import zoo

BACKENDS = ("inductor", "aiter")
PHASES = {"prefill": (1, 512), "decode": (16, 1)}
"""Batch and tokens of a call; decoding is behind a static cache of `CACHED` tokens."""
CACHED = 256
ALTERNATING = ("gemma2", "gpt_oss")
"""Every second layer attends within a window."""
SIZES: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}
FAMILY_SIZES: Mapping[str, Any] = {
    "head_dim": 128,
    "query_pre_attn_scalar": 128,
    "moe_intermediate_size": 256,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
"""Those of them that the family's configuration has."""
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Case:
    """One row of the table: a family of `tests.models.zoo`, and how its linears are quantised."""

    model: str
    quantised: str = ""

    def __str__(self) -> str:
        return f"{self.model} {self.quantised}".strip()


def build(case: Case, layers: int) -> PreTrainedModel:
    """The family's own classes with random bf16 weights."""
    family = zoo.FAMILIES[case.model].sizes
    own = {name: size for name, size in FAMILY_SIZES.items() if name in family}
    heads = {"num_key_value_heads": SIZES["num_attention_heads"]} if "q_lora_rank" in family else {}
    model = zoo.build(case.model, layers=layers, **{**SIZES, **own, **heads}).to(DEVICE)
    if case.quantised:
        quantize_(model, case.quantised)
    return model


@torch.no_grad()
def launches(case: Case, phase: str, layers: int, backend: str) -> int:
    """Kernels of one call, copies and fills included."""
    torch._dynamo.reset()
    model = build(case, layers)
    ids = zoo.token_ids(*PHASES[phase]).to(DEVICE)
    compiled = torch.compile(model, backend=backend)
    if phase == "decode":
        call = decoding(model, compiled, ids)
    else:
        call = partial(compiled, input_ids=ids, use_cache=False)
    for _ in range(3):
        call()
    return device_work(call, DEVICE).kernels or 0


def decoding(
    model: PreTrainedModel, compiled: Callable[..., object], ids: torch.Tensor
) -> Callable[[], object]:
    """One more token of each sequence at each call; the cache has room for all that are made."""
    cache = StaticCache(config=model.config, max_cache_len=CACHED + 16)
    prompt = zoo.token_ids(len(ids), CACHED).to(DEVICE)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return partial(compiled, input_ids=ids, past_key_values=cache, use_cache=True)


@dataclass(frozen=True)
class Counted:
    """What a layer launches in one phase under one backend, once both counts are there."""

    one: Future[int]
    several: Future[int]
    more: int

    @classmethod
    def ask(cls, pool: ProcessPoolExecutor, case: Case, phase: str, backend: str) -> Counted:
        """Count in a model of one layer and in one of several."""
        more = 2 if case.model in ALTERNATING else 1
        one, several = (
            pool.submit(launches, case, phase, layers, backend) for layers in (1, 1 + more)
        )
        return cls(one, several, more)

    def a_layer(self) -> str:
        """Launches of one layer, or why a count is missing: the other rows are worth having."""
        if problem := self.one.exception() or self.several.exception():
            return f"{type(problem).__name__} {problem}".splitlines()[0][:80]
        return f"{(self.several.result() - self.one.result()) / self.more:g}"


def main() -> None:
    """Print a row for each model: launches of a layer by phase, before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=zoo.REQUIRED, metavar="MODEL")
    parser.add_argument("--quantised", default="", help="a scheme of quantization.quantize_")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="compiling at once")
    arguments = parser.parse_args()
    cases = [Case(model, arguments.quantised) for model in arguments.models]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        asked = {
            case: [[Counted.ask(pool, case, phase, b) for b in BACKENDS] for phase in PHASES]
            for case in cases
        }
        print(f"| model | {' | '.join(PHASES)} |\n|---|{'---|' * len(PHASES)}")
        for case in progress(cases):
            counts = (" → ".join(each.a_layer() for each in pair) for pair in asked[case])
            print(f"| {case} | {' | '.join(counts)} |", flush=True)


if __name__ == "__main__":
    main()
