"""Which code objects a plan would load, on a chip that need not be here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core import jit
from aiter_inductor.core.match import Match, fake
from aiter_inductor.core.plan import Decision
from aiter_inductor.core.problem import fixed
from aiter_inductor.core.report import Report, Site

Key = tuple[str, str, str]


def with_code_objects(report: Report, decisions: Iterable[Decision]) -> Report:
    """`report`, each of whose fused sites names the code objects that its kernel comes from."""
    known: dict[Key, tuple[str, ...]] = {}
    for decision in decisions:
        if decision.provider is None:
            continue
        key = (decision.match.op.name, decision.provider.name, decision.problem)
        if key not in known and decision.provider.name in _NAMING:
            known[key] = _NAMING[decision.provider.name](decision, report.target)
    return replace(report, sites=tuple(_named(site, known) for site in report.sites))


def on_meta(match: Match) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a match's op as meta tensors."""
    args = tuple(_as_meta(fake(argument)) for argument in match.args)
    return args, {key: _as_meta(fake(argument)) for key, argument in match.kwargs.items()}


def _as_meta(value: Any) -> Any:
    """A tensor of the same sizes and strides without memory; others unchanged."""
    if not isinstance(value, Tensor):
        return value
    sizes, strides = ([fixed(n) or 1 for n in of] for of in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def _named(site: Site, known: Mapping[Key, tuple[str, ...]]) -> Site:
    key = (site.fused_into or "", site.provider or "", site.problem)
    return replace(site, code_objects=known.get(key, ()))


def _run_on_meta(decision: Decision) -> None:
    args, kwargs = on_meta(decision.match)
    if decision.provider is not None:
        decision.provider.run(*args, **kwargs)


def _of_hip(decision: Decision, arch: str) -> tuple[str, ...]:
    """File names in the cache of built modules, with what is known of each."""
    from aiter_inductor.kernels.hip.loading import collecting_modules

    with collecting_modules(arch) as modules:
        _run_on_meta(decision)
    return tuple(_hip_file(module, arch) for module in modules)


def _hip_file(module: jit.Module, arch: str) -> str:
    try:
        artifact = jit.find(module, arch, jit.default_settings())
    except jit.BuildError as error:
        return f"{module.name}: {error}"
    if artifact is None:
        return f"{module.name}: not built yet"
    return f"{artifact.path.parent.name}/{artifact.path.name} sha256:{artifact.sha256[:12]}"


def _of_triton(decision: Decision, arch: str) -> tuple[str, ...]:
    """What Triton compiles for these sizes, by name and hash; compiled now if it never was."""
    from aiter_inductor.kernels.triton.simulated import compiling

    with compiling(arch) as compiled:
        _run_on_meta(decision)
    hashes = {each.name: hashlib.sha256(each.binary).hexdigest()[:12] for each in compiled}
    return tuple(f"{name}.hsaco sha256:{digest}" for name, digest in hashes.items())


_NAMING: Mapping[str, Callable[[Decision, str], tuple[str, ...]]] = {
    "hip": _of_hip,
    "triton": _of_triton,
}
"""Providers whose kernels are code objects; others are a library's or Inductor's own."""
