"""From a declared variant of a HIP source to a kernel that can be launched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol

import torch

from aiter_inductor.core import jit
from aiter_inductor.core.arch import KNOWN, arch_of
from aiter_inductor.core.launch import Kernel, KernelSignature, SimulatedKernel

HOST = "host"
_HERE = Path(__file__).parent
_HOST_WAVE = 64

CPP_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e4m3fnuz: "fp8_e4m3fnuz",
    torch.int8: "int8",
}


class Variant(Protocol):
    """One compilation of a source: hashable, and able to say how it is built and launched."""

    def __hash__(self) -> int:
        """Of all that shapes the compilation."""

    def module(self) -> jit.Module:
        """Source and definitions."""

    def signature(self) -> KernelSignature:
        """The kernel's symbol and parameters; a variant is one kernel of its module."""


def hip_module(name: str, source: str, **defines: object) -> jit.Module:
    """A module of a source in this folder; True and False become 1 and 0."""
    return module_of(name, _HERE / source, defines)


def module_of(name: str, source: Path, defines: Mapping[str, object]) -> jit.Module:
    """A module of one source with these definitions, as `hip_module` writes them."""
    written = {
        macro: str(int(value)) if isinstance(value, bool) else str(value)
        for macro, value in defines.items()
    }
    return jit.Module(name, (source,), defines=tuple(sorted(written.items())))


def arch_name(device: torch.device) -> str:
    """What a kernel for `device` is built for: `gfx…`, `sm_…`, or `host` for a CPU."""
    if device.type == "cpu":
        return _simulated.get() or HOST
    if device.type == "meta":
        return _collected.get().arch
    return arch_of(device).name


@contextmanager
def simulating(arch: str) -> Iterator[None]:
    """Within, kernels on CPU tensors run as the machine code of `gfx942` or `gfx950`, simulated."""
    token = _simulated.set(arch)
    try:
        yield
    finally:
        _simulated.reset(token)


@contextmanager
def collecting_modules(arch: str) -> Iterator[list[jit.Module]]:
    """Within, host functions on meta tensors launch nothing; the modules they need are collected.

    What `prebuild` builds for a model: run its kernels' host functions on meta tensors.
    """
    with _collecting(arch) as collected:
        yield collected.modules


@contextmanager
def collecting_variants(arch: str) -> Iterator[list[Variant]]:
    """The same, kernel by kernel: a module may hold several, of which a call needs some."""
    with _collecting(arch) as collected:
        yield collected.variants


def wave_size(arch: str) -> int:
    """Lanes that reduce among themselves without shared memory."""
    return KNOWN[arch].wave_size if arch in KNOWN else _HOST_WAVE


@dataclass(frozen=True)
class _Collected:
    arch: str
    modules: list[jit.Module]
    variants: list[Variant]


_simulated: ContextVar[str | None] = ContextVar("simulated", default=None)
_collected: ContextVar[_Collected] = ContextVar("collected")


@contextmanager
def _collecting(arch: str) -> Iterator[_Collected]:
    collected = _Collected(arch, [], [])
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


class _Declared:
    """Stands in for a kernel on meta tensors: launching it notes the kernel and its module."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._module = variant.module()

    def launch(self, *_: object) -> None:
        collected = _collected.get()
        if self._module not in collected.modules:
            collected.modules.append(self._module)
        if self._variant not in collected.variants:
            collected.variants.append(self._variant)


@cache
def load_kernel(
    variant: Variant, arch: str, device_type: str
) -> Kernel | SimulatedKernel | _Declared:
    """The kernel for tensors on a device of this type, built if need be.

    Raises:
        BuildError: if it cannot be built.
        RuntimeLibraryError: if there is no runtime library to launch it with.
    """
    if device_type == "meta":
        return _Declared(variant)
    settings = jit.default_settings()
    artifact = jit.load(variant.module(), arch, settings)
    if device_type == "cpu" and arch != HOST:
        return SimulatedKernel(artifact, variant.signature())
    return Kernel(artifact, variant.signature(), settings)


def why_not_ready(variant: Variant, arch: str) -> str | None:
    """None once the kernel is built; until then a sentence, and a build in the background."""
    outcome = _background().poll(variant.module(), arch)
    return outcome if isinstance(outcome, str) else None


@lru_cache
def _background() -> jit.BackgroundBuilds:
    return jit.BackgroundBuilds(jit.default_settings())
