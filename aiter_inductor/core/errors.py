"""One exception class per user mistake; every message carries the values that caused it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AiterInductorError(Exception):
    """Base of every error this package raises on purpose."""


class UnknownOptionError(AiterInductorError, ValueError):
    """An option of this backend or of Inductor that does not exist."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
        super().__init__(f"unknown option {name!r}; the nearest known one is {nearest[0]!r}")


class OptionValueError(AiterInductorError, ValueError):
    """A known option with a value it cannot take."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"option {name!r} is {value!r} but must be {expected}")


class UnknownTargetError(AiterInductorError, ValueError):
    """A chip name that this package cannot plan for."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown target {name!r}; known targets are {', '.join(sorted(known))}")


class OpDefinitionError(AiterInductorError, TypeError):
    """An op or provider whose definition contradicts itself; raised at import."""


class CoverageError(AiterInductorError, AssertionError):
    """`assert_fused` found fewer sites than the contract promises."""
