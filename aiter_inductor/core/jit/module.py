"""A native module as it is declared: what to compile, with which headers, definitions and flags."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from aiter_inductor.core.jit.includes import included_files

_FORMAT = 1
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Module:
    """One unit that is built as a whole: a code object for a GPU, a shared library for the host.

    Attributes:
        name: lower-case identifier; the first part of the cache entry's name.
        sources: `.hip`, `.c`, `.cpp` or `.s` files; exactly one for a GPU.
        include_dirs: searched for headers; what is found there is part of the cache key.
        defines: macros, as (name, value) pairs.
        flags: further compiler flags, passed as they are.
    """

    name: str
    sources: tuple[Path, ...]
    include_dirs: tuple[Path, ...] = ()
    defines: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"module name {self.name!r} is not a lower-case identifier")
        if not self.sources:
            raise ValueError(f"module {self.name} has no sources")

    def arguments(self) -> tuple[str, ...]:
        """Definitions, include directories and flags as compilers of the gcc family take them."""
        return (
            *(f"-D{name}={value}" for name, value in self.defines),
            *(f"-I{directory}" for directory in self.include_dirs),
            *self.flags,
        )


def source_key(module: Module, arch: str) -> str:
    """Hash of everything that shapes the binary, except the compiler: 64 hex digits."""
    files = (*module.sources, *included_files(module.sources, module.include_dirs))
    contents = [(file.name, _digest(file, *_stamp(file))) for file in files]
    described = [_FORMAT, module.name, arch, contents, module.defines, module.flags]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def build_key(module: Module, arch: str, compiler: str) -> str:
    """Hash of everything that shapes the binary: 64 hex digits."""
    return hashlib.sha256(f"{source_key(module, arch)} {compiler}".encode()).hexdigest()


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=512)
def _digest(file: Path, modified_ns: int, size_bytes: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
