"""Everything a user can set: environment variables and `torch.compile` options.

This is the only file that reads the environment. Each variable and each option is declared once,
with its type, its default and a sentence that `python -m aiter_inductor doctor` prints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiter_inductor.core.errors import OptionValueError, UnknownOptionError

PREFIX = "AITER_INDUCTOR"

OPTION_NAMES = ("aiter.disable", "aiter.force", "aiter.strict")
"""Entries of `torch.compile(options=...)` that belong to this backend and not to Inductor."""


@dataclass(frozen=True)
class Variable:
    """One environment variable: its full name, its default as text, and what it does."""

    name: str
    default: str
    meaning: str

    @property
    def value(self) -> str:
        """The text in force now."""
        return os.environ.get(self.name, self.default)


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable(PREFIX, "0", "1: plain torch.compile(model) uses this backend"),
        Variable(
            f"{PREFIX}_DISABLE",
            "",
            "comma-separated patterns, providers and module paths to leave to Inductor",
        ),
        Variable(
            f"{PREFIX}_FORCE",
            "0",
            "1: take every kernel that can run, also where Inductor's code measured as fast",
        ),
        Variable(
            f"{PREFIX}_STRICT",
            "0",
            "1: raise what planning did not foresee instead of leaving the site to Inductor",
        ),
        Variable(f"{PREFIX}_REPORT", "0", "1: print the report of each compiled graph to stderr"),
        Variable(
            f"{PREFIX}_CACHE_DIR", "", "built kernels; default $XDG_CACHE_HOME/aiter_inductor"
        ),
        Variable(
            f"{PREFIX}_PREBUILT_DIRS",
            "",
            "directories that `prebuild` wrote, separated by colons; looked in before the cache",
        ),
        Variable(
            f"{PREFIX}_TUNED_DIRS",
            "",
            "directories that `tune` wrote, separated by colons; read beside the shipped tables",
        ),
    )
}


def autoload_requested() -> bool:
    """Whether plain `torch.compile` should use this backend."""
    return _flag(PREFIX)


def report_requested() -> bool:
    """Whether each compiled graph's report goes to stderr."""
    return _flag(f"{PREFIX}_REPORT")


def cache_dir() -> Path:
    """Where built kernels are kept; not created here."""
    if chosen := VARIABLES[f"{PREFIX}_CACHE_DIR"].value:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aiter_inductor"


def prebuilt_dirs() -> tuple[Path, ...]:
    """Where kernels are looked for that were built elsewhere, in order."""
    return _paths(f"{PREFIX}_PREBUILT_DIRS")


def tuned_dirs() -> tuple[Path, ...]:
    """Where measurements are kept beside those shipped."""
    return _paths(f"{PREFIX}_TUNED_DIRS")


@dataclass(frozen=True)
class Options:
    """What shapes a plan, besides the graph and the chip.

    Attributes:
        disable: patterns (`rope`), fused ops (`rms_norm_quant`), providers (`triton`) and module
            paths (`model.layers.0.mlp`, with everything below it) to leave to Inductor.
        force: take a kernel that can run even where Inductor's code was measured as fast.
        strict: raise what planning did not foresee instead of leaving the site to Inductor.
        target: plan for this chip without compiling; None plans for the chip that holds the inputs.
    """

    disable: frozenset[str] = frozenset()
    force: bool = False
    strict: bool = False
    target: str | None = None

    @classmethod
    def read(cls, options: Mapping[str, object]) -> Options:
        """Options from `torch.compile(options=...)` entries named `aiter.*`, over the environment.

        Raises:
            UnknownOptionError: for an `aiter.*` entry that does not exist.
            OptionValueError: for a value of the wrong type.
        """
        for name in options:
            if name not in OPTION_NAMES:
                raise UnknownOptionError(name, OPTION_NAMES)
        disable = options.get("aiter.disable", _words(VARIABLES[f"{PREFIX}_DISABLE"].value))
        if isinstance(disable, str) or not isinstance(disable, list | tuple | set | frozenset):
            raise OptionValueError("aiter.disable", disable, "a list of names")
        force, strict = (_switch(options, name) for name in ("force", "strict"))
        return cls(frozenset(map(str, disable)), force, strict)

    def disables(self, *names: str) -> str | None:
        """The first of `names` that is switched off; a module path covers what is below it."""
        for name in names:
            for off in self.disable:
                if name == off or (off and name.startswith(off + ".")):
                    return off
        return None


def _switch(options: Mapping[str, object], name: str) -> bool:
    given = options.get(f"aiter.{name}", _flag(f"{PREFIX}_{name.upper()}"))
    if not isinstance(given, bool):
        raise OptionValueError(f"aiter.{name}", given, "True or False")
    return given


def _flag(name: str) -> bool:
    value = VARIABLES[name].value.strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise OptionValueError(name, value, "0 or 1")


def _paths(name: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in VARIABLES[name].value.split(os.pathsep) if part)


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]
