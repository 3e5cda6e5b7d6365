"""What can go wrong between a kernel's source and its code object."""

from __future__ import annotations

from aiter_inductor.core.errors import AiterInductorError


class BuildError(AiterInductorError, RuntimeError):
    """A module that could not be built; the message holds the compiler's own lines."""


class CompileError(BuildError):
    """A compiler that refused its input or took too long; the failure that disk remembers."""


class NoCompilerError(BuildError):
    """No compiler for an architecture; the message says where each was looked for."""


class CacheError(BuildError):
    """A cache directory that cannot be written or must not be trusted."""


class CorruptEntryError(BuildError):
    """A cache entry whose files are not the ones that were recorded when it was built."""
