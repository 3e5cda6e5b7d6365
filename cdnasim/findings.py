"""What a run found wrong with a kernel."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class FindingKind(enum.Enum):
    """The kinds of findings, in the numbering of native/state.hpp."""

    OUT_OF_BOUNDS = 0
    LDS_RACE = 1
    MISSING_WAIT = 2
    UNDEFINED_VALUE = 3
    WAIT_STATES = 4
    UNSUPPORTED = 5
    STUCK = 6


class Check(enum.IntFlag):
    """Checks that can be switched off. Bounds are always checked."""

    RACES = 1
    WAITS = 2
    UNDEFINED = 4
    WAIT_STATES = 8
    ALL = 15


@dataclass(frozen=True, kw_only=True)
class Place:
    """One instruction of the assembly text: line number, text, and `file:line` of its `.loc`."""

    line: int
    text: str
    source: str | None = None

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        return f"line {self.line}: {self.text}{source}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One defect: what happened, where, and how often.

    Attributes:
        kind: the check that found it.
        message: a sentence with the values in it.
        place: the instruction that was executed.
        related: the other instruction (the load not waited for, the matrix operation), if any.
        workgroup, wave, lane: of the first occurrence; lane is -1 when none is meant.
        occurrences: how many times it was seen.
    """

    kind: FindingKind
    message: str
    place: Place
    related: Place | None
    workgroup: tuple[int, int, int]
    wave: int
    lane: int
    occurrences: int

    @property
    def line(self) -> int:
        """Line number in the assembly text."""
        return self.place.line

    def __str__(self) -> str:
        lane = f", lane {self.lane}" if self.lane >= 0 else ""
        times = f", {self.occurrences} times" if self.occurrences > 1 else ""
        related = f"\n    see {self.related}" if self.related else ""
        return (
            f"{self.place}\n    {self.kind.name.lower()}: {self.message}"
            f" [workgroup {self.workgroup}, wave {self.wave}{lane}{times}]{related}"
        )


class SimulationError(RuntimeError):
    """A run found defects; `findings` holds them."""

    def __init__(self, kernel: str, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        listed = "\n".join(str(finding) for finding in findings)
        super().__init__(f"{kernel}: {len(findings)} finding(s)\n{listed}")
