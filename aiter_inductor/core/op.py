"""Ops: what is computed, and who can compute it.

An `Op` is made by decorating its *reference*, an ordinary function of tensors. The reference's
signature becomes the schema, its body is the decomposition that Inductor compiles where no
provider is chosen, the fake function (shapes, dtypes and strides) and the oracle of every test.
Providers are added below it, in order of preference.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aiter_inductor.core import register
from aiter_inductor.core.arch import Arch
from aiter_inductor.core.errors import OpDefinitionError
from aiter_inductor.core.problem import Problem

OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Use:
    """Where an op would run: the chip, whether gradients flow, whether to skip measurements."""

    arch: Arch
    training: bool = False
    force: bool = False
    disabled: Callable[[str], str | None] = lambda name: None


Verdict = Callable[[Any, Use], str | None]
"""`(problem, use) -> None` to accept, or the sentence that says why not."""


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    Attributes:
        name: its technology: `triton`, `hip`, `ck`, `asm`, `vendor` (a library's own kernel),
            `cpp`, or `torch` (another formulation in ATen, which Inductor compiles).
        archs: the chips it is for; None means every chip that lists the technology.
        refuse: why it cannot run this problem, or None.
        decline: on what measurement Inductor's own code is preferred, or None. Not asked when the
            user forces kernels, nor by tests and benchmarks.
        run: same signature as the reference.
        traceable: Inductor may look inside `run` (Triton kernels and ATen calls only); otherwise
            the call stays opaque in the compiled graph.
    """

    name: str
    run: Callable[..., Any]
    archs: tuple[str, ...] | None
    refuse: Verdict
    decline: Verdict
    traceable: bool

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


def accept(problem: Problem, use: Use) -> str | None:
    """The verdict that never objects."""
    return None


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

    def select(self, problem: Problem, use: Use) -> Selection:
        """The first provider that takes `problem`, or None with each one's reason."""
        if use.training and not self.differentiable:
            return Selection(None, f"gradients flow through it and {self.name} has no backward")
        reasons = []
        serving = [p for p in self.providers.values() if p.serves(use.arch)]
        if not serving:
            return Selection(None, f"no {self.name} kernel for {use.arch}: Inductor compiles it")
        declined = False
        for provider in serving:
            reason = provider.refusal(problem, use)
            if reason is None and not use.force and (evidence := provider.decline(problem, use)):
                reason, declined = f"{provider.name}: {evidence}", True
            if reason is None:
                return Selection(provider, f"{provider.name} takes it")
            reasons.append(reason)
        return Selection(None, "; ".join(reasons), declined)

    def provider(
        self,
        name: str,
        *,
        archs: tuple[str, ...] | None = None,
        refuse: Verdict = accept,
        decline: Verdict = accept,
        traceable: bool = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add an implementation; the decorated function takes the reference's arguments.

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
            self.providers[name] = Provider(name, run, archs, refuse, decline, traceable)
            return run

        return add

    def backward(
        self, *saved: str
    ) -> Callable[[Callable[..., Mapping[str, torch.Tensor | None]]], None]:
        """Register the gradient.

        The decorated function gets a dict of the inputs (tensors named in `saved` and every
        non-tensor argument) and the output gradients, and returns gradients by argument name.
        Outputs may be saved too, as `output_0`, `output_1` and so on.
        """

        def add(formula: Callable[..., Mapping[str, torch.Tensor | None]]) -> None:
            register.autograd(self.name, self.signature, saved, formula)
            self.differentiable = True

        return add


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


def _resolve(made: Op, arguments: Mapping[str, Any]) -> register.Body:
    """Who runs a call: the provider named in the graph, else the one selected here and now."""
    named = str(arguments["provider"])
    inputs = {name: value for name, value in arguments.items() if name != "provider"}
    if named == "reference":
        return register.Body(made.reference, traceable=True)
    if named:
        provider: Provider | None = made.providers[named]
    else:
        provider = made.select(made.problem(**inputs), Use(register.arch_of_call(inputs))).provider
    if provider is None:
        return register.Body(made.reference, traceable=True)
    return register.Body(provider.run, provider.traceable)
