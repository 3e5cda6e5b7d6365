"""`cache`: list, verify or clear the kernels that were built for this user."""

from __future__ import annotations

import argparse
from pathlib import Path

from aiter_inductor.core import config, jit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action and the directory."""
    parser.add_argument("action", choices=("ls", "verify", "clear"))
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="a prebuilt directory; default: the cache"
    )


def run(arguments: argparse.Namespace) -> int:
    """Do it; returns 1 if `verify` found something wrong, else 0."""
    directory = arguments.dir or config.cache_dir()
    if arguments.action == "ls":
        return show(directory)
    if arguments.action == "verify":
        return verify(directory)
    cleared = jit.clear(directory)
    size_mb = cleared.size_bytes / 1e6
    print(f"removed {cleared.entries} kernels and {cleared.failures} failures, {size_mb:.1f} MB")
    return 0


def show(directory: Path) -> int:
    """One line for each built kernel, then one for each build that is remembered as failed."""
    entries, failures = jit.entries(directory), jit.failures(directory)
    for entry in entries:
        size_bytes = entry.path.stat().st_size
        print(
            f"{entry.arch:7} {entry.name:24} {entry.key[:12]} {size_bytes:8} bytes"
            f" {entry.build_s:6.2f} s  {entry.compiler.splitlines()[0]}"
        )
    for name, message in failures.items():
        print(f"failed: {name}: {(message.splitlines() or [message])[0]}")
    print(f"{len(entries)} kernels and {len(failures)} failures in {directory}")
    return 0


def verify(directory: Path) -> int:
    """A line for each thing that is wrong; returns 1 if there is one."""
    if not directory.exists():
        print(f"{directory} does not exist: nothing has been built yet")
        return 0
    findings = jit.verify(directory)
    for finding in findings:
        print(finding)
    if not findings:
        print(f"{len(jit.entries(directory))} kernels in {directory} are as they were built")
    return int(bool(findings))
