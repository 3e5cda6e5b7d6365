"""Every way a program can be inside of something: modes, regions, wrappers, and graphs in parts."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

import aiter_inductor

N = 64


class Block(torch.nn.Module):
    """A norm before and after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.linear, self.after = (
            torch.nn.RMSNorm(N, eps=1e-6),
            torch.nn.Linear(N, N),
            torch.nn.LayerNorm(N),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.after(self.linear(self.before(x)))


@pytest.fixture(autouse=True)
def quickly(every_op_taken: None, without_codegen: None) -> None:
    """Modes, regions and wrappers end before code generation."""


def rows(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*sizes, N, generator=torch.Generator().manual_seed(1)).to(dtype)


def fused(compiled: Any) -> dict[str, int]:
    report = aiter_inductor.report(compiled)
    assert not report.missed(), str(report)
    return {name: report.count(name, "fused") for name in ("rms_norm", "layer_norm")}


def gradients(run: Callable[..., torch.Tensor], model: torch.nn.Module, *args: Any) -> list[Any]:
    """The output, and the gradients of the parameters and of the first argument."""
    model.zero_grad()
    x = args[0].clone().requires_grad_()
    out = run(x, *args[1:])
    out.float().cos().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
        functools.partial(torch.set_grad_enabled, True),
    ],
    ids=["no_grad", "inference_mode", "autocast", "grad"],
)
@pytest.mark.parametrize("inside", [True, False])
def test_modes(mode: Callable[[], AbstractContextManager[None]], inside: bool) -> None:
    if inside and mode is torch.inference_mode and TorchVersion(torch.__version__) < "2.12":
        pytest.skip("torch 2.11 compiles no nn.Linear within inference_mode, with any backend")
    model, x = Block(), rows(8)

    def run(x: torch.Tensor) -> torch.Tensor:
        with mode() if inside else nullcontext():
            return model(x) * 2

    with nullcontext() if inside else mode():
        wanted = run(x)
        found = torch.compile(run, backend="aiter", fullgraph=True)(x)
    assert found.dtype == wanted.dtype
    assert found.requires_grad == wanted.requires_grad
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert fused(model) == {"rms_norm": 1, "layer_norm": 1}


def test_autocast_outside_of_training() -> None:
    model, x = Block(), rows(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = gradients(model, model, x)
        found = gradients(torch.compile(model, backend="aiter"), model, x)
    torch.testing.assert_close(found, wanted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_regions(reentrant: bool) -> None:
    model = torch.nn.ModuleList(Block() for _ in range(2))

    def run(x: torch.Tensor) -> torch.Tensor:
        for block in model:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x.sin()

    x = rows(8)
    wanted = gradients(run, model, x)
    found = gradients(torch.compile(run, backend="aiter", fullgraph=not reentrant), model, x)
    assert_close(found, wanted)
    assert fused(model) == {"rms_norm": 2, "layer_norm": 2}
    report = aiter_inductor.report(model)
    if not reentrant:
        assert report.graphs == 3
        assert sorted(site.graph for site in report.sites) == [1, 1, 2, 2]
    assert {site.module.rpartition(".")[2] for site in report.sites} == {"before", "after"}


def test_conditional_regions() -> None:
    model = Block()

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(
            x.sum() > 0, lambda x: model.before(x) * 2, lambda x: model.after(x), (x,)
        )

    compiled = torch.compile(run, backend="aiter", fullgraph=True)
    with torch.no_grad():
        for x in (rows(8).abs(), -rows(8).abs()):
            assert_close(compiled(x), run(x))
    assert fused(model) == {"rms_norm": 1, "layer_norm": 1}
    assert {site.graph for site in aiter_inductor.report(model).sites} == {1, 2}


def test_graph_breaks_sum_up() -> None:
    model = Block()

    def run(x: torch.Tensor) -> torch.Tensor:
        x = model.before(x)
        torch._dynamo.graph_break()
        x = model.linear(x)
        torch._dynamo.graph_break()
        return model.after(x)

    x = rows(8)
    assert_close(torch.compile(run, backend="aiter")(x), run(x))
    assert fused(model) == {"rms_norm": 1, "layer_norm": 1}
    assert aiter_inductor.report(model).graphs == 3
    assert aiter_inductor.explain(run, x, target="gfx942").graphs == 3


def test_nested_compiled_functions() -> None:
    model = Block()
    inner = torch.compile(model.before, backend="aiter")

    @torch.compile(backend="aiter")
    def outer(x: torch.Tensor) -> torch.Tensor:
        return model.after(inner(x))

    x = rows(8)
    assert_close(outer(x), model.after(model.before(x)))
    assert_close(inner(x), model.before(x))
    assert fused(model)["layer_norm"] == 1
    assert fused(model.before) == {"rms_norm": 2, "layer_norm": 1}


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)]
)
def test_another_dtype_compiles_again(dtypes: tuple[torch.dtype, ...]) -> None:
    norm = torch.nn.RMSNorm(N, eps=1e-6, elementwise_affine=False)
    compiled = torch.compile(norm, backend="aiter")
    for dtype in dtypes:
        assert_close(compiled(rows(4, dtype=dtype)), norm(rows(4, dtype=dtype)))


