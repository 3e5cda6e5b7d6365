"""Attention of whole models on the CPU: compiled results equal eager ones whatever the mask is."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import aiter_inductor
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
