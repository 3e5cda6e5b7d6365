"""The table of commands; each lives in a module of its own that is imported when asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from aiter_inductor.core.errors import AiterInductorError

COMMANDS = {
    "doctor": "what is here: chip, versions, compilers, settings, and what is therefore available",
    "explain": "what the backend makes of a model, on this chip or planned for another",
    "bench": "eager, plain Inductor and this backend side by side, for ops or for models",
    "tune": "measure which kernel is fastest here at which size, and keep it in a table",
    "prebuild": "build HIP kernels ahead of time, for chips that need not be here",
    "figures": "registers, LDS, spills and occupancy of every kernel, as compiled for AMD chips",
    "cache": "list, verify or clear the built kernels",
}
"""Name of each command, which is also its module's, and what it does."""


class Command(Protocol):
    """What a command's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit status."""


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Returns:
        its exit status; 2 for a mistake in the arguments, told in one line.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"unknown command {name!r}\n\n{_overview()}", file=sys.stderr)
        return 2
    command: Command = import_module(f"aiter_inductor.cli.{name}")
    parser = argparse.ArgumentParser(f"python -m aiter_inductor {name}", description=COMMANDS[name])
    command.add_arguments(parser)
    arguments = parser.parse_args(rest)
    try:
        status = command.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except AiterInductorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(["usage: python -m aiter_inductor COMMAND [--help]", "", *lines])
