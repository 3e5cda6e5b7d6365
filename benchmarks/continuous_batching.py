"""Continuous batching of a Llama-3-8B-shaped model by transformers, with each of its attentions.

    python benchmarks/continuous_batching.py --layers 8 --requests 64 --prompt 1024 --new 64
    python benchmarks/continuous_batching.py --profile "aiter, graphs" --requests 32

Each line gives the tokens generated a second from the first request to the last result, prefill
included, by a manager that has served before: greedy decoding with random weights in bf16, prompts
of half to all of `--prompt` tokens; and the part of the tokens that are those of the first line.
Nothing is kept of prompts between rounds. `aiter` is this package's attention; names after it say
whether batches are captured in CUDA graphs, which transformers does by default where an attention
needs no masks, preparing a batch while another runs, and whether decoding batches are handed tables
of pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig

from aiter_inductor import continuous_batching

PAGE_SIZE = 16
AITER = ["aiter", "aiter, graphs", "aiter, graphs, tables"]


def model_of(layers: int) -> Any:
    """Random weights in the shapes of Llama-3-8B."""
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=32000,
        max_position_embeddings=16384,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


@contextmanager
def serving(
    model: Any, prompts: list[list[int]], new_tokens: int, label: str
) -> Iterator[Callable[[list[list[int]]], list[list[int]]]]:
    """A manager with room for all prompts, as a function that generates from some of them."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    pages = sum(-(-(len(prompt) + new_tokens) // PAGE_SIZE) + 1 for prompt in prompts)
    batching = ContinuousBatchingConfig(
        **{"page_size" if "page_size" in known else "block_size": PAGE_SIZE},
        **({"auto_switch_to_flash": False} if "auto_switch_to_flash" in known else {}),
        num_blocks=pages,
        max_batch_tokens=2048,
        max_requests_per_batch=len(prompts),
        use_cuda_graph="graphs" in label,
        allow_block_sharing=False,
    )
    greedy = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    choose(model, label)
    manager = model.init_continuous_batching(
        generation_config=greedy, continuous_batching_config=batching
    )
    if "tables" in label:
        continuous_batching.hand_over_tables(manager, max(map(len, prompts)) + new_tokens)
    manager.start()

    def generate(asked: list[list[int]]) -> list[list[int]]:
        names, found = manager.add_requests(asked), dict[str, list[int]]()
        while len(found) < len(names):
            result = manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(f"{len(found)} of {len(names)} requests: {result}")
            if result.is_finished():
                found[result.request_id] = result.generated_tokens
        return [found[name] for name in names]

    try:
        yield generate
    finally:
        manager.stop(block=True)


def choose(model: Any, label: str) -> None:
    """Let the model attend as the label says."""
    if label in AITER:
        continuous_batching.enable(model)
    else:
        model.set_attn_implementation(label)


def profiled(model: Any, label: str, prompts: list[list[int]], new_tokens: int) -> str:
    """Where the time goes: kernels and operators, by their time on the GPU."""
    with serving(model, prompts, new_tokens, label) as generate:
        generate(prompts)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            generate(prompts)
    return found.key_averages().table("cuda_time_total", row_limit=40, max_name_column_width=60)


def measured(
    model: Any, label: str, prompts: list[list[int]], new_tokens: int, rounds: int
) -> tuple[list[list[int]], float]:
    """The tokens, and those generated a second, the median of the rounds.

    Graphs are captured by a round before; without them a few requests are warm-up enough.
    """
    seconds = []
    with serving(model, prompts, new_tokens, label) as generate:
        generate(prompts if "graphs" in label else prompts[:2])
        for _ in range(rounds):
            torch.cuda.synchronize()
            started = time.perf_counter()
            tokens = generate(prompts)
            seconds.append(time.perf_counter() - started)
    return tokens, sum(map(len, tokens)) / statistics.median(seconds)


def main() -> None:
    """Measure every attention on the same prompts."""
    known = AttentionInterface().valid_keys()
    sdpa = "paged|sdpa" if "paged|sdpa" in known else "sdpa"
    labels = [sdpa, "paged|eager", *AITER]
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 8), ("requests", 64), ("prompt", 1024), ("new", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", action="append", choices=labels, help="some of the attentions")
    parser.add_argument("--profile", choices=labels, help="print where the time goes instead")
    options = parser.parse_args()
    model = model_of(options.layers)
    lengths = torch.linspace(options.prompt // 2, options.prompt, options.requests).int().tolist()
    prompts = [torch.randint(0, 32000, (length,)).tolist() for length in lengths]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {transformers.__version__}")
    if options.profile:
        print(profiled(model, options.profile, prompts, options.new))
        return
    wanted: list[list[int]] = []
    for label in options.only or labels:
        tokens, rate = measured(model, label, prompts, options.new, options.rounds)
        wanted = wanted or tokens
        pairs = [
            pair for x, y in zip(tokens, wanted, strict=True) for pair in zip(x, y, strict=True)
        ]
        same = sum(a == b for a, b in pairs) / len(pairs)
        print(f"{label}: {rate:.0f} tokens/s, {same:.3f} as the first", flush=True)


if __name__ == "__main__":
    main()
