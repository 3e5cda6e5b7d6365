"""Every norm and rotary embedding of real models is recognised, and no attention reads a mask.

The expected sites come from the program's own class and function names, not from a recogniser.
The scenarios are generated: over all families every pair of settings occurs in some scenario, and
each family is looked at in two. `AITER_INDUCTOR_TEST_ALL_MODELS=pairs` looks at each family in
every one of these, `AITER_INDUCTOR_TEST_ALL_MODELS=1` in the whole product.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import aiter_inductor
from tests.models.zoo import FAMILIES, build, token_ids

NORMS = ("rms_norm", "layer_norm")
CALLS = (
    "train", "forward", "prefill-dynamic", "decode-dynamic", "prefill-static", "decode-static",
)  # fmt: skip
SHAPES = ("static", "dynamic", "mark_dynamic", "automatic")
ATTENTION = ("sdpa", "eager")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Scenario:
    """How a model is called.

    Attributes:
        call: `train` and `forward` without a cache, or a phase and the kind of its cache.
        shapes: one of `SHAPES`; `automatic` compiles for a second length, of the cache if the call
            is one token long.
        attention: transformers' implementation.
        dtype: of the parameters.
    """

    call: str
    shapes: str
    attention: str
    dtype: torch.dtype

    @property
    def phase(self) -> str:
        """`train`, `forward`, `prefill` or `decode`."""
        return self.call.partition("-")[0]

    @property
    def cache(self) -> str:
        """`dynamic`, `static` or empty."""
        return self.call.partition("-")[2]

    def __str__(self) -> str:
        return "-".join([self.call, self.shapes, self.attention, str(self.dtype)[6:]])


EVERYTHING = tuple(
    Scenario(*settings)
    for settings in itertools.product(CALLS, SHAPES, ATTENTION, DTYPES)
    # A token of a static cache has no size that could be marked: transformers fixes the batch.
    if settings[:2] != ("decode-static", "mark_dynamic")
)


def pairs(scenario: Scenario) -> Iterator[tuple[Any, Any]]:
    """Every two settings of a scenario, named by their positions."""
    return itertools.combinations(enumerate(astuple(scenario)), 2)


def pairwise(scenarios: tuple[Scenario, ...]) -> tuple[Scenario, ...]:
    """Few of `scenarios` that hold every pair of settings that any of them holds, greedily."""
    lacking = {pair for scenario in scenarios for pair in pairs(scenario)}
    chosen = []
    while lacking:
        best = max(scenarios, key=lambda scenario: len(lacking.intersection(pairs(scenario))))
        lacking.difference_update(pairs(best))
        chosen.append(best)
    return tuple(chosen)


USUAL = pairwise(EVERYTHING)
EXPECTED = {
    "llama": (5, 0, 4), "mistral": (5, 0, 4), "qwen2": (5, 0, 4), "qwen3": (9, 0, 4),
    "gemma2": (9, 0, 4), "gemma3": (13, 0, 4), "phi3": (5, 0, 4), "gpt_oss": (5, 0, 4),
    "mixtral": (5, 0, 4), "qwen3_moe": (9, 0, 4), "deepseek_v2": (9, 0, 4),
    "deepseek_v3": (9, 0, 4), "glm4": (9, 0, 4), "glm4_moe": (9, 0, 4), "olmo2": (9, 0, 4),
    "minimax_m2": (9, 0, 4), "llama4": (9, 0, 4), "phimoe": (0, 5, 4),
}  # fmt: skip
"""RMSNorms, LayerNorms and rotated tensors of two layers and the final norm."""


WINDOWED = ("gemma2", "gemma3", "gpt_oss")
"""Families of which some layers attend in a sliding window."""

BREAKS = {("phimoe", "train")}
"""Its router differentiates through a function of its own, which Dynamo does not capture."""


def cases() -> list[tuple[str, Scenario]]:
    """Families with scenarios: all of them on request, else the usual ones in turn."""
    asked = {"1": EVERYTHING, "pairs": USUAL}.get(os.environ.get("AITER_INDUCTOR_TEST_ALL_MODELS"))
    if asked is not None:
        return [(n, of_family(n, s)) for n, s in itertools.product(EXPECTED, asked)]
    turns = itertools.cycle(USUAL)
    return [(name, of_family(name, next(turns))) for name in EXPECTED for _ in range(2)]


def of_family(name: str, scenario: Scenario) -> Scenario:
    """`scenario`, with the only attention that the family has."""
    only_eager = FAMILIES[name].attention == "eager"
    return replace(scenario, attention="eager") if only_eager else scenario


def arguments(
    model: PreTrainedModel, scenario: Scenario, length: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Token ids and keyword arguments of one call."""
    ids = token_ids(length=length)
    if not scenario.cache:
        return ids, {"use_cache": False}
    if scenario.cache == "static":
        cache: Any = StaticCache(config=model.config, max_cache_len=4 * length)
    else:
        cache = DynamicCache(config=model.config)
    if scenario.phase == "decode":
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        ids = ids[:, :1]
    return ids, {"past_key_values": cache, "use_cache": True}


