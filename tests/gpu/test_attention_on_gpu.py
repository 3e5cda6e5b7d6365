"""Attention of whole models on the accelerator: transformers' by name, and decoding from caches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import aiter_inductor
from aiter_inductor.transformers import register
from tests.models import zoo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")

BATCH, LENGTH, STEPS = 3, 40, 3
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt_oss")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def padding(side: str | None) -> torch.Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side is not None:
        mask[0, slice(None, 13) if side == "left" else slice(-13, None)] = 0
    return mask.cuda()


def build(name: str) -> tuple[Any, Any]:
    """A model in bf16, and in fp32 with the same weights."""
    model = zoo.build(name, dtype=torch.bfloat16, attention="eager", layers=2).cuda()
    return model, copy.deepcopy(model).float()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    distance = (found.double() - wanted.double()).norm()
    return (distance / wanted.double().norm()).item()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_of_the_named_attention(name: str, side: str | None, compiled: bool) -> None:
    """In bf16 within three times the distance between eager attention in bf16 and in fp32."""
    register()
    ids, mask = zoo.token_ids(BATCH, LENGTH).cuda(), padding(side)
    model, exactly = build(name)
    seen = mask.bool()
    exact = exactly(ids, attention_mask=mask, use_cache=False).logits[seen]
    rounded = model(ids, attention_mask=mask, use_cache=False).logits[seen]
    model.set_attn_implementation("aiter")
    run = torch.compile(model, backend="aiter") if compiled else model
    found = run(ids, attention_mask=mask, use_cache=False).logits[seen]
    assert error(found, exact) < 3 * error(rounded, exact)


def decoded(run: Any, model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of STEPS tokens after a prefill by the model itself."""
    model(ids[:, :LENGTH], past_key_values=cache)
    steps = []
    for step in range(STEPS):
        at = torch.full((BATCH, 1), LENGTH + step, device=ids.device)
        token = ids[:, LENGTH + step : LENGTH + step + 1]
        steps.append(run(token, past_key_values=cache, position_ids=at).logits)
    return torch.cat(steps, 1)


@pytest.mark.parametrize("attention", ["eager", "aiter"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_decoding_from_a_cache(name: str, kind: str, attention: str) -> None:
    register()
    ids = zoo.token_ids(BATCH, LENGTH + STEPS).cuda()

    def cache() -> Any:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=3 * LENGTH)

    model, exactly = build(name)
    exact = decoded(exactly, exactly, cache(), ids)
    rounded = decoded(model, model, cache(), ids)
    model.set_attn_implementation(attention)
    compiled = torch.compile(model, backend="aiter", options={"aiter.force": True})
    found = decoded(compiled, model, cache(), ids)
    assert error(found, exact) < 3 * error(rounded, exact)
    report = aiter_inductor.report(compiled)
    assert report.count("attention", "fused") > 0, str(report)
