"""Continuous batching of a Llama-3-8B-shaped model by transformers, with each of its attentions.

    python benchmarks/continuous_batching.py --layers 8 --requests 64 --prompt 1024 --new 64
    python benchmarks/continuous_batching.py --profile "aiter, graphs" --requests 32

Each line gives the tokens generated a second by `generate_batch`, prefill included, of greedy
decoding with random weights in bf16, once the manager has served the same prompts before, and the
part of the tokens that are those of the first line. Nothing is kept of prompts between calls. Names
after `aiter` say whether batches are captured in CUDA graphs, which transformers does by default
where an attention needs no masks, preparing a batch while another runs, and whether the model is
compiled with this backend: it is called as one graph.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from functools import partial
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig

from aiter_inductor import continuous_batching

PAGE_SIZE = 16
COMPILED = "aiter, compiled, graphs"
AITER = {"aiter, no graphs": False, "aiter, graphs": True, COMPILED: True}


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


def generated(
    model: Any, prompts: list[list[int]], new_tokens: int, graphs: bool
) -> list[list[int]]:
    """Tokens of every request, in the order of the prompts, by a manager that is kept."""
    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    pages = sum(-(-(len(prompt) + new_tokens) // PAGE_SIZE) + 1 for prompt in prompts)
    batching = ContinuousBatchingConfig(
        **{"page_size" if "page_size" in names else "block_size": PAGE_SIZE},
        **({"auto_switch_to_flash": False} if "auto_switch_to_flash" in names else {}),
        num_blocks=pages,
        max_batch_tokens=2048,
        use_cuda_graph=graphs,
        allow_block_sharing=False,
    )
    greedy = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    results = model.generate_batch(
        prompts,
        generation_config=greedy,
        continuous_batching_config=batching,
        persistent_manager=True,
    )
    return [result.generated_tokens for result in results.values()]


def choose(model: Any, label: str) -> None:
    """Let the model attend as the label says."""
    if label in AITER:
        continuous_batching.enable(model)
        if label == COMPILED:
            model.compile(backend="aiter", dynamic=True)
    else:
        model.set_attn_implementation(label)


def profiled(model: Any, label: str, prompts: list[list[int]], new_tokens: int) -> str:
    """Where the time goes: kernels and operators, by their time on the GPU."""
    choose(model, label)
    run = partial(generated, model, prompts, new_tokens, AITER.get(label, False))
    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
    return found.key_averages().table("cuda_time_total", row_limit=40, max_name_column_width=60)


def main() -> None:
    """Measure every attention on the same prompts."""
    known = AttentionInterface().valid_keys()
    sdpa = "paged|sdpa" if "paged|sdpa" in known else "sdpa"
    labels = [sdpa, "paged|eager", *AITER]
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 8), ("requests", 64), ("prompt", 1024), ("new", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=labels, help="one of the attentions")
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
    for label in [options.only] if options.only else labels:
        choose(model, label)
        run = partial(generated, model, prompts, options.new, AITER.get(label, False))
        tokens, seconds = run(), []
        for _ in range(options.rounds):
            torch.cuda.synchronize()
            started = time.perf_counter()
            tokens = run()
            seconds.append(time.perf_counter() - started)
        model.destroy_cached_continuous_batching_manager()
        wanted = wanted or tokens
        count = sum(map(len, tokens))
        same = sum(
            a == b for x, y in zip(tokens, wanted, strict=True) for a, b in zip(x, y, strict=True)
        )
        rate = count / statistics.median(seconds)
        print(f"{label}: {rate:.0f} tokens/s, {same / count:.3f} as the first", flush=True)


if __name__ == "__main__":
    main()
