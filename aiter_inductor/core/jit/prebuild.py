"""Build ahead of time, on any machine, into a directory that can be shipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from aiter_inductor.core.jit import store
from aiter_inductor.core.jit.build import compile_into, writing
from aiter_inductor.core.jit.discovery import find_compiler
from aiter_inductor.core.jit.errors import BuildError, CorruptEntryError
from aiter_inductor.core.jit.module import Module, source_key
from aiter_inductor.core.jit.settings import JitSettings
from aiter_inductor.core.jit.store import Artifact


@dataclass(frozen=True)
class Prebuilt:
    """One module of a prebuild: the artifact, or the sentence that says why there is none."""

    module: Module
    arch: str
    artifact: Artifact | None
    reason: str | None


def prebuild(
    modules: Iterable[Module],
    archs: Iterable[str],
    out_dir: Path,
    settings: JitSettings,
    progress: Callable[[int, int, Prebuilt], None] | None = None,
) -> list[Prebuilt]:
    """Build every module for every architecture into `out_dir`.

    The entries are found by their sources and flags alone, so that the machine which uses them
    needs no compiler: name the directory in `JitSettings.prebuilt_dirs`.

    Args:
        progress: called after each module with how many are done, how many there are, and it.

    Raises:
        CacheError: if `out_dir` cannot be written or can be written by others.
    """
    store.make_private(out_dir)
    archs = tuple(archs)
    wanted = [(module, arch) for module in modules for arch in archs]
    one_each = replace(settings, jobs=1)
    done: list[Prebuilt] = []
    with ThreadPoolExecutor(settings.jobs) as pool:
        futures = [pool.submit(_prebuild_one, *each, out_dir, one_each) for each in wanted]
        for future in as_completed(futures):
            done.append(future.result())
            if progress is not None:
                progress(len(done), len(wanted), done[-1])
    return done


def _prebuild_one(module: Module, arch: str, out_dir: Path, settings: JitSettings) -> Prebuilt:
    target = store.entry_path(out_dir, arch, module.name, source_key(module, arch))
    try:
        compiler = find_compiler(arch, settings)
        with writing(out_dir, target, settings):
            artifact = _present(target, compiler.identity)
            if artifact is None:
                artifact = compile_into(target, module, arch, compiler, settings)
    except BuildError as error:
        return Prebuilt(module, arch, None, str(error))
    return Prebuilt(module, arch, artifact, None)


def _present(target: Path, compiler: str) -> Artifact | None:
    """The entry, unless it is missing, broken or another compiler's."""
    try:
        artifact = store.read_entry(target)
        artifact.read()
    except (FileNotFoundError, CorruptEntryError):
        return None
    return artifact if artifact.compiler == compiler else None
