"""Sites of a model executed as AMD machine code, in the simulator, on the model's own tensors."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aiter_inductor.backend import plan_module
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.config import Options
from aiter_inductor.core.graph import module_path
from aiter_inductor.core.jit import JitWarning
from aiter_inductor.core.match import Derived, Match, Output
from aiter_inductor.core.op import Use


@dataclass(frozen=True)
class Captured:
    """One site of a model: what its op would get, and what the model computed instead.

    Attributes:
        match: the site.
        args, kwargs: the op's arguments, on the CPU.
        eager: per result of the op the tensor that the graph's own node gave, or None.
    """

    match: Match
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    eager: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Execution:
    """One site as one provider's machine code for one chip.

    Attributes:
        op, path: the fused op, and the module it stands in.
        provider: `triton` or `hip`.
        arch: `gfx942` or `gfx950`.
        error: largest difference from eager over all results.
        largest: largest magnitude among eager's results.
        seconds: compilation, unless cached, and simulation.
    """

    op: str
    path: str
    provider: str
    arch: str
    error: float
    largest: float
    seconds: float


def capture(
    model: Callable[..., Any], ops: Collection[str], *, target: str, **inputs: Any
) -> list[Captured]:
    """The first site of each op of `ops` in the graph that Dynamo captures, planned for `target`.

    The model runs once, eagerly, through that graph.

    Args:
        model: a module or function.
        ops: names of ops; one that has no site, or none that a kernel takes, is left out.
        inputs: keyword arguments of the model.

    Raises:
        UnknownTargetError: for a chip that is not known.
    """
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        decisions = plan_module(gm, Options(target=target))[gm.graph].decisions
        taken = [d.match for d in decisions if d.provider is not None and d.match.op.name in ops]
        first = {match.op.name: match for match in reversed(taken)}

        def run(*args: Any) -> Any:
            interpreter = _Watching(gm, first.values())
            result = interpreter.run(*args)
            found.extend(interpreter.captured(match) for match in first.values())
            return result

        return run

    torch.compile(model, backend=backend)(**inputs)
    order = list(ops)
    return sorted(found, key=lambda site: order.index(site.match.op.name))


def execute(site: Captured, arch: str) -> Iterator[Execution]:
    """Run `site` as the machine code of each provider that has some for `arch`, all checks on.

    Raises:
        SimulationError: for an access out of bounds, a race, a missing wait or another defect.
        JitWarning: if a HIP kernel does not build.
    """
    from aiter_inductor.kernels.hip import loading
    from aiter_inductor.kernels.triton import simulated

    simulating = {"triton": simulated.simulating, "hip": loading.simulating}
    op, use = site.match.op, Use(arch_named(arch))
    problem = op.problem(*site.args, **site.kwargs)
    for name, provider in op.providers.items():
        if name not in simulating or provider.refuse(problem, use) is not None:
            continue
        start = time.perf_counter()
        with simulating[name](arch), warnings.catch_warnings():
            warnings.simplefilter("error", JitWarning)
            results = provider.run(*site.args, **site.kwargs)
        seconds = time.perf_counter() - start
        pairs = list(_with_eager(site, results if isinstance(results, tuple) else (results,)))
        yield Execution(
            op=op.name,
            path=module_path(site.match.anchor) or "root",
            provider=name,
            arch=arch,
            error=max(float((ours - theirs).abs().max()) for ours, theirs in pairs),
            largest=max(float(theirs.abs().max()) for _, theirs in pairs),
            seconds=seconds,
        )


def _with_eager(site: Captured, results: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Results beside what eager has in their places, both in float32."""
    for result, output, eager in zip(results, site.match.outputs, site.eager, strict=True):
        if output is not None and eager is not None:
            yield _adapted(result, output).float(), eager.float()


def _adapted(result: Tensor, output: Output) -> Tensor:
    for function, args in output.adapt:
        result = function(result, *args)
    return result


class _Watching(fx.Interpreter):
    """Runs a graph as it is and keeps what the sites read and what stands for their results."""

    def __init__(self, gm: fx.GraphModule, matches: Collection[Match]) -> None:
        super().__init__(gm)
        outputs = [o.node for m in matches for o in m.outputs if o is not None]
        self._watched = {*outputs, *(node for match in matches for node in match.inputs())}
        self._values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, as the base class does."""
        value = super().run_node(n)
        if n in self._watched:
            # A later node may write in place: keep what the site saw.
            self._values[n] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
        return value

    def captured(self, match: Match) -> Captured:
        """What the run that is over gave for one site."""
        args = tuple(self._value(argument) for argument in match.args)
        kwargs = {name: self._value(argument) for name, argument in match.kwargs.items()}
        eager = tuple(None if o is None else self._values[o.node] for o in match.outputs)
        return Captured(match, args, kwargs, eager)

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self._values[argument]
        if isinstance(argument, Derived):
            args = (self._value(item) for item in argument.args)
            return argument.function(*args, **dict(argument.kwargs))
        if isinstance(argument, tuple | list):
            return type(argument)(self._value(item) for item in argument)
        return argument
