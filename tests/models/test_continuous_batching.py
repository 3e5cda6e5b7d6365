"""Continuous batching of transformers over this package's attention: the same tokens as without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.eager_paged import eager_paged_attention_forward

from aiter_inductor import continuous_batching
from aiter_inductor.continuous_batching import NAME, page_tables

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 100,
    "attn_implementation": NAME,
}
PROMPTS = [[1, 2, 3, 4, 5], [7] * 20, [9, 8]]
NEW_TOKENS = 6


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gpt_oss() -> Any:
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **layers, **experts))


def generated(model: Any) -> list[list[int]]:
    """Tokens of three requests of different lengths, in one batch."""
    from transformers.generation import ContinuousBatchingConfig

    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    page_size = {"page_size" if "page_size" in names else "block_size": 16}
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    pages = ContinuousBatchingConfig(
        **page_size, num_blocks=32, max_batch_tokens=64, use_cuda_graph=False
    )
    results = model.generate_batch(
        PROMPTS, generation_config=config, continuous_batching_config=pages
    )
    return [result.generated_tokens for result in results.values()]


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """With the package's attention in place: the shapes of the queries that it saw."""
    shapes: list[torch.Size] = []
    real = continuous_batching.paged_attention

    def noted(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(q.shape)
        result: torch.Tensor = real(q, *args, **kwargs)
        return result

    monkeypatch.setattr(continuous_batching, "paged_attention", noted)
    yield shapes
    AttentionInterface.register(NAME, eager_paged_attention_forward)


@pytest.mark.parametrize(("build", "layers"), [(llama, 2), (gpt_oss, 1)])
def test_it_generates_what_transformers_does(
    build: Any, layers: int, attended: list[torch.Size]
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    wanted = generated(model)
    assert attended == []
    continuous_batching.enable()
    assert generated(model) == wanted
    assert attended == [torch.Size([3, 4, 16])] * (NEW_TOKENS - 1) * layers


def test_page_tables_start_at_the_first_place_of_each_page() -> None:
    slots = torch.tensor([32, 33, 34, 35, 8, 9, 4, 5])
    starts = torch.tensor([0, 6, 6, 8], dtype=torch.int32)
    tables, lengths = page_tables(slots, starts, 4, 6)
    assert lengths.tolist() == [6, 0, 2]
    assert tables.tolist() == [[8, 2], [-1, -1], [1, -1]]


def test_a_transformers_without_such_a_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    monkeypatch.delattr(PagedAttentionCache, "update")
    with pytest.raises(continuous_batching.ContinuousBatchingError, match="has no update"):
        continuous_batching.enable()
