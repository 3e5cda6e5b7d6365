"""A module becomes an artifact: out of a prebuilt directory, the cache, or a compiler."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiter_inductor.core.jit import store
from aiter_inductor.core.jit.compilers import Compiler, artifact_name
from aiter_inductor.core.jit.discovery import find_compiler
from aiter_inductor.core.jit.errors import BuildError, CacheError, CompileError, CorruptEntryError
from aiter_inductor.core.jit.lock import locked
from aiter_inductor.core.jit.module import Module, build_key, source_key
from aiter_inductor.core.jit.ninja import run_ninja
from aiter_inductor.core.jit.settings import JitSettings
from aiter_inductor.core.jit.store import Artifact

_warned: set[str] = set()


class JitWarning(UserWarning):
    """A kernel that cannot be built or loaded; another provider serves its site."""


def load(module: Module, arch: str, settings: JitSettings) -> Artifact:
    """The artifact of `module` for `arch`, built if it is neither shipped nor cached.

    Whatever fails is warned about once a process, and a failed build is remembered on disk, so
    that the next process does not compile it again.

    Raises:
        BuildError: a sentence, with the compiler's lines where it failed.
    """
    try:
        return find(module, arch, settings) or _build(module, arch, settings)
    except BuildError as error:
        warn_once(f"{module.name} for {arch}: {error}")
        raise


def find(module: Module, arch: str, settings: JitSettings) -> Artifact | None:
    """The verified artifact, if it is shipped or cached; None if it would have to be built.

    Raises:
        BuildError: if there is no compiler, if its cache must not be trusted, or if the build is
            remembered as failed.
    """
    shipped = _shipped(module, arch, settings)
    if shipped is not None:
        return shipped
    compiler = find_compiler(arch, settings)
    target = _target(module, arch, compiler, settings)
    if settings.cache_dir.is_dir():
        store.require_trusted(settings.cache_dir)
    cached = _verified(target)
    if cached is None and (message := store.read_failure(target)) is not None:
        raise BuildError(_failure(module, arch, compiler, message))
    return cached


def warn_once(message: str) -> None:
    """Warn, unless this process has already said so."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, JitWarning, stacklevel=3)


def _shipped(module: Module, arch: str, settings: JitSettings) -> Artifact | None:
    for root in settings.prebuilt_dirs:
        if root.is_dir():
            store.require_trusted(root)
            key = source_key(module, arch)
            artifact = _verified(store.entry_path(root, arch, module.name, key))
            if artifact is not None:
                return artifact
    return None


def _verified(directory: Path) -> Artifact | None:
    """The entry, if it is there and whole; a broken one is warned about and taken as absent."""
    try:
        artifact = store.read_entry(directory)
        artifact.read()
    except FileNotFoundError:
        return None
    except CorruptEntryError as error:
        warn_once(f"{error}; it is not used")
        return None
    return artifact


def _target(module: Module, arch: str, compiler: Compiler, settings: JitSettings) -> Path:
    key = build_key(module, arch, compiler.identity)
    return store.entry_path(settings.cache_dir, arch, module.name, key)


def _failure(module: Module, arch: str, compiler: Compiler, message: str) -> str:
    return f"{module.name} did not build for {arch} with {compiler.identity}:\n{message}"


def _build(module: Module, arch: str, settings: JitSettings) -> Artifact:
    """Build under the lock of the key; whoever waited for it finds the entry published."""
    compiler = find_compiler(arch, settings)
    target = _target(module, arch, compiler, settings)
    with writing(settings.cache_dir, target, settings):
        built = find(module, arch, settings)
        if built is not None:
            return built
        try:
            return compile_into(target, module, arch, compiler, settings)
        except CompileError as error:
            store.write_failure(target, str(error))
            raise BuildError(_failure(module, arch, compiler, str(error))) from error


@contextmanager
def writing(root: Path, target: Path, settings: JitSettings) -> Iterator[None]:
    """Hold the lock of `target`, an entry of the cache or prebuilt directory `root`.

    Raises:
        CacheError: if `root` cannot be written or must not be trusted.
    """
    store.make_private(root)
    locks = root / store.LOCKS
    try:
        for directory in (locks, target.parent):
            directory.mkdir(mode=0o700, exist_ok=True)
        with locked(locks / f"{target.parent.name}-{target.name}", settings.build_timeout_s + 60):
            yield
    except OSError as error:
        raise CacheError(f"{root} cannot be written: {error.strerror or error}") from error


def compile_into(
    target: Path, module: Module, arch: str, compiler: Compiler, settings: JitSettings
) -> Artifact:
    """Compile in a temporary directory beside `target` and publish it there, whole.

    The caller holds the lock of `target`, so what an earlier build left behind is garbage.

    Raises:
        CompileError: with the compiler's lines.
    """
    prefix = f"{store.BUILDING_PREFIX}{target.name}-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    started_s = time.monotonic()
    try:
        edges = compiler.edges(module, arch)
        log = run_ninja(edges, building, settings.jobs, settings.build_timeout_s)
        record = {
            "name": module.name,
            "arch": arch,
            "key": build_key(module, arch, compiler.identity),
            "compiler": compiler.identity,
            "artifact": artifact_name(module, arch),
            "build_s": round(time.monotonic() - started_s, 3),
            "log": log,
        }
        store.publish(building, target, record)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    store.failure_path(target).unlink(missing_ok=True)
    return store.read_entry(target)
