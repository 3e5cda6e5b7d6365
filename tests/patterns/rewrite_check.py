"""Capture a program, plan it for a chip that is not here, rewrite it and compare with eager."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils import _pytree as pytree

from aiter_inductor.backend import plan
from aiter_inductor.core import inductor
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.config import Options
from aiter_inductor.core.dtypes import QUANT_DTYPES
from aiter_inductor.core.match import Miss
from aiter_inductor.core.op import Op, Provider, Selection, accept
from aiter_inductor.core.plan import Decision, raise_matches
from aiter_inductor.core.rewrite import apply
from aiter_inductor.patterns import RAISING

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}
"""Relative and absolute: two roundings of the dtype, where eager rounds between steps too."""


@dataclass
class Rewritten:
    """What a program became, over all its graphs."""

    decisions: list[Decision] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inserted: int = 0
    graphs: list[str] = field(default_factory=list)

    def count(self) -> dict[str, int]:
        """How many sites of each pattern were recognised."""
        return dict(Counter(leaf.pattern for d in self.decisions for leaf in d.match.leaves()))

    def reasons(self) -> list[str]:
        """Every sentence that says why something was not taken."""
        left = [d.reason for d in self.decisions if d.provider is None]
        return [miss.reason for miss in self.misses] + left


def check_rewrite(
    model: Callable[..., Any],
    *args: Any,
    expect: Mapping[str, int],
    dynamic: bool | None = None,
    target: str = "gfx942",
    backward: bool = False,
    inserted: int | None = None,
) -> Rewritten:
    """Assert that exactly `expect` sites are recognised and the rewritten program equals eager.

    The operators run their references on the CPU in place of a provider, so that everything but
    the kernels is what a chip would get: leaks, placement, shapes, dtypes and strides.

    Args:
        model: a function or module.
        args: its inputs; dimensions marked dynamic stay so.
        expect: sites per pattern.
        dynamic: as for `torch.compile`.
        target: the chip to plan for.
        backward: capture for training, and compare gradients as well.
        inserted: operators the rewritten graphs must hold; None means one a site, less what
            fusions merged.
    """
    result = Rewritten()

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for module in list(gm.modules()):
            if isinstance(module, fx.GraphModule):
                rewrite(module, target, result)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=capture, dynamic=dynamic)
    with torch.set_grad_enabled(backward):
        wanted, wanted_gradients = _run(model, model, args, backward)
        got, gradients = _run(compiled, model, args, backward)
    assert result.count() == dict(expect), (result.count(), result.reasons(), result.graphs)
    number = inserted if inserted is not None else len(result.decisions)
    assert result.inserted == number, (result.inserted, result.reasons(), result.graphs)
    compare(got, wanted)
    compare_gradients(gradients, wanted_gradients)
    return result


def compare(got: Any, wanted: Any) -> None:
    """Equal structure, dtypes, shapes and strides; values within the rounding of their dtype."""
    ours, our_tree = pytree.tree_flatten(got)
    theirs, their_tree = pytree.tree_flatten(wanted)
    assert our_tree == their_tree
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, torch.Tensor):
            assert a == b
            continue
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        if b.dtype in QUANT_DTYPES:
            _compare_quantised(a, b)
        else:
            near = TOLERANCE.get(b.dtype, 0.0)
            torch.testing.assert_close(a, b, rtol=near, atol=near, equal_nan=True)


def compare_gradients(got: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Gradients sum many rounded terms, so they are held to the scale of the whole tensor."""
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            near = 2 * TOLERANCE[b.dtype]
            torch.testing.assert_close(a, b, rtol=near, atol=near * float(b.abs().max()))


def _compare_quantised(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for single steps in 1 % of the elements: those that lie on a rounding boundary."""
    codes = [t.view(torch.int8).to(torch.int16) for t in (got, wanted)]
    steps = (codes[0] - codes[1]).abs()
    assert (steps <= 1).all(), f"{int((steps > 1).sum())} elements differ by more than one step"
    assert (steps > 0).float().mean() <= 0.01 or steps.sum() <= 1


def _run(
    run: Callable[..., Any], model: Any, args: tuple[Any, ...], backward: bool
) -> tuple[Any, list[Any]]:
    """What `run` returns, and the gradients of every input and parameter that wants one."""
    if not backward:
        return run(*args), []
    leaves = [a for a in pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
    if isinstance(model, torch.nn.Module):
        leaves += list(model.parameters())
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    out = run(*args)
    # The cosine keeps the gradient from vanishing: a norm's output has a constant sum of squares.
    loss = sum(
        t.double().cos().sum()
        for t in pytree.tree_leaves(out)
        if isinstance(t, torch.Tensor) and t.requires_grad
    )
    loss.backward()
    return pytree.tree_map(_detached, out), [leaf.grad for leaf in leaves]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def rewrite(gm: fx.GraphModule, target: str, result: Rewritten) -> None:
    """Plan one graph and rewrite it, with references for kernels; `result` gets what was done."""
    with inductor.fake_mode_of(gm.graph), mock.patch.object(Op, "select", _take_reference):
        result.misses += raise_matches(gm.graph, RAISING).misses
        planned = plan(gm.graph, Options(force=True, strict=True), arch_named(target))
        result.decisions += planned.decisions
        result.notes += planned.report.notes
        result.inserted += apply(gm.graph, planned.decisions)
    gm.recompile()
    result.graphs.append(str(gm.graph))


def _take_reference(made: Op, problem: Any, use: Any) -> Selection:
    if use.training and not made.differentiable:
        return Selection(None, f"gradients flow through it and {made.name} has no backward")
    provider = Provider("reference", made.reference, None, accept, accept, traceable=True)
    return Selection(provider, "the reference takes it")
