"""The file format of measurements, and why a row of it is not believed.

A row is refused, with a line that says why, if it names a kernel or a launch parameter that does
not exist any more, if its figures contradict each other, or if they are more than the chip can do.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import tempfile
import typing
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from aiter_inductor.core.arch import Arch
from aiter_inductor.core.tuning import Measurement, Tuning, config_text

MAX_ERROR = 5e-3
"""Of a result, relative to the reference's root mean square; bfloat16 rounds by 1.7e-3."""
SLACK = 1.05
"""How far a rate may lie above the chip's peak: clocks are not those of the data sheet."""
FIGURES = ("latency_us", "tflops", "gbs", "error")
CARD = "card"
"""The product that was measured; empty where nobody wrote it down."""


class TunedTableWarning(UserWarning):
    """Rows of a table were refused."""


class _RefusedRow(ValueError):  # noqa: N818, it is a verdict and no error
    """Why a row is not believed."""


def columns(tuning: Tuning) -> tuple[str, ...]:
    """The header of an op's tables."""
    return ("arch", "compute_units", tuning.rows, *tuning.key, "provider", "config", *FIGURES, CARD)


def read(
    path: Path, op: str, tuning: Tuning, arch: Arch, configs: Mapping[str, type | None]
) -> list[Measurement]:
    """The believable measurements in `path` that were taken on such a chip; none without the file.

    Cards of one chip may differ in memory and power: each measurement says on which it was taken.
    """
    found, refused = [], []
    for line, row in enumerate(rows_of(path), 2):
        if row.get("arch") == arch.name and row.get("compute_units") == str(arch.compute_units):
            try:
                found.append(_measurement(row, tuning, arch, configs))
            except _RefusedRow as reason:
                refused.append(f"{path}:{line}: {reason}")
    if refused:
        shown = "\n".join(refused[:8]) + ("\n..." if len(refused) > 8 else "")
        message = f"{len(refused)} rows of the {op} table are refused:\n{shown}"
        warnings.warn(message, TunedTableWarning, stacklevel=3)
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a table as text; none without the file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{CARD: "", **row} for row in csv.DictReader(file)]


def write(path: Path, tuning: Tuning, rows: Iterable[Mapping[str, str]]) -> None:
    """Put a table in the place of `path` at once, its rows in order of key and size."""
    names = columns(tuning)
    ordered = sorted(rows, key=lambda row: [_natural(row[name]) for name in _order(tuning)])
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".csv")
    with os.fdopen(handle, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    Path(beside).chmod(0o644)
    Path(beside).replace(path)


def row(
    tuning: Tuning,
    arch: Arch,
    problem: Any,
    provider: str,
    config: Any,
    *,
    latency_us: float,
    error: float,
) -> dict[str, str]:
    """One measurement as text."""
    size, key = tuning.of_problem(problem)
    values = (arch.name, arch.compute_units, size, *key, provider, config_text(config))
    tflops, gbs = rates(problem, latency_us)
    figures = (f"{latency_us:.2f}", f"{tflops:.4g}", f"{gbs:.4g}", f"{error:.2e}", arch.card)
    shown = (str(value).removeprefix("torch.") for value in (*values, *figures))
    return dict(zip(columns(tuning), shown, strict=True))


def rates(problem: Any, latency_us: float) -> tuple[float, float]:
    """TFLOP/s and GB/s."""
    return problem.flops() / latency_us / 1e6, problem.bytes_moved() / latency_us / 1e3


def _measurement(
    row: Mapping[str, str], tuning: Tuning, arch: Arch, configs: Mapping[str, type | None]
) -> Measurement:
    names = (tuning.rows, *tuning.key)
    if missing := [name for name in columns(tuning) if row.get(name) is None]:
        raise _RefusedRow(f"it has no {', '.join(missing)}")
    hints = typing.get_type_hints(tuning.problem)
    values = {name: value_of(name, row[name], hints[name]) for name in names}
    problem = tuning.problem(**values)
    provider = row["provider"]
    if provider not in configs:
        raise _RefusedRow(f"there is no provider {provider!r}; known are {', '.join(configs)}")
    config = _config(provider, configs[provider], row["config"])
    if config is not None and (reason := config.refuse(problem)):
        raise _RefusedRow(reason)
    latency_us, tflops, gbs, error = (_figure(name, row[name]) for name in FIGURES)
    _check_rates(problem, arch, latency_us, (tflops, gbs))
    if error > MAX_ERROR:
        raise _RefusedRow(f"error={error:.1e} is above {MAX_ERROR:.0e}")
    size, key = tuning.of_problem(problem)
    return Measurement(size, key, provider, config, latency_us, row[CARD])


def _check_rates(problem: Any, arch: Arch, latency_us: float, written: tuple[float, float]) -> None:
    if latency_us <= 0:
        raise _RefusedRow(f"latency_us={latency_us} is not positive")
    actual = rates(problem, latency_us)
    for name, claimed, computed in zip(("tflops", "gbs"), written, actual, strict=True):
        if not math.isclose(claimed, computed, rel_tol=0.05, abs_tol=0.01):
            raise _RefusedRow(f"{name}={claimed:g} contradicts {computed:.4g} in {latency_us} µs")
    peak = arch.peak_tflops(problem.dtype)
    for name, rate, most in (("TFLOP/s", actual[0], peak), ("GB/s", actual[1], arch.peak_gbs)):
        if most and rate > SLACK * most:
            raise _RefusedRow(f"{rate:.0f} {name} are more than the {most:g} of {arch}")


def _config(provider: str, cls: type | None, text: str) -> Any:
    given = dict(part.partition("=")[::2] for part in text.split())
    if cls is None:
        if given:
            raise _RefusedRow(f"{provider} has no launch parameters, not {text!r}")
        return None
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := [name for name in given if name not in known]:
        raise _RefusedRow(f"{provider} has no launch parameter {unknown[0]!r}")
    try:
        return cls(**{name: int(value) for name, value in given.items()})
    except (TypeError, ValueError) as error:
        raise _RefusedRow(f"{text!r} is no config of {provider}: {error}") from error


def value_of(name: str, text: str, hint: Any) -> Any:
    """A field of a problem from its text: a number, a dtype, or a word where `hint` is str.

    Raises:
        ValueError: if it is none of them.
    """
    if hint is str:
        return text
    if text.isdigit():
        return int(text)
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise _RefusedRow(f"{name}={text!r} is neither a number nor a dtype")
    return found


def _figure(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise _RefusedRow(f"{name}={text!r} is no number") from error
    if not math.isfinite(value):
        raise _RefusedRow(f"{name}={text} is not finite")
    return value


def _order(tuning: Tuning) -> tuple[str, ...]:
    return ("arch", "compute_units", *tuning.key, tuning.rows, "latency_us")


def _natural(text: str) -> tuple[int, float, str]:
    """Numbers in their order, then text in its own."""
    try:
        return 0, float(text), ""
    except ValueError:
        return 1, 0.0, text
