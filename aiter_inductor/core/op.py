"""Ops: what is computed, and who can compute it.

An `Op` is made by decorating its *reference*, an ordinary function of tensors. The reference's
signature becomes the schema, its body is the decomposition that Inductor compiles where no
provider is chosen, the fake function (shapes, dtypes and strides) and the oracle of every test.
Providers are added below it, in order of preference.
"""

from __future__ import annotations

import inspect
import itertools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aiter_inductor.core import register
from aiter_inductor.core.arch import Arch, arch_of
from aiter_inductor.core.errors import OpDefinitionError
from aiter_inductor.core.problem import Problem, fixed
from aiter_inductor.core.tuning import ByRows, Tables, Tuning

OPS: dict[str, Op] = {}
BY_ROWS = "rows:"
"""How a graph names the choice at run time: `rows:vendor,triton`."""


@dataclass(frozen=True)
class Use:
    """Where an op would run.

    Attributes:
        arch: the chip.
        training: gradients flow through it.
        force: measurements are not asked.
        disabled: the name by which a provider is switched off, or None.
        neighbour: a node of the program that Inductor would compute in one kernel with the op.
        replayed: Inductor captures the graph in a CUDA graph, so that launches cost the host
            nothing.
    """

    arch: Arch
    training: bool = False
    force: bool = False
    disabled: Callable[[str], str | None] = lambda name: None
    neighbour: str | None = None
    replayed: bool = False


Verdict = Callable[[Any, Use], str | None]
"""`(problem, use) -> None` to accept, or the sentence that says why not."""


