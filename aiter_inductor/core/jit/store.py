"""The cache on disk: one directory per built module, published whole and verified when read.

    <cache>/<arch>/<name>-<key>/          artifact, listing, build.ninja, entry.json
    <cache>/<arch>/<name>-<key>.failed    the lines of a build that failed
    <cache>/<arch>/.building-…            a build in progress, or what a killed one left
    <cache>/locks/…                       one lock file per key

`entry.json` and `.failed` are JSON and nothing in them is evaluated or run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiter_inductor.core.jit.errors import CacheError, CorruptEntryError

ENTRY_FILE = "entry.json"
FAILED_SUFFIX = ".failed"
BUILDING_PREFIX = ".building-"
LOCKS = "locks"
_KEY_DIGITS = 32


@dataclass(frozen=True)
class Artifact:
    """A built module on disk.

    Attributes:
        name: of the module.
        arch: it was built for.
        key: of the cache entry, 64 hex digits.
        compiler: identity of the compiler that built it.
        path: of the code object or shared library.
        sha256: of that file when it was built.
        files: sha256 of every file of the entry, by name.
        build_s: how long the build took.
        log: what the compiler said.
    """

    name: str
    arch: str
    key: str
    compiler: str
    path: Path
    sha256: str
    files: dict[str, str]
    build_s: float
    log: str

    def read(self) -> bytes:
        """The artifact's bytes, if they are the ones that were built.

        Raises:
            CorruptEntryError: if the file is missing, truncated or changed.
        """
        return _read_verified(self.path, self.sha256)

    def listing(self) -> str | None:
        """The assembly text beside the code object, where the compiler left one.

        Raises:
            CorruptEntryError: if the text is not the one that was built.
        """
        name = f"{self.name}.s"
        if name not in self.files:
            return None
        return _read_verified(self.path.parent / name, self.files[name]).decode()


def entry_path(root: Path, arch: str, name: str, key: str) -> Path:
    """Where the entry of `key` is or would be."""
    return root / arch / f"{name}-{key[:_KEY_DIGITS]}"


def read_entry(directory: Path) -> Artifact:
    """The entry in `directory`; the artifact itself is verified by `Artifact.read`.

    Raises:
        FileNotFoundError: if there is no such entry.
        CorruptEntryError: if its record cannot be read.
    """
    record = directory / ENTRY_FILE
    try:
        text = record.read_text(encoding="utf-8")
    except NotADirectoryError as error:
        raise FileNotFoundError(str(record)) from error
    try:
        fields = json.loads(text)
        artifact = Artifact(path=directory / Path(fields.pop("artifact")).name, **fields)
        if artifact.files[artifact.path.name] != artifact.sha256:
            raise ValueError("two hashes for one file")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptEntryError(f"{record} is not a record of a build: {error}") from error
    return artifact


def publish(building: Path, target: Path, record: dict[str, Any]) -> None:
    """Write the record beside the built files, then rename the directory into its place."""
    files = sorted(path for path in building.iterdir() if path.is_file())
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    fields = {**record, "files": hashes, "sha256": hashes[record["artifact"]]}
    (building / ENTRY_FILE).write_text(json.dumps(fields, indent=1), encoding="utf-8")
    for path in (*files, building / ENTRY_FILE, building):
        _fsync(path)
    if target.exists():
        shutil.rmtree(target)
    building.rename(target)
    _fsync(target.parent)


def write_failure(target: Path, message: str) -> None:
    """Remember that the build of `target` failed, and why."""
    descriptor, name = tempfile.mkstemp(prefix=BUILDING_PREFIX, dir=target.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"message": message}, file)
    os.replace(name, failure_path(target))


def read_failure(target: Path) -> str | None:
    """Why the build of `target` failed before, if it did."""
    try:
        message = json.loads(failure_path(target).read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return message if isinstance(message, str) else None


def failure_path(target: Path) -> Path:
    """Where a failed build of `target` is remembered."""
    return target.with_name(target.name + FAILED_SUFFIX)


def make_private(directory: Path) -> None:
    """Create a cache directory for this user alone.

    Raises:
        CacheError: if it cannot be created or written, or if somebody else could write into it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"cache directory {directory} cannot be made: {error.strerror}") from error
    require_trusted(directory)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise CacheError(f"cache directory {directory} is read-only")


def require_trusted(directory: Path) -> None:
    """Refuse a directory whose contents somebody else could have planted.

    Raises:
        CacheError: if it belongs to another user (root excepted) or if others may write into it.
    """
    status = directory.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise CacheError(f"cache directory {directory} belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise CacheError(f"cache directory {directory} can be written by others (mode {mode:o})")


def _read_verified(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptEntryError(f"{path} cannot be read: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise CorruptEntryError(
            f"{path} ({len(content)} bytes) has hash {found[:12]}…, but {sha256[:12]}… was built"
        )
    return content


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
