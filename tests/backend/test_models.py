"""Real models through the whole backend: outputs, gradients and cache contents against eager."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import aiter_inductor
from tests.models.zoo import REQUIRED, VOCAB_SIZE, build

TOKENS = 9


def prompt(seed: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, tokens), generator=torch.Generator().manual_seed(seed))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance in the Frobenius norm, in float64."""
    distance = (found.double() - wanted.double()).norm()
    return (distance / wanted.double().norm().clamp(min=1e-12)).item()


def assert_as_good(ours: float, theirs: float, floor: float) -> None:
    """Our distance to the truth is not above plain Inductor's, with `floor` for rounding noise."""
    assert ours <= 1.25 * theirs + floor, f"error {ours:.2e}, plain Inductor's {theirs:.2e}"


@pytest.mark.parametrize("name", REQUIRED)
def test_inference_matches_eager(name: str, every_op_taken: None, without_codegen: None) -> None:
    model, ids = build(name, dtype=torch.float32), prompt()
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aiter")
        found = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
    report = aiter_inductor.report(compiled)
    assert report.count("rms_norm", "fused") > 0
    assert not report.missed(), str(report)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bfloat16_is_as_close_as_inductor(name: str, every_op_taken: None) -> None:
    model, ids = build(name, dtype=torch.bfloat16), prompt()
    truth = build(name, dtype=torch.float32)
    truth.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = truth(ids, use_cache=False).logits
        ours = torch.compile(model, backend="aiter")(ids, use_cache=False).logits
        theirs = torch.compile(model)(ids, use_cache=False).logits
    assert_as_good(error(ours, wanted), error(theirs, wanted), floor=2e-3)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "phi3"])
def test_gradients_match_eager(
    name: str, dynamic: bool | None, every_op_taken: None, without_codegen: None
) -> None:
    check_gradients(name, dynamic)


def test_gradients_of_generated_code_match_eager(every_op_taken: None) -> None:
    check_gradients("llama", dynamic=None)


def check_gradients(name: str, dynamic: bool | None) -> None:
    model, ids = build(name, dtype=torch.float32), prompt()

    def gradients(run: torch.nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(model)
    compiled = torch.compile(model, backend="aiter", dynamic=dynamic)
    found = gradients(compiled)
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        assert error(found[parameter], gradient) < 2e-4, parameter
    assert aiter_inductor.report(compiled).count("rms_norm", "fused") > 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_cache_contents_match_eager(
    name: str,
    kind: type[DynamicCache] | type[StaticCache],
    every_op_taken: None,
    without_codegen: None,
) -> None:
    model, ids = build(name, dtype=torch.float32), prompt()

    def decode(run: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if kind is StaticCache:
            cache = StaticCache(config=model.config, max_cache_len=16)
        else:
            cache = DynamicCache(config=model.config)
        run(ids, past_key_values=cache, use_cache=True)
        for step in range(2):
            logits = run(prompt(step + 1, tokens=1), past_key_values=cache, use_cache=True).logits
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return logits, [t.clone() for t in held]

    with torch.no_grad():
        wanted, wanted_cache = decode(model)
        found, found_cache = decode(torch.compile(copy.deepcopy(model), backend="aiter"))
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
    for mine, theirs in zip(found_cache, wanted_cache, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)