def mark_dynamic(ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Mark the sequence, or the length of the cache where the sequence is one token.

    Layers with a window compare their length with it, and so fix it: it is only offered as open.
    """
    if ids.shape[1] > 1:
        torch._dynamo.mark_dynamic(ids, 1)
        return
    for layer in kwargs["past_key_values"].layers:
        torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
        torch._dynamo.maybe_mark_dynamic(layer.values, 2)


def explain(model: PreTrainedModel, scenario: Scenario) -> aiter_inductor.Report:
    """The report of the last graph that the scenario compiles."""
    torch._dynamo.reset()
    dynamic = True if scenario.shapes == "dynamic" else None
    ids, kwargs = arguments(model, scenario, 8)
    if scenario.shapes == "mark_dynamic":
        mark_dynamic(ids, kwargs)
    with torch.set_grad_enabled(scenario.phase == "train"):
        model.train(scenario.phase == "train")
        found = aiter_inductor.explain(model, ids, target="gfx942", dynamic=dynamic, **kwargs)
        if scenario.shapes == "automatic":
            ids, kwargs = arguments(model, scenario, 11)
            found = aiter_inductor.explain(model, ids, target="gfx942", **kwargs)
    return found


def has_open_sizes(report: aiter_inductor.Report) -> bool:
    """Whether any site's problem names a size that is not fixed."""
    return any(re.search(r"\bs\d+\b", site.problem) for site in report.sites)


def masks_read(report: aiter_inductor.Report) -> list[str]:
    """What attention's problems say of the masks that it would read."""
    patterns = ("attention", "mla_decode")
    sites = (site for site in report.sites if site.pattern in patterns)
    return [found[0] for site in sites if (found := re.search(r"\bmask=(?!none)\w+", site.problem))]


def only_the_run_knows(name: str, scenario: Scenario) -> bool:
    """Whether what the mask of the whole prompt or of its next token hides is not in the graph.

    How full a static cache is stands in a tensor. Whether a cache has grown beyond a window, and
    with `dynamic=True` the window itself, is an open size. Llama 4 attends in chunks.
    """
    if scenario.call == "decode-static" or name == "llama4":
        return True
    if name not in WINDOWED or not scenario.cache:
        return False
    return scenario.shapes == "dynamic" or (
        scenario.shapes != "static" and scenario.call != "prefill-dynamic"
    )


@pytest.mark.parametrize(("name", "scenario"), cases(), ids=str)
def test_norms_and_ropes_are_recognised_and_no_mask_is_read(name, scenario):
    model = build(name, dtype=scenario.dtype, attention=scenario.attention)
    report = explain(model, scenario)
    patterns = (*NORMS, "rope")
    complaints = [s for s in report.sites if s.pattern in patterns and s.status != "fused"]
    assert not complaints, str(report)
    assert tuple(report.count(p) for p in patterns) == EXPECTED[name], str(report)
    assert report.graphs == 1 or (name, scenario.phase) in BREAKS
    assert not masks_read(report) or only_the_run_knows(name, scenario), str(report)
    if scenario.phase in ("train", "forward", "prefill"):
        assert has_open_sizes(report) == (scenario.shapes != "static"), str(report)


def test_every_pair_of_settings_is_looked_at():
    wanted = {pair for scenario in EVERYTHING for pair in pairs(scenario)}
    assert wanted == {pair for _, scenario in cases() for pair in pairs(scenario)}


def test_every_family_has_an_expectation():
    assert EXPECTED.keys() == FAMILIES.keys()
