"""Run the commands of a build through ninja."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from aiter_inductor.core.jit.compilers import Edge
from aiter_inductor.core.jit.errors import BuildError, CompileError

_NINJA_OWN = ("[", "FAILED:", "ninja: ")


def run_ninja(edges: Iterable[Edge], directory: Path, jobs: int, timeout_s: float) -> str:
    """Write `build.ninja` into `directory` and run it there.

    Returns:
        What the compilers said.

    Raises:
        CompileError: holding the compilers' lines, if a command fails or time runs out.
        BuildError: if there is no ninja.
    """
    edges = tuple(edges)
    (directory / "build.ninja").write_text(_manifest(edges), encoding="utf-8")
    command = (_ninja(), "-C", str(directory), "-j", str(jobs))
    # A session of its own, so that a timeout ends the compilers together with ninja.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise CompileError(
            f"the build took longer than {timeout_s:.0f} s and was stopped"
        ) from None
    finally:
        for name in (".ninja_log", ".ninja_deps"):
            (directory / name).unlink(missing_ok=True)
    said = _compiler_lines(output.decode(errors="replace"), edges)
    if process.returncode:
        raise CompileError(
            said or f"the compiler ended with status {process.returncode} in silence"
        )
    return said


def _manifest(edges: tuple[Edge, ...]) -> str:
    lines = ["rule run", "  command = $command", "  description = $out"]
    for edge in edges:
        inputs = " ".join(_path(name) for name in edge.inputs)
        command = shlex.join(edge.command).replace("$", "$$")
        lines += [f"build {_path(edge.output)}: run {inputs}", f"  command = {command}"]
    return "\n".join(lines) + "\n"


def _path(name: str) -> str:
    return name.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _compiler_lines(output: str, edges: tuple[Edge, ...]) -> str:
    """Ninja's output without its progress and without the echoed commands."""
    commands = {shlex.join(edge.command) for edge in edges}
    kept = (
        line
        for line in output.splitlines()
        if not line.startswith(_NINJA_OWN) and line.strip() not in commands
    )
    return "\n".join(kept).strip()


def _ninja() -> str:
    beside_python = Path(sys.executable).with_name("ninja")
    found = str(beside_python) if beside_python.is_file() else shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is neither beside Python nor on the PATH (pip install ninja)")
    return found
