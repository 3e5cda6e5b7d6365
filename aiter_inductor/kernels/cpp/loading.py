"""Builds the C++ sources of this folder and loads them."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from aiter_inductor.core import jit

HOST = "host"
_HERE = Path(__file__).parent
_CPU_INFO = Path("/proc/cpuinfo")
_FLAGS = ("-O3", "-fno-math-errno")
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512_BF16 = (*_AVX512, "avx512vbmi", "avx512_bf16")


def cpu_module(name: str, source: str, features: frozenset[str]) -> jit.Module:
    """A module of a source in this folder, for a CPU with these features.

    The features are flags, and so part of the cache key: a home directory may be shared by
    machines of several kinds, for which `-march=native` would name one and the same binary.
    """
    return jit.Module(name, (_HERE / source,), flags=(*_FLAGS, *instruction_flags(features)))


def instruction_flags(features: frozenset[str]) -> tuple[str, ...]:
    """The compiler's flags for the widest set of instructions within `features`."""
    for wanted in (_AVX512_BF16, _AVX512, _AVX2):
        if features.issuperset(wanted):
            return tuple(f"-m{feature.replace('_', '')}" for feature in wanted)
    return ()


@cache
def cpu_features() -> frozenset[str]:
    """What this CPU can do, as Linux names it; nothing elsewhere, which is slow but runs."""
    if not _CPU_INFO.is_file():
        return frozenset()
    for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


@cache
def load_library(name: str, source: str, features: frozenset[str]) -> ctypes.CDLL:
    """The library of a source in this folder, built if need be.

    Raises:
        BuildError: if there is no compiler, or with its lines where it failed.
    """
    artifact = jit.load(cpu_module(name, source, features), HOST, jit.default_settings())
    return ctypes.CDLL(str(artifact.path))
