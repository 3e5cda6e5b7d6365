"""What this package recognises and what it fuses, in the order in which it is tried."""

from __future__ import annotations

from aiter_inductor.core.match import Fusion, Recogniser
from aiter_inductor.patterns.raising import rms_norm

RAISING: tuple[Recogniser, ...] = (
    rms_norm.functional_rms_norm,
    rms_norm.spelled_rms_norm,
)

FUSION: tuple[Fusion, ...] = ()
