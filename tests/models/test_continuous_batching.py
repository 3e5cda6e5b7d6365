"""Continuous batching of transformers over this package's attention: the same tokens as without."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from aiter_inductor import continuous_batching
from aiter_inductor.continuous_batching import page_tables, tables_of_tokens

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 100,
    "attn_implementation": "paged|eager",
}
PROMPTS = [[1, 2, 3, 4, 5], [7] * 20, [9, 8]]
NEW_TOKENS = 6


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gpt_oss() -> Any:
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **layers, **experts))


def generated(model: Any, together: int, longest: int | None = None) -> list[list[int]]:
    """Tokens of three requests of different lengths, batches of so many tokens.

    With `longest`, decoding batches are handed tables of pages.
    """
    from transformers.generation import ContinuousBatchingConfig

    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    page_size = {"page_size" if "page_size" in names else "block_size": 16}
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    pages = ContinuousBatchingConfig(
        **page_size, num_blocks=32, max_batch_tokens=together, use_cuda_graph=False
    )
    manager = model.init_continuous_batching(
        generation_config=config, continuous_batching_config=pages
    )
    if longest is not None:
        continuous_batching.hand_over_tables(manager, longest)
    manager.start()
    names, found = manager.add_requests(PROMPTS), dict[str, list[int]]()
    while len(found) < len(names):
        result = manager.get_result(timeout=100)
        assert result is not None
        assert not result.error
        if result.is_finished():
            found[result.request_id] = result.generated_tokens
    manager.stop(block=True)
    return [found[name] for name in names]


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.Size]]:
    """The ops that the package's attention called, and the shapes of their queries."""
    calls: list[tuple[str, torch.Size]] = []

    def noting(name: str) -> Any:
        real = getattr(continuous_batching, name)

        def noted(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append((name, q.shape))
            result: torch.Tensor = real(q, *args, **kwargs)
            return result

        return noted

    for name in ("paged_attention", "attention_varlen"):
        monkeypatch.setattr(continuous_batching, name, noting(name))
    return calls


@pytest.mark.parametrize(
    ("build", "full", "together"),
    [(llama, 2, 64), (gpt_oss, 1, 16)],
    ids=["whole prompts", "pieces of prompts, windows and sinks"],
)
def test_it_generates_what_transformers_does(
    build: Any, full: int, together: int, attended: list[tuple[str, torch.Size]]
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    wanted = generated(model, together)
    assert attended == []
    continuous_batching.enable(model)
    assert generated(model, together) == wanted
    decoded = ("paged_attention", torch.Size([3, 4, 16]))
    assert attended.count(decoded) >= (NEW_TOKENS - 2) * full
    assert ("attention_varlen", torch.Size([min(together, 27), 4, 16])) in attended


@pytest.mark.parametrize("longest", [26, 15], ids=["all", "the shorter"])
def test_requests_of_one_new_token_come_with_tables(
    longest: int, attended: list[tuple[str, torch.Size]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    wanted = generated(model, 64)
    continuous_batching.enable(model)
    handed: list[int] = []
    real = continuous_batching.Sequences.of_requests.__func__

    def noted(cls: Any, tables: torch.Tensor, *args: Any) -> Any:
        handed.append(tables.shape[1])
        return real(cls, tables, *args)

    monkeypatch.setattr(continuous_batching.Sequences, "of_requests", classmethod(noted))
    assert generated(model, 64, longest) == wanted
    assert handed == ([2] * (NEW_TOKENS - 1) if longest == 26 else [])
    assert attended.count(("paged_attention", torch.Size([3, 4, 16]))) == 2 * (NEW_TOKENS - 1)


def test_padding_is_stored_nowhere() -> None:
    tables = torch.tensor([[8, 2], [5, -1], [-1, -1]], dtype=torch.int32)
    starts = torch.tensor([0, 6, 7, 7], dtype=torch.int32)
    found = continuous_batching.Sequences.of_requests(tables, starts, 4)
    assert found.lengths.tolist() == [6, 1, 0]
    assert found.slots.tolist() == [2 * 4 + 1, 5 * 4, -1]


def test_a_compiled_model_is_one_graph_a_kind_of_batch() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    wanted = generated(model, 16)
    continuous_batching.enable(model)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.compile(backend="eager", dynamic=True)
    assert generated(model, 16) == wanted
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3


def test_outside_continuous_batching_it_says_so() -> None:
    model = llama()
    continuous_batching.enable(model)
    with pytest.raises(ValueError, match="got none; for other calls choose"):
        model(torch.tensor([[1, 2, 3]]))


def test_page_tables_start_at_the_first_place_of_each_page() -> None:
    slots = torch.tensor([32, 33, 34, 35, 8, 9, 4, 5])
    starts = torch.tensor([0, 6, 6, 8], dtype=torch.int32)
    tables, lengths = page_tables(slots, starts, 4, 6)
    assert lengths.tolist() == [6, 0, 2]
    assert tables.tolist() == [[8, 2], [-1, -1], [1, -1]]


def test_each_token_is_a_sequence_that_ends_with_it() -> None:
    tables = torch.tensor([[8, 2], [5, -1], [1, 3]], dtype=torch.int32)
    lengths = torch.tensor([6, 0, 7], dtype=torch.int32)
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    found, ends = tables_of_tokens(tables, lengths, starts, 8)
    assert ends.tolist() == [5, 6, 5, 6, 7, 0, 0, 0]
    assert found[:5].tolist() == [[8, 2], [8, 2], [1, 3], [1, 3], [1, 3]]


def test_a_transformers_without_such_a_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    monkeypatch.delattr(PagedAttentionCache, "update")
    with pytest.raises(continuous_batching.ContinuousBatchingError, match="has no update"):
        continuous_batching.enable(llama())
