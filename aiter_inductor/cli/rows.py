"""Results of the benchmark, as data and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    Attributes:
        case: what was computed, at which sizes.
        variant: `eager`, `inductor`, `aiter`, or a provider called directly.
        latency_us: median; None if it could not run, and `note` says why.
        spread: half the interquartile range over the median.
        against_inductor: latency over Inductor's, paired by round.
        gbps: least bytes over latency.
        tflops: operations over latency.
        against_floor: latency over the floor.
        kernels: launches on the device; None where they are not counted.
        busy_us: the sum of the kernels' times, for models; what exceeds it is the host's.
        error: largest difference from eager's result, over its largest magnitude.
        peak_bytes: of device memory, for models.
        note: who computed it, or why not.
    """

    case: str
    variant: str
    latency_us: float | None
    spread: float = 0.0
    against_inductor: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    against_floor: float | None = None
    kernels: int | None = None
    busy_us: float | None = None
    error: float | None = None
    peak_bytes: int | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


HEADER = (
    "variant", "µs", "±", "/ inductor", "GB/s", "TFLOP/s", "/ floor", "kernels", "busy µs",
    "peak MB", "error", "note",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Rows as text, grouped under their cases; columns that nobody filled are left out."""
    cells = [_cells(row) for row in rows]
    used = [i for i in range(len(HEADER)) if any(line[i] for line in cells)]
    widths = {i: max(len(line[i]) for line in (HEADER, *cells)) for i in used}
    lines, last = [], None
    for row, line in zip(rows, cells, strict=True):
        if row.case != last:
            lines += ["", row.case, _line(HEADER, used, widths)]
            last = row.case
        lines.append(_line(line, used, widths))
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    latency = row.latency_us
    return (
        row.variant,
        "-" if latency is None else f"{latency:.1f}" if latency < 1e5 else f"{latency:.0f}",
        "" if latency is None else f"{row.spread:.1%}",
        _number(row.against_inductor, ".3f"),
        _number(row.gbps, ".0f" if (row.gbps or 0) >= 10 else ".2g"),
        _number(row.tflops, ".3g"),
        _number(row.against_floor, ".2f"),
        "" if row.kernels is None else str(row.kernels),
        _number(row.busy_us, ".0f"),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        _number(row.error, ".1e"),
        row.note,
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _line(cells: Sequence[str], used: Sequence[int], widths: dict[int, int]) -> str:
    first, *rest = used
    columns = [cells[first].ljust(widths[first])]
    for i in rest:
        last = i == len(HEADER) - 1
        columns.append(cells[i] if last else cells[i].rjust(widths[i]))
    return "  " + "  ".join(columns).rstrip()
