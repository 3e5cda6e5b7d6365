"""DeepSeek models decode over the latent cache: outputs and cache contents against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion
from transformers import DynamicCache, StaticCache

import aiter_inductor
from aiter_inductor.core.report import Report
from tests.models import zoo

PROMPT, STEPS, LAYERS = 9, 3, 2
CACHES = {"dynamic": DynamicCache, "static": StaticCache}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def decode(model: Any, run: Any, cache: str, padded: bool) -> list[torch.Tensor]:
    """Logits of some steps after an eager prefill, then what the cache holds."""
    size = {"max_cache_len": 32} if cache == "static" else {}
    past = CACHES[cache](config=model.config, **size)
    mask = torch.ones(2, PROMPT + STEPS, dtype=torch.long)
    mask[0, :4] = 0

    def seen(length: int) -> torch.Tensor | None:
        return mask[:, :length] if padded else None

    model(zoo.token_ids(2, PROMPT), attention_mask=seen(PROMPT), past_key_values=past)
    found = []
    for i in range(1, STEPS + 1):
        ids = zoo.token_ids(2, 1, seed=i)
        found.append(run(ids, attention_mask=seen(PROMPT + i), past_key_values=past).logits)
    return found + [t for layer in past.layers for t in (layer.keys, layer.values)]


def sites(report: Report) -> list[tuple[str, str | None]]:
    return [(s.status, s.provider) for s in report.sites if s.pattern == "mla_decode"]


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decoding_matches_eager(
    name: str, cache: str, padded: bool, dtype: torch.dtype, without_codegen: None
) -> None:
    model = zoo.build(name, dtype=dtype, layers=LAYERS)
    with torch.no_grad():
        wanted = decode(model, model, cache, padded)
        compiled = torch.compile(model, backend="aiter")
        found = decode(model, compiled, cache, padded)
    taken = sites(aiter_inductor.report(compiled))
    assert len(taken) >= LAYERS
    assert set(taken) == {("fused", "torch")}
    near = TOLERANCE[dtype]
    torch.testing.assert_close(found, wanted, rtol=near, atol=near)


@pytest.mark.parametrize("cache", CACHES)
def test_generated_code_matches_eager(cache: str) -> None:
    if cache == "dynamic" and TorchVersion(torch.__version__) < "2.12":
        pytest.skip("torch 2.11 generates C++ for this step that is none, with any backend")
    model = zoo.build("deepseek_v3", dtype=torch.float32, layers=1)
    with torch.no_grad():
        wanted = decode(model, model, cache, True)
        found = decode(model, torch.compile(model, backend="aiter"), cache, True)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_prefill_and_training_keep_their_form() -> None:
    model, ids = zoo.build("deepseek_v3", dtype=torch.float32, layers=1), zoo.token_ids(2, 9)
    with torch.no_grad():
        assert sites(aiter_inductor.explain(model, ids, use_cache=False)) == []
    assert sites(aiter_inductor.explain(model, ids[:, :1], use_cache=False)) == []
