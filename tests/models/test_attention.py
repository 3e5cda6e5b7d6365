"""Attention of whole models on the CPU: compiled results equal eager ones whatever the mask is."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import aiter_inductor
from aiter_inductor.backend import plan
from aiter_inductor.core import inductor
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.config import Options
from aiter_inductor.core.graph import tensor
from aiter_inductor.core.rewrite import apply
from tests.models import zoo

BATCH, LENGTH = 2, 9


def padding(side):
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, slice(None, 3) if side == "left" else slice(-3, None)] = 0
    return mask


SCENARIOS = {
    "plain": lambda config: {"use_cache": False},
    "padded left": lambda config: {"use_cache": False, "attention_mask": padding("left")},
    "padded right": lambda config: {"use_cache": False, "attention_mask": padding("right")},
    "mask of ones": lambda config: {
        "use_cache": False,
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
    },
    "packed": lambda config: {
        "use_cache": False,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * BATCH),
    },
    "dynamic cache": lambda config: {"past_key_values": DynamicCache(config=config)},
    "static cache": lambda config: {
        "past_key_values": StaticCache(config=config, max_cache_len=16)
    },
}
MASKED = ("padded left", "padded right", "mask of ones", "packed")


def attentions(report):
    return [site for site in report.sites if site.pattern == "attention"]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    "name, attention",
    [("llama", "sdpa"), ("llama", "eager"), ("deepseek_v3", "sdpa"), ("gpt_oss", "eager")],
)
@torch.no_grad()
def test_prefill_and_decode_equal_eager(name, attention, scenario):
    model = zoo.build(name, dtype=torch.float32, attention=attention, layers=1)
    ids = zoo.token_ids(BATCH, LENGTH + 1)
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        run = torch.compile(model, backend="aiter", options=FORCED) if compiled else model
        inputs = SCENARIOS[scenario](model.config)
        logits = [run(ids[:, :LENGTH], **inputs).logits]
        if "past_key_values" in inputs:
            positions = torch.full((BATCH, 1), LENGTH)
            logits.append(run(ids[:, LENGTH:], position_ids=positions, **inputs).logits)
        results.append(torch.cat(logits, 1))
    seen = torch.ones(BATCH, results[0].shape[1], dtype=torch.bool)
    if "padded" in scenario:
        seen = padding(scenario.split()[1]).bool()
    torch.testing.assert_close(results[1][seen], results[0][seen], rtol=1e-4, atol=1e-4)


FORCED = {"aiter.force": True}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixtral", "deepseek_v3"])
def test_a_causal_model_reads_no_mask(name):
    model = zoo.build(name, layers=1)
    report = aiter_inductor.explain(model, zoo.token_ids(BATCH, LENGTH), use_cache=False)
    (site,) = attentions(report)
    assert "mask=none" in site.problem, site
    assert "causal=top_left" in site.problem


@pytest.mark.parametrize("scenario", MASKED)
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_mask_that_says_more_is_read(name, scenario):
    model = zoo.build(name, layers=1)
    inputs = SCENARIOS[scenario](model.config)
    report = aiter_inductor.explain(model, zoo.token_ids(BATCH, LENGTH), **inputs)
    (site,) = attentions(report)
    assert "mask=bool" in site.problem, site


@pytest.mark.parametrize("call", ["plain", "packed", "packed training"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3", "gemma3", "gpt_oss"])
def test_nothing_is_left_of_a_mask_that_is_understood(name, call):
    """Once attention is rewritten, dead code takes the whole computation of the mask along."""
    length, left = 37, []

    def capture(gm, example_inputs):
        with inductor.fake_mode_of(gm.graph):
            planned = plan(gm.graph, Options(force=True, strict=True), arch_named("gfx942"))
        before = masks(gm.graph)
        apply(gm.graph, planned.decisions)
        gm.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        left.append((before, masks(gm.graph)))
        raise RuntimeError("planned for a chip that is not here")

    def masks(graph):
        values = ((node, tensor(node)) for node in graph.nodes)
        return [n.name for n, v in values if v is not None and v.shape[-2:] == (length, length)]

    model = zoo.build(name, layers=2)
    starts = torch.arange(length)[None] % 15
    inputs = {"use_cache": False} | ({"position_ids": starts} if "packed" in call else {})
    torch._dynamo.reset()
    with (
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="not here"),
        torch.set_grad_enabled("training" in call),
    ):
        torch.compile(model, backend=capture)(zoo.token_ids(1, length), **inputs)
    ((before, after),) = left
    assert before
    assert not after
