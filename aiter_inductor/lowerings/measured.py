"""Where Inductor's own code is preferred to a kernel, and on what measurement.

Figures are microseconds on one H200, replayed in a CUDA graph, as docs/benchmarks.md lists them
with their commands. Other chips have no measurements yet, so nothing is declined there.
"""

from __future__ import annotations

from typing import Any

from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, fixed

MEASURED_ROWS = 64


def decline_alone(problem: Any, use: Use) -> str | None:
    """A norm by itself: 64x7168 takes 3.10 (RMS) and 3.43 (layer) against 3.96 and 4.50."""
    if not _is_hopper(use):
        return None
    return _in_training(use) or _beyond(problem.num_rows, "rows")


def decline_sum(problem: Any, use: Use) -> str | None:
    """A residual addition with its norm, which Inductor fuses too."""
    return "64x7168 takes 3.51 us on sm_90 and Inductor's code 3.28" if _is_hopper(use) else None


def decline_rotation(problem: Any, use: Use) -> str | None:
    """q and k of 128 single tokens, 32 and 8 heads: 2.67 against 4.56."""
    if not _is_hopper(use):
        return None
    return _in_training(use) or _beyond(problem.batch * problem.num_tokens, "tokens", most=128)


def decline_pointwise(problem: Any, use: Use) -> str | None:
    """A gated activation by itself reads and writes what Inductor's code does."""
    return "64x18432 takes 4.02 us on sm_90 and Inductor's code 3.77" if _is_hopper(use) else None


def _is_hopper(use: Use) -> bool:
    return use.arch.name == "sm_90"


def _in_training(use: Use) -> str | None:
    return "its backward is not measured against Inductor's on sm_90" if use.training else None


def _beyond(number: Dim, what: str, most: int = MEASURED_ROWS) -> str | None:
    known = fixed(number)
    if known is not None and known <= most:
        return None
    return f"{number} {what}: no gain over Inductor's code is measured on sm_90 above {most}"
