"""Which kernel, with which launch parameters, measured fastest: tables, and how they are read.

An op that is tuned leaves one dimension of its problem open, the number of rows M; a table holds
measurements at some M for each of the other dimensions together, the key. For one key they make a
*ladder*: which measurement to follow for any M. A ladder is made once; a call then costs a look
into a dictionary and a bisection.
"""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiter_inductor.core.arch import Arch
from aiter_inductor.core.config import tuned_dirs

Key = tuple[Any, ...]
FAR = 4
"""Times as many rows, or as few, for which a measurement is followed."""
SHIPPED = Path(__file__).parents[1] / "kernels" / "tuned"


class Config(Protocol):
    """Launch parameters of a provider: a frozen dataclass of integers."""

    @classmethod
    def candidates(cls, problem: Any, arch: Arch) -> Iterable[Config]:
        """What `tune` tries for a problem."""

    def refuse(self, problem: Any) -> str | None:
        """Why the kernel cannot run the problem with these parameters, or None."""


@dataclass(frozen=True)
class Tuning:
    """What a table of an op is keyed by.

    Attributes:
        rows: the field of the op's problem that a program may leave open.
        key: the fields that a measurement is good for. Those named in neither, such as whether
            there is a bias, do not change the choice.
        problem: the problem's class.
        of_call: `(device, rows, key)` from a call's own arguments; it makes no problem, for it
            runs at every call.
    """

    rows: str
    key: tuple[str, ...]
    problem: type
    of_call: Callable[..., tuple[Any, Any, Key]]

    def of_problem(self, problem: Any) -> tuple[Any, Key]:
        """`(rows, key)` of a problem."""
        return getattr(problem, self.rows), tuple(getattr(problem, name) for name in self.key)


@dataclass(frozen=True)
class Measurement:
    """One row of a table.

    Attributes:
        rows: the open dimension at which it was taken.
        key: values of `Tuning.key`.
        provider: who computed it.
        config: with which launch parameters; None for a provider that has none.
        latency_us: how long a call took.
        card: the product it was taken on; empty if that is not known.
    """

    rows: int
    key: Key
    provider: str
    config: Any
    latency_us: float
    card: str = ""


