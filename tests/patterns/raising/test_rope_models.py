"""Every rotation of real models is recognised: q and k of each layer, however the model is run."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from aiter_inductor.backend import plan_module
from aiter_inductor.core.config import Options
from aiter_inductor.core.report import Report
from tests.models.zoo import FAMILIES, REQUIRED, build, token_ids

CACHES = ("none", "dynamic_cache", "static_cache")
MODES = ("static", "automatic", "mark_dynamic", "dynamic")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NO_SDPA = ("gemma2", "gpt_oss")
LAYERS = 1

CASES = [
    (name, cache, DTYPES[(i + j) % 3], MODES[(i + 2 * j) % 4], (i + j) % 2 == 1)
    for i, name in enumerate(FAMILIES)
    for j, cache in enumerate(CACHES)
    if (i + j) % 3 != 0 and (name in REQUIRED or (i + j) % 3 == 1)
]
"""Two of the three caches for a required family and one for another, each other setting in turn."""

ONE_OF_A_FORM = ("llama", "phi3", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4", "glm4_moe")


def calls(model: PreTrainedModel, cache: str, mode: str) -> Iterator[dict[str, object]]:
    """Arguments of a prefill, and of a decode step where there is a cache."""
    lengths = (7, 11) if mode == "automatic" else (7,)
    for length in lengths:
        kept = None
        if cache == "dynamic_cache":
            kept = DynamicCache(config=model.config)
        elif cache == "static_cache":
            kept = StaticCache(config=model.config, max_cache_len=16)
        ids = token_ids(2, length)
        if mode == "mark_dynamic":
            torch._dynamo.mark_dynamic(ids, 1)
        yield {"input_ids": ids, "past_key_values": kept, "use_cache": kept is not None}
        if kept is not None:
            yield {"input_ids": token_ids(2, 1), "past_key_values": kept, "use_cache": True}


def reports(model: PreTrainedModel, cache: str, mode: str, *, training: bool) -> list[Report]:
    """The report of every graph that these calls capture."""
    found: list[Report] = []

    def capture(gm: torch.fx.GraphModule, example_inputs: object) -> object:
        options = Options(force=True, strict=True, target="gfx942")
        found.extend(plan.report for plan in plan_module(gm, options).values())
        return gm.forward

    torch._dynamo.reset()
    dynamic = {"static": False, "automatic": None, "mark_dynamic": None, "dynamic": True}[mode]
    compiled = torch.compile(model, backend=capture, dynamic=dynamic)
    with torch.set_grad_enabled(training):
        for arguments in calls(model, cache, mode):
            compiled(**arguments)
    return found


@functools.lru_cache(maxsize=1)
def built(name: str, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    return build(name, dtype=dtype, attention=attention, layers=LAYERS)


@pytest.mark.parametrize(("name", "cache", "dtype", "mode", "eager"), CASES)
def test_both_rotations_of_a_layer(name, cache, dtype, mode, eager):
    attention = "eager" if eager or name in NO_SDPA else "sdpa"
    model = built(name, dtype, attention)
    found = reports(model, cache, mode, training=False)
    assert found
    for report in found:
        assert report.count("rope", "missed") == 0, report
        assert report.count("rope", "fused") == 2 * LAYERS, report


@pytest.mark.parametrize("name", ONE_OF_A_FORM)
def test_both_rotations_in_training(name):
    model = build(name, dtype=torch.float32, layers=LAYERS).train()
    (report,) = reports(model, "none", "static", training=True)
    assert report.count("rope", "fused") == 2 * LAYERS, report


@pytest.mark.parametrize(
    ("name", "pattern", "mode"),
    [
        ("phi3", "silu_and_mul", "static"),
        ("gemma2", "gelu_tanh_and_mul", "static"),
        ("gpt_oss", "swiglu_and_mul", "static"),
        ("gpt_oss", "swiglu_and_mul", "dynamic"),
        ("mixtral", "silu_and_mul", "dynamic"),
    ],
)
def test_gated_activation_of_a_layer(name, pattern, mode):
    model = built(name, torch.bfloat16, "eager")
    for report in reports(model, "none", mode, training=False):
        assert report.count(pattern, "fused") == 1, report
