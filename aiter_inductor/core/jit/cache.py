"""List, verify and clear a cache or prebuilt directory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiter_inductor.core.jit import store
from aiter_inductor.core.jit.errors import CacheError, CorruptEntryError
from aiter_inductor.core.jit.store import Artifact


@dataclass(frozen=True)
class Cleared:
    """What `clear` removed."""

    entries: int
    failures: int
    size_bytes: int


def entries(root: Path) -> list[Artifact]:
    """Every readable entry, by architecture and name; broken ones are `verify`'s to report."""
    found = (_read_if_whole(directory) for directory in _entry_dirs(root))
    return [artifact for artifact in found if artifact is not None]


def failures(root: Path) -> dict[str, str]:
    """The remembered failures: `<arch>/<name>-<key>` to the compiler's lines."""
    return {
        f"{path.parent.name}/{path.stem}": store.read_failure(path.with_suffix("")) or "unreadable"
        for path in sorted(root.glob(f"*/*{store.FAILED_SUFFIX}"))
    }


def verify(root: Path) -> list[str]:
    """A sentence for each thing that is wrong: trust, records, hashes, builds left unfinished."""
    findings = []
    if not root.is_dir():
        return [f"{root} is not a directory"]
    try:
        store.require_trusted(root)
    except CacheError as error:
        findings.append(str(error))
    for directory in _entry_dirs(root):
        try:
            artifact = store.read_entry(directory)
        except CorruptEntryError as error:
            findings.append(str(error))
            continue
        findings += _changed_files(artifact)
    unfinished = sorted(root.glob(f"*/{store.BUILDING_PREFIX}*"))
    findings += [f"{path} is in progress, or was left by a killed build" for path in unfinished]
    return findings


def clear(root: Path) -> Cleared:
    """Remove entries, remembered failures and unfinished builds; nothing that is not the cache's.

    Raises:
        CacheError: if something cannot be removed.
    """
    directories = list(_entry_dirs(root))
    failed = list(root.glob(f"*/*{store.FAILED_SUFFIX}"))
    unfinished = list(root.glob(f"*/{store.BUILDING_PREFIX}*"))
    size_bytes = sum(sum(file_sizes(path)) for path in (*directories, *failed, *unfinished))
    try:
        for path in (*directories, *failed, *unfinished):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise CacheError(f"{error.filename} cannot be removed: {error.strerror}") from error
    return Cleared(len(directories), len(failed), size_bytes)


def _entry_dirs(root: Path) -> Iterator[Path]:
    for record in sorted(root.glob(f"*/*/{store.ENTRY_FILE}")):
        if not record.parent.name.startswith(store.BUILDING_PREFIX):
            yield record.parent


def _read_if_whole(directory: Path) -> Artifact | None:
    try:
        return store.read_entry(directory)
    except CorruptEntryError:
        return None


def _changed_files(artifact: Artifact) -> Iterator[str]:
    for name, sha256 in artifact.files.items():
        path = artifact.path.parent / Path(name).name
        if not path.is_file():
            yield f"{path} is missing"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            yield f"{path} is not the file that was built"


def file_sizes(path: Path) -> list[int]:
    """Bytes of the file `path`, or of each below it but for what a build takes away meanwhile."""
    files = [path] if path.is_file() else (Path(at, n) for at, _, ns in os.walk(path) for n in ns)
    found = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            found.append(file.stat().st_size)
    return found