def accept(problem: Problem, use: Use) -> str | None:
    """The verdict that never objects."""
    return None


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    Attributes:
        name: its technology: `triton`, `hip`, `cuda`, `cpp`, `ck`, `asm`, `vendor` (a library's own
            kernel), or `torch` (another formulation in ATen, which Inductor compiles).
        archs: the chips it is for; None means every chip that lists the technology.
        refuse: why it cannot run this problem, or None.
        decline: on what measurement Inductor's own code is preferred, or None. Not asked when the
            user forces kernels, nor by tests and benchmarks.
        run: same signature as the reference.
        traceable: Inductor may look inside `run` (Triton kernels and ATen calls only); otherwise
            the call stays opaque in the compiled graph.
        config: the class of its launch parameters, which `run` takes as `config`; None if it has
            none to choose.
        cede: why a provider after it goes first where no table decides, or None.
    """

    name: str
    run: Callable[..., Any]
    archs: tuple[str, ...] | None
    refuse: Verdict
    decline: Verdict
    traceable: bool
    config: Callable[[], type] | None = None
    cede: Verdict = accept

    def serves(self, arch: Arch) -> bool:
        """Whether it has a kernel for `arch`, for any problem."""
        return self.name in arch.providers and (self.archs is None or arch.name in self.archs)

    def refusal(self, problem: Problem, use: Use) -> str | None:
        """None if this provider, which serves the chip, can take `problem`, else why not."""
        if off := use.disabled(self.name):
            return f"{off} is disabled"
        reason = self.refuse(problem, use)
        return f"{self.name}: {reason}" if reason else None


@dataclass(frozen=True)
class Selection:
    """The outcome for one call.

    Attributes:
        provider: who takes it, or None.
        reason: why that one, or why nobody.
        declined: somebody could have taken it, but Inductor's own code is preferred.
    """

    provider: Provider | None
    reason: str
    declined: bool = False


@dataclass(eq=False)
class Op:
    """One semantic operation; see the module docstring."""

    name: str
    reference: Callable[..., Any]
    problem: Callable[..., Problem]
    signature: inspect.Signature
    mutates: tuple[str, ...]
    providers: dict[str, Provider] = field(default_factory=dict)
    differentiable: bool = False
    tables: Tables | None = None
    _by_rows: dict[str, Provider] = field(default_factory=dict)

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The registered operator, as it stands in graphs."""
        packet = getattr(torch.ops.aiter_inductor, self.name)
        overload: torch._ops.OpOverload = packet.default
        return overload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute through the dispatcher, so that autograd and tracing see one operator."""
        return self.overload(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments by name, defaults included."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def outcome(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What `run`, in place of this op, returns, and behind it the arguments that it writes to.

        It writes to copies of them, with the same strides.
        """
        if not self.mutates:
            return run(*args, **kwargs)
        inputs = self.bind(*args, **kwargs)
        inputs |= {name: _copied(inputs[name]) for name in self.mutates}
        returned = run(**inputs)
        results = () if returned is None else (returned,)
        return (*results, *(inputs[name] for name in self.mutates))

    def select(self, problem: Problem, use: Use) -> Selection:
        """The first provider that takes `problem`, or None with each one's reason."""
        if use.training and not self.differentiable:
            return Selection(None, f"gradients flow through it and {self.name} has no backward")
        reasons, takers = [], []
        serving = [p for p in self.providers.values() if p.serves(use.arch)]
        if not serving:
            return Selection(None, f"no {self.name} kernel for {use.arch}: Inductor compiles it")
        declined = False
        for provider in serving:
            reason = provider.refusal(problem, use)
            if reason is None and not use.force and (evidence := provider.decline(problem, use)):
                reason, declined = f"{provider.name}: {evidence}", True
            if reason is None:
                takers.append(provider)
                if self.tables is None and not provider.cede(problem, use):
                    break
            else:
                reasons.append(reason)
        if not takers:
            return Selection(None, _sentences(reasons), declined)
        if self.tables is None:
            return _first(takers, problem, use)
        return self._fastest(self.tables, takers, problem, use)

    def _fastest(
        self, tables: Tables, takers: list[Provider], problem: Problem, use: Use
    ) -> Selection:
        """By the tuned table; where it says nothing, the first of `takers`.

        For an open number of rows, either the one provider that is fastest at all of them and
        chooses its launch parameters when called, or `by_rows`.
        """
        rows, key = tables.tuning.of_problem(problem)
        ladder = tables.ladder(use.arch, key, [p.name for p in takers])
        if (size := fixed(rows)) is not None:
            step = ladder.at(size) if ladder else None
            if step is None:
                return _first(takers, problem, use)
            measured = f"{step.latency_us:.4g} µs at {tables.tuning.rows}={step.rows}"
            return Selection(self.providers[step.provider], f"{step.provider} took {measured}")
        names = ladder.providers() if ladder else (takers[0].name,)
        first = self.providers[names[0]]
        if len(names) == 1 and not (first.traceable and first.config):
            return Selection(first, f"{first.name} takes it")
        shown = " or ".join(names)
        return Selection(self.by_rows(names), f"{shown}, by {tables.tuning.rows} when called")

    def named(self, provider: str) -> Provider:
        """The provider that a graph names, `by_rows` included.

        Raises:
            KeyError: if this op has none of that name.
        """
        if provider.startswith(BY_ROWS):
            return self.by_rows(tuple(provider.removeprefix(BY_ROWS).split(",")))
        return self.providers[provider]

    def by_rows(self, names: tuple[str, ...]) -> Provider:
        """The provider that asks the table at each call who of `names` is to compute it."""
        assert self.tables is not None
        name = BY_ROWS + ",".join(names)
        if name not in self._by_rows:
            runs = {each: self.providers[each].run for each in names}
            run = ByRows(self.tables, runs, arch_of)
            self._by_rows[name] = Provider(name, run, None, accept, accept, traceable=False)
        return self._by_rows[name]

    def tuned(self, tuning: Tuning) -> None:
        """Choose among providers, and their launch parameters, by tables with this key."""

        def configs() -> dict[str, type | None]:
            return {p.name: p.config() if p.config else None for p in self.providers.values()}

        self.tables = Tables(self.name, tuning, configs)

    def provider(
        self,
        name: str,
        *,
        archs: tuple[str, ...] | None = None,
        refuse: Verdict = accept,
        decline: Verdict = accept,
        traceable: bool = False,
        config: Callable[[], type] | None = None,
        cede: Verdict = accept,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add an implementation; the decorated function takes the reference's arguments.

        One with a `config` class also takes an instance of it as keyword `config`.

        Raises:
            OpDefinitionError: if the name is taken or the parameters differ from the reference's.
        """

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            if name in self.providers:
                raise OpDefinitionError(f"{self.name} already has a provider called {name!r}")
            theirs, ours = list(inspect.signature(run).parameters), list(self.signature.parameters)
            if theirs != ours:
                raise OpDefinitionError(
                    f"provider {name!r} of {self.name} takes {theirs}, the reference takes {ours}"
                )
            made = Provider(name, run, archs, refuse, decline, traceable, config, cede)
            self.providers[name] = made
            return run

        return add

    def backward(
        self, *saved: str, zeros: bool = True
    ) -> Callable[[Callable[..., Mapping[str, torch.Tensor | None]]], None]:
        """Register the gradient.

        The decorated function gets a dict of the inputs (tensors named in `saved` and every
        non-tensor argument) and the output gradients, and returns gradients by argument name.
        Outputs may be saved too, as `output_0`, `output_1` and so on. `needed` tells by name which
        gradients are asked for. The gradient of an output that nobody read is zeros, or None
        without `zeros`.
        """

        def add(formula: Callable[..., Mapping[str, torch.Tensor | None]]) -> None:
            register.autograd(self.name, self.signature, saved, formula, zeros)
            self.differentiable = True

        return add


def _sentences(reasons: list[str]) -> str:
    """One sentence for each reason, `triton and hip: why` where providers share it."""
    names: dict[str, list[str]] = {}
    for reason in reasons:
        name, colon, why = reason.partition(": ")
        names.setdefault(why if colon else reason, []).append(name if colon else "")
    return "; ".join(f"{' and '.join(who)}: {why}" if who[0] else why for why, who in names.items())


def _first(takers: list[Provider], problem: Problem, use: Use) -> Selection:
    """The first that does not cede to one after it, or the first of all."""
    ceding = list(itertools.takewhile(lambda p: p.cede(problem, use), takers))
    if not ceding or len(ceding) == len(takers):
        return Selection(takers[0], f"{takers[0].name} takes it")
    chosen = takers[len(ceding)]
    return Selection(chosen, f"{chosen.name} takes it: {ceding[0].cede(problem, use)}")


def op(
    *, problem: Callable[..., Problem], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Op]:
    """Turn a reference into an `Op` registered as `aiter_inductor::<its name>`.

    Args:
        problem: builds the op's problem from the reference's arguments.
        mutates: names of the tensor arguments that the op writes to; exactly those.

    Raises:
        OpDefinitionError: if an op of that name exists.
    """

    def define(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        if name in OPS:
            raise OpDefinitionError(f"an op called {name!r} exists already")
        hints = typing.get_type_hints(reference)
        if hints.get("return") is type(None):
            hints["return"] = None  # as a schema spells it
        reference.__annotations__ = hints
        made = Op(name, reference, problem, inspect.signature(reference), mutates)
        made.__doc__ = reference.__doc__
        register.operator(name, reference, mutates, lambda arguments: _resolve(made, arguments))
        OPS[name] = made
        return made

    return define


def _copied(x: torch.Tensor) -> torch.Tensor:
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((size,), (1,)).clone().as_strided(x.shape, x.stride())


def _resolve(made: Op, arguments: Mapping[str, Any]) -> register.Body:
    """Who runs a call: the provider named in the graph, else the one selected here and now."""
    named = str(arguments["provider"])
    inputs = {name: value for name, value in arguments.items() if name != "provider"}
    if named == "reference":
        return register.Body("reference", made.reference, traceable=True)
    if named:
        provider: Provider | None = made.named(named)
    else:
        provider = made.select(made.problem(**inputs), Use(register.arch_of_call(inputs))).provider
    if provider is None:
        return register.Body("reference", made.reference, traceable=True)
    return register.Body(provider.name, provider.run, provider.traceable)
