"""The compilers that can build a module, and the commands that each would run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aiter_inductor.core.jit.errors import BuildError
from aiter_inductor.core.jit.module import Module

_HERE = Path(__file__).parent
_AMD_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-Wall", "-Wno-unused-function")
_HOST_FLAGS = ("-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unused-function")


@dataclass(frozen=True)
class Edge:
    """One command of a build; paths that are not absolute lie in the build directory."""

    output: str
    inputs: tuple[str, ...]
    command: tuple[str, ...]


class Compiler(Protocol):
    """Turns a module into the commands that build it."""

    @property
    def identity(self) -> str:
        """Name and version; part of the cache key."""

    def edges(self, module: Module, arch: str) -> tuple[Edge, ...]:
        """The commands, the last of which writes `artifact_name(module, arch)`."""


def artifact_name(module: Module, arch: str) -> str:
    """File name of what a build is for: `.co` for AMD, `.cubin` for NVIDIA, `.so` for the host."""
    suffix = "co" if arch.startswith("gfx") else "cubin" if arch.startswith("sm_") else "so"
    return f"{module.name}.{suffix}"


def listing_name(module: Module) -> str:
    """File name of the assembly text that AMD builds through clang leave beside the artifact."""
    return f"{module.name}.s"


def _specific(arch: str) -> str:
    """The target with all instructions of `arch`: wgmma and setmaxnreg exist for sm_90a only.

    Such a binary runs on every chip of compute capability 9.0, which is all that sm_90 means here.
    """
    return f"{arch}a" if arch == "sm_90" else arch


def _only_source(module: Module, arch: str) -> Path:
    if len(module.sources) != 1:
        raise BuildError(
            f"{module.name} has {len(module.sources)} sources; a code object for {arch} takes one"
        )
    return module.sources[0]


def _to_listing(clang: tuple[str, ...], module: Module, arch: str) -> Edge:
    source, listing = str(_only_source(module, arch)), listing_name(module)
    hip = ("-x", "hip", "--cuda-device-only", f"--offload-arch={arch}", "-nogpuinc", "-nogpulib")
    command = (*clang, *hip, *_AMD_FLAGS, *module.arguments(), "-S", source, "-o", listing)
    return Edge(listing, (source,), command)


def _listing_edges(clang: tuple[str, ...], module: Module, arch: str) -> tuple[str, list[Edge]]:
    """The assembly text to assemble, and what writes it; hand-written text is taken as it is."""
    source = _only_source(module, arch)
    if source.suffix == ".s":
        return str(source), []
    return listing_name(module), [_to_listing(clang, module, arch)]


@dataclass(frozen=True)
class RocmClang:
    """amdclang++, or the clang++ beside hipcc: compiles, assembles and links by itself."""

    path: Path
    version: str

    @property
    def identity(self) -> str:
        """Name and version."""
        return f"rocm-clang {self.version}"

    def edges(self, module: Module, arch: str) -> tuple[Edge, ...]:
        """Source to assembly text to code object."""
        listing, edges = _listing_edges((str(self.path),), module, arch)
        output = artifact_name(module, arch)
        target = ("-x", "assembler", "-target", "amdgcn-amd-amdhsa", f"-mcpu={arch}", "-nogpulib")
        command = (str(self.path), *target, listing, "-o", output)
        return (*edges, Edge(output, (listing,), command))


@dataclass(frozen=True)
class ZigClang:
    """clang of the `ziglang` wheel, which lacks a linker, then Triton's assembler and linker."""

    path: Path
    version: str

    @property
    def identity(self) -> str:
        """Name and versions of both wheels."""
        return f"zig-clang {self.version}"

    def edges(self, module: Module, arch: str) -> tuple[Edge, ...]:
        """Source to assembly text to code object."""
        listing, edges = _listing_edges((str(self.path), "clang"), module, arch)
        output = artifact_name(module, arch)
        script = str(_HERE / "assemble.py")
        command = (sys.executable, script, listing, output, "--arch", arch)
        return (*edges, Edge(output, (listing, script), command))


@dataclass(frozen=True)
class Nvcc:
    """NVIDIA's compiler, reading `.hip` sources as CUDA."""

    path: Path
    version: str

    @property
    def identity(self) -> str:
        """Name and version."""
        return f"nvcc {self.version}"

    def edges(self, module: Module, arch: str) -> tuple[Edge, ...]:
        """Source to cubin in one command; ptxas reports registers and spills in the log."""
        source, output = str(_only_source(module, arch)), artifact_name(module, arch)
        target = _specific(arch).removeprefix("sm_")
        code = f"-gencode=arch=compute_{target},code=sm_{target}"
        flags = ("-x", "cu", "-std=c++17", "-O3", code, "-cubin", "-Xptxas", "-v")
        command = (str(self.path), *flags, *module.arguments(), "-o", output, source)
        return (Edge(output, (source,), command),)


@dataclass(frozen=True)
class Rtc:
    """hiprtc or NVRTC, the compiler libraries that torch brings with it."""

    library: str
    prefix: str
    version: str

    @property
    def identity(self) -> str:
        """Name and version."""
        return f"{self.prefix} {self.version}"

    def edges(self, module: Module, arch: str) -> tuple[Edge, ...]:
        """Source to binary in one command, run in a process of its own."""
        source, output = _only_source(module, arch), artifact_name(module, arch)
        script = str(_HERE / "rtc.py")
        offload = "--offload-arch" if self.prefix == "hiprtc" else "--gpu-architecture"
        # The library gets text, not a file, so it does not know the directory of the source.
        beside = f"-I{source.parent}"
        flags = (f"{offload}={_specific(arch)}", "-std=c++17", beside, *module.arguments())
        options = ("--library", self.library, "--prefix", self.prefix, "--", *flags)
        command = (sys.executable, script, str(source), output, *options)
        return (Edge(output, (str(source), script), command),)


@dataclass(frozen=True)
class HostCompiler:
    """gcc or clang for the machine this runs on: debug builds of kernels, and the launcher."""

    path: Path
    version: str

    @property
    def identity(self) -> str:
        """Name and version."""
        return f"host {self.version}"

    def edges(self, module: Module, arch: str) -> tuple[Edge, ...]:
        """All sources to a shared library in one command."""
        output = artifact_name(module, arch)
        sources = tuple(str(source) for source in module.sources)
        language = ("-x", "c") if sources[0].endswith(".c") else ("-x", "c++", "-std=c++17")
        arguments = (*_HOST_FLAGS, *module.arguments(), *language, *sources)
        # The C++ runtime is named because a compiler called `cc` does not add it by itself.
        libraries = () if language == ("-x", "c") else ("-lstdc++", "-lm")
        command = (str(self.path), *arguments, "-x", "none", "-o", output, *libraries)
        return (Edge(output, sources, command),)