@dataclass(frozen=True)
class Ladder:
    """The measurement to follow for each number of rows.

    Attributes:
        bounds: the largest number of rows of each step but the last.
        steps: from few rows to many; None where the measurements around are more than `FAR` off.
        least, most: for fewer or more rows, `FAR` times beyond what was measured, it says nothing.
    """

    bounds: tuple[int, ...]
    steps: tuple[Measurement | None, ...]
    least: int
    most: int

    @classmethod
    def of(cls, measurements: Iterable[Measurement]) -> Ladder:
        """From all measurements of one key, of which the fastest at each number of rows counts.

        Between two of them the lower one's kernel takes at most its time in proportion to the
        rows, and the upper one's at most what it took for more rows: the lower one is followed as
        far as the first bound is the better. More than `FAR` from both neither is followed: what is
        fastest for 64 rows is made for few, and what is for 4096 has no tiles for fewer.
        """
        fastest: dict[int, Measurement] = {}
        for found in measurements:
            best = fastest.get(found.rows)
            if best is None or found.latency_us < best.latency_us:
                fastest[found.rows] = found
        measured = [fastest[rows] for rows in sorted(fastest)]
        steps: list[Measurement | None] = []
        bounds: list[int] = []
        for low, high in itertools.pairwise(measured):
            even = int(low.rows * high.latency_us / low.latency_us)
            until, first = min(max(even, low.rows), high.rows - 1), -(-high.rows // FAR)
            steps.append(low)
            if low.rows * FAR + 1 < first:
                bounds += [min(until, low.rows * FAR), first - 1]
                steps.append(None)
            else:
                bounds.append(until)
        least, most = -(-measured[0].rows // FAR), measured[-1].rows * FAR
        return cls(tuple(bounds), (*steps, measured[-1]), least, most)

    def at(self, rows: int) -> Measurement | None:
        """For that many rows the nearest, as far as it says anything."""
        if not self.least <= rows <= self.most:
            return None
        return self.steps[bisect_left(self.bounds, rows)]

    def providers(self) -> tuple[str, ...]:
        """Everybody on it, the one for the most rows first."""
        return tuple(dict.fromkeys(step.provider for step in reversed(self.steps) if step))


class Tables:
    """The measurements of one op on every chip, read when first asked for."""

    def __init__(
        self, op: str, tuning: Tuning, configs: Callable[[], Mapping[str, type | None]]
    ) -> None:
        """`configs` gives, by the name of each provider the op has, the class of its config."""
        self.op, self.tuning, self._configs = op, tuning, configs
        self._read: dict[Chip, dict[Key, list[Measurement]]] = {}
        self._ladders: dict[tuple[Chip, Key, frozenset[str]], Ladder | None] = {}

    def ladder(self, arch: Arch, key: Key, providers: Collection[str]) -> Ladder | None:
        """What was measured of these providers for `key`; None if nothing was."""
        where = (_chip(arch), key, frozenset(providers))
        if where not in self._ladders:
            found = [m for m in self._measured(arch).get(key, ()) if m.provider in providers]
            self._ladders[where] = Ladder.of(_of_card(found, arch.card)) if found else None
        return self._ladders[where]

    def forget(self) -> None:
        """Read the files anew when next asked."""
        self._read.clear()
        self._ladders.clear()

    def _measured(self, arch: Arch) -> dict[Key, list[Measurement]]:
        chip = _chip(arch)
        if chip not in self._read:
            from aiter_inductor.core import tuned_table

            by_key = defaultdict(list)
            for path in table_paths(self.op, arch.name):
                for found in tuned_table.read(path, self.op, self.tuning, arch, self._configs()):
                    by_key[found.key].append(found)
            self._read[chip] = dict(by_key)
        return self._read[chip]


Chip = tuple[str, int, str]


def _chip(arch: Arch) -> Chip:
    return arch.name, arch.compute_units, arch.card


def _of_card(measured: Sequence[Measurement], card: str) -> list[Measurement]:
    """Where a number of rows was measured on this card, that; else what another one took.

    Times of two cards are not compared with each other.
    """
    cards: dict[int, str] = {}
    for found in measured:
        if found.rows not in cards or found.card == card:
            cards[found.rows] = found.card
    return [found for found in measured if found.card == cards[found.rows]]


class ByRows:
    """Runs each call with the provider and the config measured fastest for its number of rows.

    The graph holds the names it may choose from, so that one compiled graph serves all sizes.
    """

    def __init__(
        self,
        tables: Tables,
        runs: Mapping[str, Callable[..., Any]],
        arch_of: Callable[[Any], Arch],
    ) -> None:
        """`runs`: by name, in order of preference where nothing was measured."""
        self._tables, self._runs, self._arch_of = tables, runs, arch_of
        self._of_call = tables.tuning.of_call
        self._ladders: dict[Any, Ladder | None] = {}

    def choose(self, *args: Any, **kwargs: Any) -> Measurement | None:
        """The measurement to follow for a call, or None if its key was not measured."""
        device, rows, key = self._of_call(*args, **kwargs)
        try:
            ladder = self._ladders[device, key]
        except KeyError:
            ladder = self._tables.ladder(self._arch_of(device), key, self._runs)
            self._ladders[device, key] = ladder
        if ladder is None or not isinstance(rows, int):  # open while a graph is traced
            return None
        return ladder.at(rows)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute."""
        found = self.choose(*args, **kwargs)
        if found is None:
            return next(iter(self._runs.values()))(*args, **kwargs)
        if found.config is None:
            return self._runs[found.provider](*args, **kwargs)
        return self._runs[found.provider](*args, **kwargs, config=found.config)


def table_paths(op: str, arch: str) -> Sequence[Path]:
    """The files that may hold measurements of `op` on `arch`: a user's, then the shipped one."""
    return [root / arch / f"{op}.csv" for root in (*tuned_dirs(), SHIPPED)]


def config_text(config: Any) -> str:
    """`block_m=64 block_n=128 ...`; empty for None."""
    if config is None:
        return ""
    fields = dataclasses.fields(config)
    return " ".join(f"{field.name}={getattr(config, field.name)}" for field in fields)