@pytest.mark.parametrize("form", ["module", "method", "decorator", "partial", "bound"])
def test_forms_of_torch_compile(form: str) -> None:
    model, x = Block(), rows(8)
    wanted = model(x) + 1
    if form == "module":
        run: Any = torch.compile(model, backend="aiter")
        wanted = wanted - 1
    elif form == "method":
        model.compile(backend="aiter", fullgraph=True)
        run, wanted = model, wanted - 1
    elif form == "decorator":

        @torch.compile(backend="aiter", fullgraph=True)
        def run(x: torch.Tensor) -> torch.Tensor:
            return model(x) + 1
    elif form == "partial":
        run = torch.compile(functools.partial(_plus, model, number=1), backend="aiter")
    else:
        run = torch.compile(model.forward, backend="aiter")
        wanted = wanted - 1
    assert_close(run(x), wanted)
    assert fused(model) == {"rms_norm": 1, "layer_norm": 1}


def _plus(model: torch.nn.Module, x: torch.Tensor, *, number: int) -> torch.Tensor:
    return model(x) + number


@pytest.mark.parametrize("backward", [False, True])
def test_dynamic_batches(backward: bool) -> None:
    model = Block()
    compiled = torch.compile(model, backend="aiter", dynamic=True, fullgraph=True)
    for batch in (2, 5, 7):
        x = rows(batch, 3)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(backward):
            if backward:
                assert_close(gradients(compiled, model, x), gradients(model, model, x))
            else:
                assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    sites = aiter_inductor.report(model).sites
    assert len(sites) == 2
    assert all(re.search(r"num_rows=\S*s\d", site.problem) for site in sites), sites


def test_marked_batch_alone_is_dynamic() -> None:
    model = Block()
    compiled = torch.compile(model, backend="aiter", fullgraph=True)
    x = rows(4, 3)
    torch._dynamo.mark_dynamic(x, 0)
    assert_close(compiled(x), model(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(compiled(rows(9, 3)), model(rows(9, 3)))


def test_reset_between() -> None:
    model, x = Block(), rows(8)
    compiled = torch.compile(model, backend="aiter")
    for _ in range(2):
        assert_close(compiled(x), model(x))
        assert fused(compiled) == {"rms_norm": 1, "layer_norm": 1}
        torch._dynamo.reset()


def test_mutation_between_norms() -> None:
    norm = torch.nn.RMSNorm(N, eps=1e-6)

    def run(x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        y = norm(x)
        into.copy_(y)
        x.mul_(2)
        return norm(x) + into

    inputs = [(rows(4), torch.zeros(4, N)) for _ in range(2)]
    with torch.no_grad():
        assert_close(torch.compile(run, backend="aiter")(*inputs[0]), run(*inputs[1]))
    assert_close(inputs[0], inputs[1])


def test_a_report_belongs_to_the_tensors_of_a_graph() -> None:
    first, second, x = Block(), Block(), rows(8)
    second.before = first.before
    torch.compile(lambda x: first(x) + 1, backend="aiter")(x)
    torch.compile(lambda x: second(x) + 2, backend="aiter")(x)
    assert fused(first.linear) == fused(second.linear) == {"rms_norm": 1, "layer_norm": 1}
    assert fused(first.before) == {"rms_norm": 2, "layer_norm": 2}
    copied = copy.deepcopy(first)
    with pytest.raises(LookupError, match="no graph with parameters of this Block"):
        aiter_inductor.report(copied)
    torch.compile(copied, backend="aiter")(x)
    assert fused(copied) == {"rms_norm": 1, "layer_norm": 1}


def test_a_reset_forgets_reports() -> None:
    other, model, x = torch.nn.RMSNorm(N), Block(), rows(8)
    torch.compile(other, backend="aiter")(x)
    torch.compile(model, backend="aiter")(x)
    torch._dynamo.reset()
    with pytest.raises(LookupError, match="no graph with parameters of this Block"):
        aiter_inductor.report(model)
    torch.compile(model, backend="aiter")(x)
    assert fused(model) == {"rms_norm": 1, "layer_norm": 1}


def test_explaining_often_changes_nothing_for_the_program() -> None:
    model, x = Block(), rows(8)
    for _ in range(12):
        report = aiter_inductor.explain(model, x, target="gfx942")
        assert report.count("rms_norm", "fused") == 1
    compiled = torch.compile(model, backend="aiter")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert_close(compiled(x), model(x))
    assert fused(compiled) == {"rms_norm": 1, "layer_norm": 1}
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    aiter_inductor.explain(model, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1
    assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1


def test_two_blocks_of_one_class_have_paths_of_their_own() -> None:
    model = torch.nn.ModuleDict({"left": Block(), "right": torch.nn.Sequential(Block())})

    def run(x: torch.Tensor) -> torch.Tensor:
        return model["right"](model["left"](x))

    torch.compile(run, backend="aiter")(rows(8))
    paths = [site.module for site in aiter_inductor.report(model).sites]
    assert [path.rpartition("left")[1:] for path in paths[:2]] == [
        ("left", ".before"),
        ("left", ".after"),
    ]
    assert [path.rpartition("right")[1:] for path in paths[2:]] == [
        ("right", ".0.before"),
        ("right", ".0.after"),
    ]
    report = aiter_inductor.explain(torch.nn.Sequential(Block(), Block()), rows(8), target="gfx942")
    assert [site.module for site in report.sites] == ["0.before", "0.after", "1.before", "1.after"]
    assert all(site.source.startswith("test_contexts.py:") for site in report.sites), report.sites
