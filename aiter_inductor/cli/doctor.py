"""`doctor`: what is here, and what is therefore available."""

from __future__ import annotations

import argparse
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import shorten

import torch

from aiter_inductor import __version__
from aiter_inductor.cli.bench import VERSIONED, version_of
from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core import config
from aiter_inductor.core.arch import KNOWN, Arch, arch_of
from aiter_inductor.core.jit import NoCompilerError, default_settings, file_sizes, find_compiler

ENTRY_POINTS = (
    ("torch_dynamo_backends", "aiter", 'torch.compile(backend="aiter") without an import'),
    ("torch.backends", "aiter_inductor", f"{config.PREFIX}=1 makes it the default backend"),
)
WHEELS = (*VERSIONED, "ninja", "ziglang")

Section = Iterator[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(arguments: argparse.Namespace) -> int:
    """Print every section; returns 0."""
    for title, section in (
        ("versions", versions()),
        ("chips", chips()),
        ("compilers", compilers()),
        ("entry points", registered()),
        ("cache", cache()),
        ("environment", environment()),
        ("kernels", kernels()),
    ):
        rows = list(section)
        width = max(len(name) for name, _ in rows)
        print(title)
        for name, text in rows:
            print(f"  {name.ljust(width)}  {text}")
    return 0


def versions() -> Section:
    """Python and the wheels that matter."""
    yield "aiter_inductor", f"{__version__} at {Path(__file__).parents[1]}"
    yield "python", platform.python_version()
    for name in WHEELS:
        yield name, version_of(name)


def chips() -> Section:
    """Every accelerator, or the CPU where there is none."""
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        arch = arch_of(torch.device("cuda", index))
        memory = f"{properties.total_memory / 1e9:.0f} GB"
        known = "" if arch.name in KNOWN else "; not a chip that kernels are written for"
        yield f"cuda:{index}", f"{properties.name}, {arch.name}, {memory}{known}"
    if not count:
        yield "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads; no accelerator"


def compilers() -> Section:
    """The compiler that would build native kernels for each target, or what is missing."""
    settings = default_settings()
    for target in ("gfx942", "gfx950", "sm_90", "host"):
        try:
            found = shorten(find_compiler(target, settings).identity, 90, placeholder=" ...")
        except NoCompilerError as error:
            found = f"none: {str(error).partition(': ')[2]}"
        yield target, found


def registered() -> Section:
    """Whether this installation's entry points are the ones torch will find."""
    for group, name, meaning in ENTRY_POINTS:
        found = [e.value for e in entry_points(group=group) if e.name == name]
        state = ", ".join(found) or f"absent: reinstall with {sys.executable} -m pip install"
        yield f"{group}:{name}", f"{state} ({meaning})"


def cache() -> Section:
    """Where built kernels are kept."""
    place = config.cache_dir()
    if not place.exists():
        yield "directory", f"{place} (made on the first build)"
        return
    found = file_sizes(place)
    yield "directory", f"{place} ({len(found)} files, {sum(found) / 1e6:.1f} MB)"


def environment() -> Section:
    """Every variable, its value now and what it does."""
    for variable in config.VARIABLES.values():
        shown = variable.value or "(empty)"
        origin = "default" if variable.value == variable.default else "set"
        yield variable.name, f"{shown} [{origin}]: {variable.meaning}"


def kernels() -> Section:
    """For each chip here and each that can be planned for, how many ops have kernels."""
    here = [arch_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    for arch in {arch.name: arch for arch in (*here, *KNOWN.values())}.values():
        yield arch.name, served(arch)


def served(arch: Arch) -> str:
    """`triton 24, hip 9 of 30 ops`, or that Inductor compiles everything."""
    ops = load_ops().values()
    counts = Counter(p.name for op in ops for p in op.providers.values() if p.serves(arch))
    if not counts:
        return f"none of {len(ops)} ops: recognised code is left to Inductor"
    return ", ".join(f"{name} {number}" for name, number in counts.items()) + f" of {len(ops)} ops"
