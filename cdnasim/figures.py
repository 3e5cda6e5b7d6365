"""Static figures."""

from __future__ import annotations


class StaticFigures: ...


def static_figures() -> None: ...
