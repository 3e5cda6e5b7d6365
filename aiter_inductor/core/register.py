"""The torch.library ceremony behind `Op`, in one place.

Every operator carries one extra keyword, `provider`: the plan writes the chosen provider into the
graph there, so that graph caches distinguish plans. Empty means "select when called".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import Library

from aiter_inductor.core.arch import Arch, arch_of

NAMESPACE = "aiter_inductor"
_library = Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Body:
    """The function that computes one call, by whom, and whether a tracer may look inside it."""

    provider: str
    run: Callable[..., Any]
    traceable: bool


def operator(
    name: str,
    reference: Callable[..., Any],
    mutates: tuple[str, ...],
    resolve: Callable[[Mapping[str, Any]], Body],
) -> None:
    """Define `aiter_inductor::<name>` with the reference as fake function."""
    signature = _with_provider(inspect.signature(reference))
    bind = _binder(signature)
    _library.define(
        name + _schema(reference, signature, mutates), tags=(torch.Tag.pt2_compliant_tag,)
    )

    def compute(*args: Any, **kwargs: Any) -> Any:
        inputs = bind(args, kwargs)
        body = resolve(inputs)
        return _call(body.run, inputs)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return _call(reference, bind(args, kwargs))

    def trace(mode: Any, overload: Any, types: Any, args: Any, kwargs: Any) -> Any:
        body = resolve(bind(args, kwargs or {}))
        if not body.traceable:
            # What was selected here is not selected again at each call of the compiled graph.
            named = {**(kwargs or {}), "provider": body.provider}
            return mode.__torch_dispatch__(overload, types, args, named)
        with mode:
            return _call(body.run, bind(args, kwargs or {}))

    qualified = f"{NAMESPACE}::{name}"
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    # Functionalisation is where torch.library.triton_op expands too: below autograd, above the
    # tracer, so a kernel's writes to its own outputs become functional.
    _defer_torch_dispatch(qualified, trace)


def autograd(
    name: str,
    signature: inspect.Signature,
    saved: tuple[str, ...],
    formula: Callable[..., Mapping[str, torch.Tensor | None]],
    zeros: bool = True,
) -> None:
    """Register `formula` as the gradient of `aiter_inductor::<name>`; see `Op.backward`."""
    positional = [p.name for p in signature.parameters.values() if p.kind != p.KEYWORD_ONLY]

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        given = {**dict(zip(positional, inputs, strict=True)), **keyword_only_inputs}
        given |= {f"output_{index}": made for index, made in enumerate(outputs)}
        ctx.plain = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
        ctx.names = tuple(n for n in saved if isinstance(given[n], torch.Tensor))
        ctx.set_materialize_grads(zeros)
        ctx.save_for_backward(*(given[n] for n in ctx.names))

    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        inputs = {**ctx.plain, **dict(zip(ctx.names, ctx.saved_tensors, strict=True))}
        needed = dict(zip(positional, ctx.needs_input_grad, strict=False))
        found = formula({**inputs, "needed": needed}, *grads)
        return tuple(found.get(n) if needed.get(n) else None for n in positional)

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
    )


def arch_of_call(inputs: Mapping[str, Any]) -> Arch:
    """The chip that holds the first tensor among `inputs`."""
    for value in inputs.values():
        if isinstance(value, torch.Tensor):
            return arch_of(value.device)
    return arch_of(torch.device("cpu"))


def _with_provider(signature: inspect.Signature) -> inspect.Signature:
    extra = inspect.Parameter("provider", inspect.Parameter.KEYWORD_ONLY, default="")
    return signature.replace(parameters=[*signature.parameters.values(), extra])


def _schema(
    reference: Callable[..., Any], signature: inspect.Signature, mutates: tuple[str, ...]
) -> str:
    schema: str = torch.library.infer_schema(reference, mutates_args=mutates)
    inputs, arrow, outputs = schema.rpartition(" -> ")
    has_keywords = any(p.kind == p.KEYWORD_ONLY for p in list(signature.parameters.values())[:-1])
    separator = ", " if has_keywords else ", *, "
    return f'{inputs[:-1]}{separator}str provider=""){arrow}{outputs}'


def _binder(
    signature: inspect.Signature,
) -> Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]:
    """`signature.bind` with defaults applied, at a tenth of its 8 µs.

    Only for calls that the dispatcher has checked against the schema.
    """
    parameters = signature.parameters.values()
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    given = {p.name: None if p.default is p.empty else p.default for p in parameters}

    def bind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**given, **dict(zip(names, args, strict=False)), **kwargs}

    return bind


def _call(function: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    return function(**{name: value for name, value in inputs.items() if name != "provider"})


def _defer_torch_dispatch(qualified: str, rule: Callable[..., Any]) -> None:
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, rule, lib=_library)
