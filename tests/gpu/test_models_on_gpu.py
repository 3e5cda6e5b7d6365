"""Tiny real models on the accelerator, with the kernels that selection takes there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import aiter_inductor
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
