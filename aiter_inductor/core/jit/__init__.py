"""Native modules built on first use, cached for their user, shared by every process."""

from __future__ import annotations

from aiter_inductor.core.jit.background import BackgroundBuilds
from aiter_inductor.core.jit.build import JitWarning, find, load, warn_once
from aiter_inductor.core.jit.cache import Cleared, clear, entries, failures, file_sizes, verify
from aiter_inductor.core.jit.discovery import find_compiler
from aiter_inductor.core.jit.errors import (
    BuildError,
    CacheError,
    CompileError,
    CorruptEntryError,
    NoCompilerError,
)
from aiter_inductor.core.jit.module import Module, build_key, source_key
from aiter_inductor.core.jit.prebuild import Prebuilt, prebuild
from aiter_inductor.core.jit.settings import JitSettings, default_settings
from aiter_inductor.core.jit.store import Artifact

__all__ = [
    "Artifact",
    "BackgroundBuilds",
    "BuildError",
    "CacheError",
    "Cleared",
    "CompileError",
    "CorruptEntryError",
    "JitSettings",
    "JitWarning",
    "Module",
    "NoCompilerError",
    "Prebuilt",
    "build_key",
    "clear",
    "default_settings",
    "entries",
    "failures",
    "file_sizes",
    "find",
    "find_compiler",
    "load",
    "prebuild",
    "source_key",
    "verify",
    "warn_once",
]
