"""Attention over pages under CUDA graphs: replays with other lengths, and continuous batching."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aiter_inductor import continuous_batching
from aiter_inductor.lowerings.kv_cache import kv_cache_write
from aiter_inductor.lowerings.paged_attention import paged_attention
from tests.lowerings.checks import assert_close

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU is here, and a CPU has no CUDA graphs"
)

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SEQS, HEADS, KV_HEADS, D, PAGE, MOST = 6, 32, 8, 128, 16, 2048
LENGTHS = [[1] * SEQS, [0, 1, 17, 640, 2000, MOST], [MOST] * SEQS, [MOST, 0, 0, 0, 0, 33]]


@dataclasses.dataclass(frozen=True)
class Step:
    """A decoding step's inputs, which stay where they are, and its result."""

    rows: tuple[Tensor, Tensor, Tensor]  # q, key, value
    caches: tuple[Tensor, Tensor]
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    scales: tuple[Tensor | None, Tensor | None]

    @classmethod
    def of(cls, cache_dtype: torch.dtype, layout: str) -> Step:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=BF16)

        pages, pack = SEQS * MOST // PAGE, 16 // cache_dtype.itemsize
        shapes = [(pages, PAGE, KV_HEADS, D)] * 2
        if layout == "packed":
            shapes = [
                (pages, KV_HEADS, D // pack, PAGE, pack),
                (pages, KV_HEADS, PAGE // pack, D, pack),
            ]
        scale = torch.full((1,), 0.5, device="cuda") if cache_dtype == FP8 else None
        tables = torch.randperm(pages, device="cuda").view(SEQS, -1).int()
        rows = normal(SEQS, HEADS, D), normal(SEQS, KV_HEADS, D), normal(SEQS, KV_HEADS, D)
        keys, values = (normal(*shape).to(cache_dtype) for shape in shapes)
        return cls(
            rows,
            (keys, values),
            tables,
            torch.ones(SEQS, dtype=torch.int32, device="cuda"),
            torch.zeros(SEQS, dtype=torch.int64, device="cuda"),
            (scale, scale),
        )

    def run(self, layout: str) -> Tensor:
        """Store the new rows and attend."""
        q, key, value = self.rows
        kv_cache_write(key, value, *self.caches, self.slots, *self.scales, layout=layout)
        found: Tensor = paged_attention(
            q, *self.caches, self.tables, self.lengths, *self.scales, scale=0.1, layout=layout
        )
        return found

    def refill(self, lengths: list[int]) -> None:
        """Other rows, other pages and lengths, and the slot of each sequence's last token."""
        for x in self.rows:
            x.normal_()
        self.tables.copy_(self.tables.flatten()[torch.randperm(self.tables.numel())].view(SEQS, -1))
        self.lengths.copy_(torch.tensor(lengths))
        last = (self.lengths.long() - 1).clamp(min=0)
        page = self.tables.long().gather(1, (last // PAGE)[:, None])[:, 0]
        slots = (page * PAGE + last % PAGE).masked_fill(self.lengths == 0, -1)
        self.slots.copy_(slots)


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one call, and where it leaves its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("cache_dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("layout", ["paged", "packed"])
def test_one_graph_serves_every_length(cache_dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    step = Step.of(cache_dtype, layout)
    graph, out = captured(lambda: step.run(layout))
    for lengths in LENGTHS:
        step.refill(lengths)
        wanted = [cache.clone() for cache in step.caches]
        kv_cache_write.reference(*step.rows[1:], *wanted, step.slots, *step.scales, layout=layout)
        out.fill_(torch.nan)
        graph.replay()
        for found, cache in zip(step.caches, wanted, strict=True):
            assert torch.equal(found.view(torch.uint8), cache.view(torch.uint8))
        exact = paged_attention.reference(
            step.rows[0].double(),
            *wanted,
            step.tables,
            step.lengths,
            *step.scales,
            scale=0.1,
            layout=layout,
        )
        assert_close(out, exact.to(BF16))


@pytest.mark.parametrize(("graphs", "longest"), [(False, 0), (True, 0), (True, 220)])
def test_continuous_batching_generates_what_transformers_does(graphs: bool, longest: int) -> None:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.generation import ContinuousBatchingConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        vocab_size=500,
        attn_implementation="paged|eager",
    )
    model: Any = LlamaForCausalLM(config).eval().cuda()
    prompts = [torch.randint(0, 500, (n,)).tolist() for n in (5, 70, 33, 1, 200)]
    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    pages: dict[str, Any] = {"page_size" if "page_size" in names else "block_size": PAGE}

    def generated(use_cuda_graph: bool, longest: int) -> list[list[int]]:
        batching = ContinuousBatchingConfig(
            **pages, num_blocks=64, max_batch_tokens=128, use_cuda_graph=use_cuda_graph
        )
        greedy = GenerationConfig(
            max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        manager = model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=batching
        )
        if longest:
            continuous_batching.hand_over_tables(manager, longest)
        manager.start()
        names, found = manager.add_requests(prompts), dict[str, list[int]]()
        while len(found) < len(names):
            result = manager.get_result(timeout=60)
            assert result is not None
            assert not result.error
            if result.is_finished():
                found[result.request_id] = result.generated_tokens
        manager.stop(block=True)
        return [found[name] for name in names]

    wanted = generated(False, 0)
    continuous_batching.enable(model)
    assert generated(graphs, longest) == wanted
