"""Every norm and every rotary embedding of real models is recognised and could be taken.

The expected sites come from the program's own class and function names, not from a recogniser.
By default each family is looked at in two of four scenarios that together cover every cache, shape
mode, dtype and training; `AITER_INDUCTOR_TEST_ALL_MODELS=1` runs their cross product.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import aiter_inductor
from tests.models.zoo import FAMILIES, build, token_ids

NORMS = ("rms_norm", "layer_norm")
SHAPES = ("static", "dynamic", "mark_dynamic", "automatic")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Scenario:
    """How a model is called.

    Attributes:
        phase: `train`, `forward`, or `prefill` or `decode` with a cache.
        cache: `dynamic`, `static` or None.
        shapes: one of `SHAPES`; `automatic` compiles for a second sequence length.
        dtype: of the parameters.
    """

    phase: str
    cache: str | None
    shapes: str
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.phase, self.cache or "nocache", self.shapes, dtype])


CALLS = (
    ("train", None), ("forward", None), ("prefill", "dynamic"), ("decode", "dynamic"),
    ("prefill", "static"), ("decode", "static"),
)  # fmt: skip
EVERYTHING = tuple(
    Scenario(phase, cache, shapes, dtype)
    for (phase, cache), shapes, dtype in itertools.product(CALLS, SHAPES, DTYPES)
    if phase in ("train", "forward") or shapes in ("static", "dynamic")
)
"""A length of 1 cannot be marked dynamic, and a second length would need a second cache."""

USUAL = (
    Scenario("forward", None, "automatic", torch.bfloat16),
    Scenario("decode", "dynamic", "dynamic", torch.bfloat16),
    Scenario("train", None, "mark_dynamic", torch.float32),
    Scenario("prefill", "static", "static", torch.float16),
)
EXPECTED = {
    "llama": (5, 0, 4), "mistral": (5, 0, 4), "qwen2": (5, 0, 4), "qwen3": (9, 0, 4),
    "gemma2": (9, 0, 4), "gemma3": (13, 0, 4), "phi3": (5, 0, 4), "gpt_oss": (5, 0, 4),
    "mixtral": (5, 0, 4), "qwen3_moe": (9, 0, 4), "deepseek_v2": (9, 0, 4),
    "deepseek_v3": (9, 0, 4), "glm4": (9, 0, 4), "glm4_moe": (9, 0, 4), "olmo2": (9, 0, 4),
    "minimax_m2": (9, 0, 4), "llama4": (9, 0, 4), "phimoe": (0, 5, 4),
}  # fmt: skip
"""RMSNorms, LayerNorms and rotated tensors of two layers and the final norm."""


BREAKS = {("phimoe", "train")}
"""Its router differentiates through a function of its own, which Dynamo does not capture."""


def cases() -> list[tuple[str, Scenario]]:
    """Families with scenarios: all of them on request, else two of the four usual ones in turn."""
    if os.environ.get("AITER_INDUCTOR_TEST_ALL_MODELS") == "1":
        return list(itertools.product(EXPECTED, EVERYTHING))
    turns = len(USUAL)
    return [
        (name, USUAL[turn % turns])
        for i, name in enumerate(EXPECTED)
        for turn in (i, i + 1 + i // turns % (turns - 1))
    ]


def arguments(
    model: PreTrainedModel, scenario: Scenario, length: int
) -> tuple[Any, dict[str, Any]]:
    """Token ids and keyword arguments of one call."""
    ids = token_ids(length=length)
    if scenario.cache is None:
        return ids, {"use_cache": False}
    if scenario.cache == "static":
        cache: Any = StaticCache(config=model.config, max_cache_len=32)
    else:
        cache = DynamicCache(config=model.config)
    if scenario.phase == "decode":
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        ids = ids[:, :1]
    return ids, {"past_key_values": cache, "use_cache": True}


def explain(model: PreTrainedModel, scenario: Scenario) -> aiter_inductor.Report:
    """The report of the last graph that the scenario compiles."""
    dynamic = True if scenario.shapes == "dynamic" else None
    ids, kwargs = arguments(model, scenario, 8)
    if scenario.shapes == "mark_dynamic":
        torch._dynamo.mark_dynamic(ids, 1)
    with torch.set_grad_enabled(scenario.phase == "train"):
        model.train(scenario.phase == "train")
        found = aiter_inductor.explain(model, ids, target="gfx942", dynamic=dynamic, **kwargs)
        if scenario.shapes == "automatic":
            ids, kwargs = arguments(model, scenario, 11)
            found = aiter_inductor.explain(model, ids, target="gfx942", **kwargs)
    return found


@pytest.mark.parametrize(("name", "scenario"), cases(), ids=str)
def test_every_norm_and_rope_is_recognised(name, scenario):
    model = build(name, dtype=scenario.dtype)
    report = explain(model, scenario)
    patterns = (*NORMS, "rope")
    complaints = [s for s in report.sites if s.pattern in patterns and s.status != "fused"]
    assert not complaints, str(report)
    assert tuple(report.count(p) for p in patterns) == EXPECTED[name], str(report)
    assert report.graphs == 1 or (name, scenario.phase) in BREAKS


def test_every_family_has_an_expectation():
    assert EXPECTED.keys() == FAMILIES.keys()
