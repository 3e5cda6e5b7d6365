"""Which compilers are here for an architecture, best first, or where each was looked for."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from aiter_inductor.core.jit.compilers import Compiler, HostCompiler, Nvcc, RocmClang, Rtc, ZigClang
from aiter_inductor.core.jit.errors import NoCompilerError
from aiter_inductor.core.jit.settings import JitSettings

_ROCM_ROOTS = (Path("/opt/rocm"),)
_CUDA_ROOTS = (Path("/usr/local/cuda"),)


def find_compiler(arch: str, settings: JitSettings) -> Compiler:
    """The best compiler for `arch`: a `gfx…` or `sm_…` name, or `host`.

    Raises:
        NoCompilerError: naming every place that was looked at.
    """
    misses: list[str] = []
    for candidate in _candidates(arch, settings):
        if not isinstance(candidate, str):
            return candidate
        misses.append(candidate)
    raise NoCompilerError(f"no compiler for {arch}: {'; '.join(misses) or 'unknown target'}")


def _candidates(arch: str, settings: JitSettings) -> Iterator[Compiler | str]:
    """Compilers, and a sentence for each that is missing."""
    if arch == "host":
        yield _host(settings)
    elif arch.startswith("gfx"):
        yield _rocm_clang(settings)
        yield _zig(settings)
        yield _rtc("hiprtc", settings)
    elif arch.startswith("sm_"):
        yield _nvcc(settings)
        yield _rtc("nvrtc", settings)


def _rocm_clang(settings: JitSettings) -> Compiler | str:
    if settings.rocm_clang is not None:
        return _versioned(RocmClang, settings.rocm_clang)
    on_path = (shutil.which("amdclang++"), shutil.which("hipcc"))
    roots = [Path(tool).resolve().parents[1] for tool in on_path if tool]
    for root in (*roots, *_ROCM_ROOTS):
        for clang in (root / "llvm/bin/clang++", root / "lib/llvm/bin/clang++", root / "clang++"):
            if clang.is_file():
                return _versioned(RocmClang, clang)
    return "neither amdclang++ nor hipcc is on the PATH and /opt/rocm holds no clang"


def _zig(settings: JitSettings) -> Compiler | str:
    if not settings.use_zig:
        return "clang of the ziglang wheel is switched off"
    wheel, triton = _package_dir("ziglang"), _package_dir("triton")
    hint = "(pip install aiter-inductor[cross])"
    if wheel is None or not (wheel / "zig").is_file():
        return f"the ziglang wheel is not installed {hint}"
    if triton is None:
        return f"the triton wheel, whose assembler ziglang needs, is not installed {hint}"
    return ZigClang(wheel / "zig", f"{_zig_version(wheel)} + triton {_triton_version(triton)}")


def _nvcc(settings: JitSettings) -> Compiler | str:
    if settings.nvcc is not None:
        return _versioned(Nvcc, settings.nvcc)
    if on_path := shutil.which("nvcc"):
        return _versioned(Nvcc, Path(on_path))
    for root in _CUDA_ROOTS:
        if (root / "bin/nvcc").is_file():
            return _versioned(Nvcc, root / "bin/nvcc")
    return "nvcc is neither on the PATH nor in /usr/local/cuda"


def _host(settings: JitSettings) -> Compiler | str:
    if settings.host_compiler is not None:
        return _versioned(HostCompiler, settings.host_compiler)
    for name in ("g++", "c++", "clang++", "gcc", "cc", "clang"):
        if found := shutil.which(name):
            return _versioned(HostCompiler, Path(found))
    return "none of g++, c++, clang++, gcc, cc and clang is on the PATH"


def _rtc(prefix: str, settings: JitSettings) -> Compiler | str:
    if not settings.use_rtc:
        return f"{prefix} is switched off"
    torch = _package_dir("torch")
    if torch is None:
        return f"torch, which would bring lib{prefix}.so, is not installed"
    places = (torch / "lib", *sorted(torch.parent.glob("nvidia/*/lib")), *_library_dirs(prefix))
    for place in places:
        for library in sorted(place.glob(f"lib{prefix}.so*")):
            # The version is in the file name's tail; size tells apart two builds of one version.
            return Rtc(str(library), prefix, f"{library.name} {library.stat().st_size}")
    return f"lib{prefix}.so is neither in torch/lib nor in the nvidia wheels nor in ROCm or CUDA"


def _library_dirs(prefix: str) -> tuple[Path, ...]:
    roots = _ROCM_ROOTS if prefix == "hiprtc" else _CUDA_ROOTS
    return tuple(root / folder for root in roots for folder in ("lib", "lib64"))


def _package_dir(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = PathFinder.find_spec(name) or find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _zig_version(wheel: Path) -> str:
    try:
        return version("ziglang")
    except PackageNotFoundError:
        return str((wheel / "zig").stat().st_size)


def _triton_version(triton: Path) -> str:
    """Read from the file: the distribution's name differs between CUDA and ROCm builds."""
    match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (triton / "__init__.py").read_text())
    return match[1] if match else "unknown"


def _versioned(kind: type[RocmClang | Nvcc | HostCompiler], path: Path) -> Compiler | str:
    said = _version_of(path, path.stat().st_mtime_ns if path.exists() else 0)
    if said is None:
        return f"{path} does not answer --version"
    return kind(path, said)


@lru_cache
def _version_of(path: Path, modified_ns: int) -> str | None:
    """What `--version` says, on one line; the file's time of change makes the memo safe."""
    try:
        run = subprocess.run(
            (str(path), "--version"), capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return " ".join(run.stdout.split())
