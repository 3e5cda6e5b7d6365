"""Where built kernels are kept and which compilers build them; arguments, never ambient state."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class JitSettings:
    """How modules are built and where.

    Attributes:
        cache_dir: private to its user; created with mode 0700 on the first build.
        prebuilt_dirs: directories written by `prebuild`, read before the cache and never written.
        rocm_clang: clang of a ROCm installation; None looks in its usual places.
        nvcc: NVIDIA's compiler; None looks on the PATH.
        host_compiler: C and C++ compiler; None looks on the PATH.
        use_zig: whether clang out of the `ziglang` wheel may stand in for ROCm's.
        use_rtc: whether hiprtc or NVRTC may stand in for a compiler that is not installed.
        jobs: how many builds run at once.
        build_timeout_s: a build that takes longer is killed and counts as failed.
    """

    cache_dir: Path
    prebuilt_dirs: tuple[Path, ...] = ()
    rocm_clang: Path | None = None
    nvcc: Path | None = None
    host_compiler: Path | None = None
    use_zig: bool = True
    use_rtc: bool = True
    jobs: int = max(1, (os.cpu_count() or 1) // 2)
    build_timeout_s: float = 600.0


def default_settings() -> JitSettings:
    """The settings that the environment asks for."""
    from aiter_inductor.core import config

    return JitSettings(cache_dir=config.cache_dir(), prebuilt_dirs=config.prebuilt_dirs())
