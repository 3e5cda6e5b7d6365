"""Tiny real models on the accelerator, with the kernels that selection takes there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import aiter_inductor
from aiter_inductor.transformers import register
from tests.models import zoo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")

OPTIONS = {"aiter.force": True}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    distance = (found.double() - wanted.double()).norm()
    return (distance / wanted.double().norm()).item()


def build(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    return zoo.build(name, dtype=dtype).cuda(), zoo.token_ids(2, 9).cuda()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_inference(name: str, dynamic: bool | None) -> None:
    model, ids = build(name, torch.float32)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aiter", dynamic=dynamic, options=OPTIONS)
        found = compiled(ids, use_cache=False).logits
    assert error(found, wanted) < 1e-3
    report = aiter_inductor.report(compiled)
    assert report.count("rms_norm", "fused") == report.count("rms_norm") > 0, str(report)
    assert report.count("rope", "fused") == report.count("rope") == 4, str(report)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gradients(name: str) -> None:
    model, ids = build(name, torch.float32)

    def gradients(run: torch.nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(model)
    compiled = torch.compile(model, backend="aiter", options=OPTIONS)
    found = gradients(compiled)
    for parameter, gradient in wanted.items():
        assert error(found[parameter], gradient) < 5e-3, parameter
    assert aiter_inductor.report(compiled).count("rms_norm", "fused") > 0


LATENT = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 256}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 128},
    "mistral": {"head_dim": 128, "sliding_window": 64},
    "qwen2": {"hidden_size": 256},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "sliding_window": 64},
    "gemma3": {"head_dim": 256, "sliding_window": 64},
    "phi3": {"hidden_size": 256},
    "gpt_oss": {"head_dim": 64, "sliding_window": 64},
    "mixtral": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}
"""Heads as wide as the real models have, and windows that 200 tokens exceed."""
ROUTED = ("gpt_oss", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")
"""Families whose router takes other experts after a rounding: they are compared in fp32."""
LENGTH = 200


def wide(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model of `SIZES`, with a layer of each kind, and more tokens than its window."""
    dtype = torch.float32 if name in ROUTED else torch.bfloat16
    layers = 2 if "sliding_window" in SIZES[name] else 1
    sizes = {"max_position_embeddings": 512, **SIZES[name]}
    # torch 2.11 breaks a graph with gradients at grouped products in fp32.
    experts = "batched_mm" if name in ROUTED else None
    model = zoo.build(name, dtype=dtype, layers=layers, experts=experts, **sizes)
    return model.cuda(), zoo.token_ids(2, LENGTH + 2).cuda()


def assert_as_near(
    found: dict[str, torch.Tensor],
    eager: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
) -> None:
    """Every result as near to that of fp32 as eager's, or equal but for fp32's own roundings."""
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        limit = 1.5 * error(eager[name], exact) + 1e-3
        assert error(found[name], exact) < limit, (name, limit, error(found[name], exact))


def after_prefill_and_decode(
    model: torch.nn.Module, run: Callable[..., Any], ids: torch.Tensor, kind: str
) -> dict[str, torch.Tensor]:
    """Logits of a prompt and of two tokens after it, and what the cache holds then."""
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 24)
    found = {"prompt": run(ids[:, :LENGTH], past_key_values=cache).logits}
    for at in range(LENGTH, LENGTH + 2):
        found[f"token {at}"] = run(ids[:, at : at + 1], past_key_values=cache).logits
    for number, layer in enumerate(cache.layers):
        found |= {f"keys {number}": layer.keys.clone(), f"values {number}": layer.values.clone()}
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "static") for name in SIZES), ("llama", "dynamic"), ("deepseek_v3", "dynamic")],
)
@torch.no_grad()
def test_prompt_tokens_and_cache_are_as_near_as_eagers(name: str, kind: str) -> None:
    model, ids = wide(name)
    exact = copy.deepcopy(model).float()
    wanted = after_prefill_and_decode(exact, exact, ids, kind)
    eager = after_prefill_and_decode(model, model, ids, kind)
    run = torch.compile(model, backend="aiter")
    assert_as_near(after_prefill_and_decode(model, run, ids, kind), eager, wanted)
    ropes = [site for site in aiter_inductor.report(model).sites if site.pattern == "rope"]
    stored = kind == "static" and name.startswith("qwen3")
    assert not stored or {site.fused_into for site in ropes} == {"rope_cache_write"}


