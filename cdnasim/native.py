"""Build and bind the native core.

The core is compiled with the host's g++ on first use, into the user's cache directory, under a
key of sources, flags, compiler version and processor, and published by an atomic rename: several
processes that start at once each build, and whichever finishes last wins with an equal file.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
CONTRACTION = {"mfma.cpp": "-ffp-contract=fast"}  # elsewhere a * b + c must round twice
MESSAGE_BYTES = 200


class BuildError(RuntimeError):
    """The native core cannot be built; the message holds the compiler's own lines."""


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Structure fields of one type, from their names separated by blanks."""
    return [(name, kind) for name in names.split()]


class Launch(ctypes.Structure):
    """struct Launch of native/state.hpp."""

    _fields_ = [
        *fields(ctypes.c_uint64, "kernarg dispatch_packet flat_scratch max_instructions"),
        *fields(ctypes.c_uint64, "code_base trace_capacity"),
        *fields(ctypes.c_int32, "entry"),
        *fields(ctypes.c_int32 * 3, "grid block"),
        *fields(ctypes.c_int32, "lds_bytes scratch_bytes is_gfx950 num_vgprs num_agprs"),
        *fields(ctypes.c_int32, "kernarg_sgpr dispatch_ptr_sgpr user_sgprs"),
        *fields(ctypes.c_int32, "preload_sgpr preload_dwords preload_offset"),
        *fields(ctypes.c_int32 * 3, "group_id_enable"),
        *fields(ctypes.c_int32, "float_mode num_threads num_ranges checks"),
        *fields(ctypes.c_int32 * 3, "trace_group"),
        *fields(ctypes.c_int32, "trace_wave num_instructions"),
    ]


class RawFinding(ctypes.Structure):
    """struct Finding of native/state.hpp."""

    _fields_ = [
        *fields(ctypes.c_int32, "kind pc other_pc wave lane"),
        ("group", ctypes.c_int32 * 3),
        ("occurrences", ctypes.c_uint64),
        ("message", ctypes.c_char * MESSAGE_BYTES),
    ]


class RawTraceEntry(ctypes.Structure):
    """struct TraceEntry of native/state.hpp."""

    _fields_ = [
        ("pc", ctypes.c_int32),
        ("scc", ctypes.c_uint32),
        ("exec", ctypes.c_uint64),
        ("first", ctypes.c_uint32 * 64),
    ]


def compiler_identity(compiler: str) -> str:
    """What decides the generated code: compiler version and the processor that `native` means."""
    query = [compiler, "-march=native", "-Q", "--help=target"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    target = subprocess.run(query, capture_output=True, text=True, check=False)
    return version.stdout + target.stdout


def cache_directory() -> Path:
    """The private per-user directory of built cores, created if missing.

    A directory that another user owns or can write is refused; where none can be made, a fresh
    temporary one is used, so that each process builds for itself.
    """
    directory = Path.home() / ".cache" / "cdnasim"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="cdnasim-"))
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"{directory} can be written by other users; make it private (chmod 700) or remove it"
        )
    return directory if os.access(directory, os.W_OK) else Path(tempfile.mkdtemp(prefix="cdnasim-"))


def run_compiler(command: list[str]) -> None:
    """Run one compiler command; a failure raises BuildError with what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


def compile_core(compiler: str, target: Path) -> None:
    """Compile and link the sources into `target`, through a temporary directory beside it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:

        def one(source: Path) -> str:
            built = str(Path(work) / f"{source.stem}.o")
            contraction = CONTRACTION.get(source.name, "-ffp-contract=off")
            run_compiler([compiler, *FLAGS, contraction, "-c", str(source), "-o", built])
            return built

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(one, sorted(SOURCES.glob("*.cpp"))))
        shared = str(Path(work) / "core.so")
        run_compiler([compiler, "-shared", "-pthread", *objects, "-o", shared])
        os.replace(shared, target)


def build(compiler: str = "g++") -> Path:
    """Path of the built core, compiling it if this exact one is not in the cache (about 25 s).

    Raises:
        BuildError: no compiler, or it failed.
    """
    if not shutil.which(compiler):
        raise BuildError(
            f"the simulator's core is compiled on first use, and {compiler} is not installed"
        )
    key = hashlib.sha256(compiler_identity(compiler).encode())
    key.update(" ".join([*FLAGS, *map(str, CONTRACTION.items())]).encode())
    for source in sorted(SOURCES.glob("*.[ch]pp")):
        key.update(source.name.encode() + source.read_bytes())
    target = cache_directory() / f"core-{key.hexdigest()[:24]}.so"
    if not target.exists():
        compile_core(compiler, target)
    return target


def check_layout(library: ctypes.CDLL) -> None:
    """Refuse a core whose structures differ in size from their Python mirrors."""
    from cdnasim.encode import RECORD

    sizes = {
        "record": RECORD.itemsize,
        "launch": ctypes.sizeof(Launch),
        "finding": ctypes.sizeof(RawFinding),
        "trace": ctypes.sizeof(RawTraceEntry),
    }
    for name, size in sizes.items():
        native = getattr(library, f"cdnasim_{name}_size")()
        if native != size:
            raise BuildError(f"{name}: {size} bytes in Python, {native} in the native core")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The native core, built if need be, with its functions' types declared."""
    loaded = ctypes.CDLL(str(build()))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    signatures: dict[str, tuple[object, list[object]]] = {
        "op_name": (ctypes.c_char_p, [integer]),
        "op_flags": (ctypes.c_uint64, [integer]),
        "op_passes": (integer, [integer]),
        "op_access_bytes": (integer, [integer]),
        "prepare": (pointer, [pointer, integer]),
        "unsupported": (ctypes.c_char_p, [pointer, integer]),
        "free_program": (None, [pointer]),
        "run": (pointer, [pointer, ctypes.POINTER(Launch), pointer]),
        "instructions": (ctypes.c_uint64, [pointer]),
        "num_findings": (integer, [pointer]),
        "findings": (ctypes.POINTER(RawFinding), [pointer]),
        "counts": (ctypes.POINTER(ctypes.c_uint64), [pointer]),
        "num_trace": (integer, [pointer]),
        "trace": (ctypes.POINTER(RawTraceEntry), [pointer]),
        "free_outcome": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, f"cdnasim_{name}")
        function.restype, function.argtypes = result, arguments
    check_layout(loaded)
    return loaded


@lru_cache(maxsize=1)
def operations() -> dict[str, int]:
    """Mnemonic → number of the operation in the native core."""
    core = library()
    return {core.cdnasim_op_name(i).decode(): i for i in range(core.cdnasim_op_count())}
