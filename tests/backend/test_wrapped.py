"""Programs whose tensors are not plain, or not all there: transforms, subclasses, hooks, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.utils.checkpoint import checkpoint

import aiter_inductor

N = 32


@pytest.fixture(autouse=True)
def quickly(every_op_taken: None, without_codegen: None) -> None:
    """Nothing here needs generated code."""


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Layer(torch.nn.Module):
    """Two norms, attention and a gated activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.RMSNorm(N, eps=1e-6), torch.nn.LayerNorm(N)
        self.up = torch.nn.Linear(N, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.first(x).unflatten(-1, (4, N // 4)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).mean(1).sum()
        rows = self.second(x)
        return x + F.silu(rows) * self.up(rows)


def rows(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, N, generator=torch.Generator().manual_seed(1))


def norm_and_gate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    normal = F.rms_norm(x, (N,), w, 1e-6)
    return F.silu(normal) * x


def energy(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return norm_and_gate(x, w).cos().sum()


def gradients(run: Callable[..., torch.Tensor], model: torch.nn.Module, x: Any) -> list[Any]:
    model.zero_grad()
    out = run(x)
    out.cos().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    "transformed",
    [
        torch.func.grad(energy),
        torch.func.jacrev(norm_and_gate),
        torch.func.hessian(energy),
        torch.vmap(norm_and_gate, in_dims=(0, None)),
        torch.vmap(torch.func.grad(energy, argnums=1), in_dims=(0, None)),
    ],
    ids=["grad", "jacrev", "hessian", "vmap", "per_sample"],
)
def test_transforms_keep_the_program(transformed: Callable[..., Any]) -> None:
    x, w = rows(3), torch.nn.Parameter(rows(1)[0])
    found = torch.compile(transformed, backend="aiter", fullgraph=True)(x, w)
    torch.testing.assert_close(found, transformed(x, w))
    report = aiter_inductor.explain(transformed, x, w, target="gfx942")
    assert {site.status for site in report.sites} == {"inlined"}
    assert all("is wrapped by a transform of torch.func" in s.reason for s in report.sites)


def test_distributed_tensors_keep_the_program(one_process: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    x, w = (distribute_tensor(t, mesh, [Replicate()]) for t in (rows(2, 3), rows(1)[0]))
    found = torch.compile(norm_and_gate, backend="aiter", fullgraph=True)(x, w)
    torch.testing.assert_close(found.full_tensor(), norm_and_gate(x, w).full_tensor())
    report = aiter_inductor.explain(norm_and_gate, x, w, target="gfx942")
    assert {(s.pattern, s.status) for s in report.sites} == {
        ("rms_norm", "inlined"),
        ("silu_and_mul", "inlined"),
    }
    assert all("is a DTensor; kernels compute on plain" in s.reason for s in report.sites)


def test_ragged_batches_keep_the_program() -> None:
    norm = torch.nn.LayerNorm(N)
    ragged = torch.nested.nested_tensor([rows(3), rows(5)], layout=torch.jagged)
    found = torch.compile(norm, backend="aiter")(ragged)
    torch.testing.assert_close(found.values(), norm(ragged).values())
    (site,) = aiter_inductor.report(norm).sites
    assert site.reason == "layer_norm is a NestedTensor; kernels compute on plain tensors"


def test_checkpoints_around_compiled_layers() -> None:
    """Planning saves nothing for a gradient: a checkpoint counts what its region saves."""
    model, x = torch.nn.ModuleList(Layer() for _ in range(2)), rows(2, 5)

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    wanted = gradients(run, model, x)
    for layer in model:
        layer.compile(backend="aiter", fullgraph=True)
    torch.testing.assert_close(gradients(run, model, x), wanted, rtol=1e-4, atol=1e-4)
    report = aiter_inductor.report(model[0])
    aiter_inductor.assert_fused(report, rms_norm=1, layer_norm=1, attention=1, silu_and_mul=1)


def test_a_batch_that_only_the_run_knows() -> None:
    model = Layer()

    def run(x: torch.Tensor) -> torch.Tensor:
        return model(x[x.mean((1, 2)).gt(0).nonzero().squeeze(1)])

    x = rows(9, 5)
    compiled = torch.compile(run, backend="aiter", fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = gradients(compiled, model, x)
    torch.testing.assert_close(found, gradients(run, model, x), rtol=1e-4, atol=1e-4)
    report = aiter_inductor.report(model)
    aiter_inductor.assert_fused(report, rms_norm=1, layer_norm=1, attention=1, silu_and_mul=1)


class Either(torch.nn.Module):
    """A layer that has a second norm or not, as models that mix kinds of layers do."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.first, self.second = torch.nn.RMSNorm(N, eps=1e-6), torch.nn.LayerNorm(N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) if self.both else self.first(x) + 1


class Kinds(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Either(both) for both in (True, False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def test_layers_that_share_their_code_are_all_reported() -> None:
    model, x = Kinds(), rows(4)
    explained = aiter_inductor.explain(model, x, target="gfx942")
    aiter_inductor.assert_fused(explained, rms_norm=2, layer_norm=1)
    for layer in model.layers:
        layer.compile(backend="aiter")
    model(x)
    aiter_inductor.assert_fused(aiter_inductor.report(model), rms_norm=2, layer_norm=1)
    aiter_inductor.assert_fused(aiter_inductor.report(model.layers[1]), rms_norm=1, layer_norm=0)
    model(rows(7))
    aiter_inductor.assert_fused(aiter_inductor.report(model), rms_norm=2, layer_norm=1)


def test_a_capture_of_nothing_says_so() -> None:
    report = aiter_inductor.explain(lambda x: 3, rows(2), target="gfx942")
    assert (report.target, report.graphs) == ("gfx942", 0)
    assert report.notes == (
        "nothing was captured: no tensor operation ran that was not compiled before",
    )