def masks_read(report: aiter_inductor.Report) -> list[str]:
    sites = (s for s in report.sites if s.pattern in ("attention", "mla_decode"))
    return [str(s) for s in sites if "mask=" in s.problem and "mask=none" not in s.problem]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_losses_and_gradients_are_as_near_as_eagers(name: str, packed: bool) -> None:
    """No mask is read, and kernels take attention or say why not, packed documents included."""
    model, ids = wide(name)
    model.train()
    inputs: dict[str, Any] = {"use_cache": False}
    if packed:
        at = torch.arange(ids.shape[1], device="cuda").expand_as(ids)
        inputs["position_ids"] = at % torch.tensor([[77], [130]], device="cuda")

    def gradients(of: torch.nn.Module, run: Callable[..., Any]) -> dict[str, torch.Tensor]:
        of.zero_grad()
        run(ids, labels=ids, **inputs).loss.backward()
        return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}

    exact = copy.deepcopy(model).float()
    wanted, eager = gradients(exact, exact), gradients(model, model)
    compiled = torch.compile(model, backend="aiter")
    assert_as_near(gradients(model, compiled), eager, wanted)
    report = aiter_inductor.report(model)
    sites = [site for site in report.sites if site.pattern == "attention"]
    assert len(sites) == model.config.num_hidden_layers, str(report)
    assert not masks_read(report), str(report)
    for site in sites:
        assert site.status == "fused" or site.reason, str(report)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
@torch.no_grad()
def test_generated_tokens_are_those_of_sdpa(name: str, side: str) -> None:
    """`attn_implementation="aiter"` with a padded batch, both kinds of caches."""
    register()
    model = zoo.build(name, dtype=torch.float32, attention="sdpa", **SIZES[name]).cuda()
    ids = zoo.token_ids(2, 24).cuda()
    seen = torch.ones_like(ids)
    seen[0, slice(None, 7) if side == "left" else slice(-7, None)] = 0
    how = {"attention_mask": seen, "max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    logits, tokens = [], []
    for attention in ("sdpa", "aiter"):
        model.set_attn_implementation(attention)
        logits.append(model(ids, attention_mask=seen, use_cache=False).logits[seen.bool()])
        kinds = (None, "static")
        tokens += [model.generate(ids, cache_implementation=kind, **how) for kind in kinds]
    assert error(logits[1], logits[0]) < 1e-4
    for other in tokens[1:]:
        assert torch.equal(other, tokens[0])


@torch.no_grad()
def test_generation_compiles_its_steps_with_this_backend() -> None:
    """A static cache, of a padded batch, written and read by replays of a CUDA graph."""
    register()
    model = zoo.build("qwen3", dtype=torch.float32, layers=1, **SIZES["qwen3"]).cuda()
    ids = zoo.token_ids(2, 24).cuda()
    seen = torch.ones_like(ids)
    seen[0, :7] = 0
    how = {"attention_mask": seen, "max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(ids, **how)
    model.set_attn_implementation("aiter")
    compiling = CompileConfig(backend="aiter")
    found = model.generate(ids, cache_implementation="static", compile_config=compiling, **how)
    assert torch.equal(found, wanted)
    assert aiter_inductor.report(model).count("rope", "fused") > 0


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs(mode: str) -> None:
    model, ids = build("qwen3", torch.bfloat16)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aiter", mode=mode)
        for _ in range(4):
            found = compiled(ids, use_cache=False).logits.clone()
        assert error(found, wanted) < 3e-2
        torch._dynamo.reset()
        found = compiled(ids, use_cache=False).logits.clone()
        assert error(found, wanted) < 3e-2


def test_operators_are_captured_by_a_graph() -> None:
    from aiter_inductor.core.op import OPS

    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(256, device="cuda", dtype=torch.bfloat16)
    op = OPS["rms_norm_quant"]
    op(x, weight, 1e-6, dtype=torch.float8_e4m3fn)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, scale = op(x, weight, 1e-6, dtype=torch.float8_e4m3fn)
    x.normal_()
    graph.replay()
    wanted, wanted_scale = op.reference(x, weight, 1e-6, dtype=torch.float8_e4m3fn)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-5, atol=0)
    assert error(q.float() * scale, wanted.float() * wanted_scale) < 1e-2
