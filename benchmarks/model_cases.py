"""One model on the CPU: eager, plain Inductor and this backend in one process.

Run by models_cpu, a process for each case, so that one failure or one model's memory touches no
other. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel

import aiter_inductor
from aiter_inductor.cli.bench_model import summary
from aiter_inductor.quantization import quantize_
from tests.models import zoo

VARIANTS = ("eager", "inductor", "aiter")
COMPILED = VARIANTS[1:]
PHASES = ("prefill", "decode", "train")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024}
FAMILY_SIZES = {
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "moe_intermediate_size": 128,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
"""Those of them that the family's configuration has."""
MIN_RUN_S = 0.02
"""A measurement repeats its call until this much time has passed: 1e5 times the clock's step."""
MIN_ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """What to measure.

    Attributes:
        model: a family of `tests.models.zoo`.
        phase: `prefill` without a cache; `decode` of one token behind a filled DynamicCache; or
            `train`: forward, backward and an AdamW step.
        dtype: of the weights, as torch names it.
        layers: decoder layers.
        batch, length: of the prompt, of the training text, or of what fills the cache.
        quantised: a scheme of `quantization.quantize_` for its linears, or empty.
        seconds: to spend on rounds of timing.
    """

    model: str
    phase: str
    dtype: str = "bfloat16"
    layers: int = 2
    batch: int = 1
    length: int = 256
    quantised: str = ""
    seconds: float = 12.0

    def __str__(self) -> str:
        named = (self.model, self.phase, f"{self.batch}x{self.length}", self.dtype, self.quantised)
        return " ".join(filter(None, named))


@dataclass(frozen=True)
class Outcome:
    """The numbers of one case; errors are Frobenius distances over the reference's norm.

    Attributes:
        ratio: time over plain Inductor's, the median of paired rounds.
        low, high: the interval that holds that median with 95 % confidence.
        rounds: how many pairs there were.
        median_ms: per variant.
        error: of each compiled variant against eager.
        exact_error: of every variant against float32 eager with the same weights.
        peak_mb: what a call allocates beyond what it found, at its peak; training only.
        sites: what this backend did.
    """

    ratio: float
    low: float
    high: float
    rounds: int
    median_ms: Mapping[str, float]
    error: Mapping[str, float]
    exact_error: Mapping[str, float]
    peak_mb: Mapping[str, float]
    sites: str


Run = Callable[[], dict[str, torch.Tensor]]


def measure(case: Case) -> Outcome:
    """Compile, compare and time all variants of `case`."""
    model = build(case, getattr(torch, case.dtype))
    runs = {name: program(case, model, name) for name in VARIANTS}
    outputs = {name: run() for name, run in runs.items()}
    exact_model = copy.deepcopy(model).float()
    exact = program(case, exact_model, "eager")()
    for name in COMPILED:
        runs[name]()  # whatever a second call compiles anew, before the clock starts
    peaks = {n: peak_bytes(run) / 2**20 for n, run in runs.items()} if case.phase == "train" else {}
    latencies = alternate({name: runs[name] for name in COMPILED}, case.seconds)
    eager = [clock(runs["eager"], 1) for _ in range(3)]
    ratios = [a / b for a, b in zip(latencies["aiter"], latencies["inductor"], strict=True)]
    low, high = interval(ratios)
    return Outcome(
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        rounds=len(ratios),
        median_ms={
            name: 1e3 * statistics.median(found)
            for name, found in {"eager": eager, **latencies}.items()
        },
        error={name: distance(outputs[name], outputs["eager"]) for name in COMPILED},
        exact_error={name: distance(outputs[name], exact) for name in VARIANTS},
        peak_mb=peaks,
        sites=summary(REPORTS["aiter"]()),
    )


REPORTS: dict[str, Callable[[], aiter_inductor.Report]] = {}


def build(case: Case, dtype: torch.dtype) -> PreTrainedModel:
    """The case's model: real classes, 4 heads of 64 at hidden size 256, random weights."""
    family = zoo.FAMILIES[case.model].sizes
    own = {name: size for name, size in FAMILY_SIZES.items() if name in family}
    model = zoo.build(case.model, dtype=dtype, layers=case.layers, **SIZES, **own)
    if case.quantised:
        quantize_(model, case.quantised)
    return model


def program(case: Case, model: PreTrainedModel, variant: str) -> Run:
    """One call of the case under `variant`; returns named results to compare."""
    if case.phase == "train":
        return training(case, model, variant)
    ids = zoo.token_ids(case.batch, case.length)
    forward = compiled(model, variant)
    if case.phase == "decode":
        return decoding(model, forward, ids)

    @torch.no_grad()
    def prefill() -> dict[str, torch.Tensor]:
        return {"logits": forward(input_ids=ids, use_cache=False).logits}

    return prefill


def decoding(model: PreTrainedModel, forward: Callable[..., Any], ids: torch.Tensor) -> Run:
    """One token behind a cache that every call finds as the prompt left it."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    filled = [dict(vars(layer)) for layer in cache.layers]
    token = ids[:, -1:]

    @torch.no_grad()
    def decode() -> dict[str, torch.Tensor]:
        for layer, state in zip(cache.layers, filled, strict=True):
            vars(layer).update(state)
        return {"logits": forward(input_ids=token, past_key_values=cache, use_cache=True).logits}

    return decode


def training(case: Case, model: PreTrainedModel, variant: str) -> Run:
    """A step on a copy of the model; gradients and loss are the results."""
    own = copy.deepcopy(model).train()
    ids = zoo.token_ids(case.batch, case.length)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6)
    forward = compiled(own, variant)

    def step() -> dict[str, torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found = {n: p.grad for n, p in own.named_parameters() if p.grad is not None}
        optimizer.step()
        return {"loss": loss.detach(), **found}

    return step


def compiled(model: PreTrainedModel, variant: str) -> Callable[..., Any]:
    """`model` under one of `VARIANTS`."""
    if variant == "eager":
        return model
    made = torch.compile(model, backend=variant)
    REPORTS[variant] = lambda: aiter_inductor.report(made)
    return made


def distance(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """The largest relative Frobenius distance among the results; NaN where one is missing."""
    if found.keys() != wanted.keys():
        return float("nan")
    pairs = [(found[name].double(), wanted[name].double()) for name in wanted]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


def alternate(runs: Mapping[str, Run], seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each variant, round by round, the order of the two turned each time."""
    repeats = max(1, round(MIN_RUN_S / min(clock(run, 1) for run in runs.values())))
    found: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(found["aiter"]) < MIN_ROUNDS:
        turned = len(found["aiter"]) % 2
        for name in reversed(runs) if turned else runs:
            found[name].append(clock(runs[name], repeats))
    gc.enable()
    return found


def clock(run: Run, repeats: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Order statistics that hold the median with 95 % confidence; the binomial taken as normal."""
    ordered, n = sorted(ratios), len(ratios)
    reach = 0.98 * n**0.5
    low, high = int(n / 2 - reach), int(n / 2 + reach)
    return ordered[max(low, 0)], ordered[min(high, n - 1)]


def peak_bytes(run: Run) -> int:
    """The most memory a call has allocated at once beyond what was there, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main() -> None:
    """Measure the case given as JSON and print the outcome as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", help='such as {"model": "llama", "phase": "prefill"}')
    case = Case(**json.loads(parser.parse_args().case))
    print(json.dumps(dataclasses.asdict(measure(case))))


if __name__ == "__main__":
    main()
