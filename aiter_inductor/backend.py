"""`torch.compile(model, backend="aiter")`.

The whole pipeline, read aloud: `plan` finds what Dynamo's graph means, what of it may run together
and who computes it; `aiter` carries the plan out and hands the graph to Inductor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core import config, inductor
from aiter_inductor.core.arch import Arch, arch_named, arch_of
from aiter_inductor.core.effects import effects_of
from aiter_inductor.core.faults import Faults
from aiter_inductor.core.graph import value
from aiter_inductor.core.op import Use
from aiter_inductor.core.plan import Decision, Selector, fuse_matches, raise_matches
from aiter_inductor.core.record import forget, remember
from aiter_inductor.core.report import Report
from aiter_inductor.core.rewrite import apply
from aiter_inductor.core.sites import sites_of
from aiter_inductor.core.switches import switching_nothing
from aiter_inductor.fine_grained_fp8 import provide_missing_fp8_kernels
from aiter_inductor.patterns import FUSION, PATTERNS, RAISING


@dataclass(frozen=True)
class Plan:
    """What will be done to one graph, and the report of it."""

    decisions: tuple[Decision, ...]
    report: Report


def plan(
    graph: fx.Graph,
    options: config.Options,
    arch: Arch,
    number: int = 0,
    *,
    replayed: bool = False,
) -> Plan:
    """Decide every site of `graph`, which CUDA graphs may replay, without changing it."""
    faults = Faults(options.strict)
    raised = raise_matches(graph, RAISING, faults)
    notes = fuse_matches(raised.matches, FUSION, options, faults)
    selector = Selector(effects_of(graph), options, Use(arch, replayed=replayed), faults)
    decisions = tuple(d for match in raised.matches.found for d in selector.decide(match))
    effects_of.cache_clear()
    sites = sites_of(graph, decisions, raised.misses, number)
    notes += switching_nothing(options, PATTERNS, (site.module for site in sites))
    return Plan(decisions, Report(arch.name, 1, sites, (*notes, *faults.sentences)))


def plan_module(
    gm: fx.GraphModule, options: config.Options, *, replayed: bool = False
) -> dict[fx.Graph, Plan]:
    """A plan for every graph of `gm`: its own and those of checkpointed or conditional regions."""
    plans = {}
    for number, graph in enumerate(_graphs(gm)):
        arch = arch_named(options.target) if options.target else _arch_of_graph(graph)
        contained, first = Faults(options.strict).contained, next(iter(graph.nodes))
        with inductor.fake_mode_of(graph), contained(f"planning graph {number}", first) as step:
            plans[graph] = plan(graph, options, arch, number, replayed=replayed)
        if step.fault:
            plans[graph] = Plan((), Report(arch.name, 1, (), (step.fault,)))
    return plans


def aiter(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """Compile a captured graph: the backend function that Dynamo calls.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, in order.
        mode: `default`, `reduce-overhead`, `max-autotune` or `max-autotune-no-cudagraphs`.
        options: Inductor's options, and this backend's under the prefix `aiter.`.

    Raises:
        UnknownOptionError: for an option that neither has, naming the nearest one.
        OptionValueError: for a value of the wrong type.
    """
    ours, patches = inductor.split_options(mode, options or {})
    replayed = inductor.uses_cuda_graphs(patches)
    plans = plan_module(gm, config.Options.read(ours), replayed=replayed)
    report = sum_reports([p.report for p in plans.values()])
    remember(report, inductor.frame_being_compiled(), example_inputs)
    if config.report_requested():
        print(report, file=sys.stderr)
    for graph, planned in plans.items():
        with inductor.fake_mode_of(graph):
            taken = apply(graph, planned.decisions)
        if taken:
            inductor.recompile(gm)
    return inductor.compile_graph(gm, example_inputs, patches)


def reset() -> None:
    """What `torch._dynamo.reset()` calls: no compiled graph stays in use."""
    inductor.reset()
    forget()


aiter.reset = reset  # type: ignore[attr-defined]

# Dynamo imports this module before it traces: an FP8 model that could not even be traced now can.
provide_missing_fp8_kernels()


def sum_reports(reports: Sequence[Report]) -> Report:
    """One report over several graphs."""
    total = reports[0]
    for report in reports[1:]:
        total = total + report
    return total


def _graphs(gm: fx.GraphModule) -> Iterator[fx.Graph]:
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield module.graph


def _arch_of_graph(graph: fx.Graph) -> Arch:
    """The chip that holds the first tensor on an accelerator, else the CPU."""
    for node in graph.nodes:
        found = value(node)
        if isinstance(found, torch.Tensor) and found.device.type not in ("cpu", "meta"):
            return arch_of(found.device)
    return arch_of(torch.device("cpu"))
