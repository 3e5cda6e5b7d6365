"""One line that says how far a long run is, on stderr so that output can be piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Sequence[Item], what: str = "") -> Iterator[Item]:
    """Yield `items`, telling before each its number, its text and the time that has passed.

    On a terminal the line is rewritten in place; elsewhere each step is a line of its own.
    """
    in_place = sys.stderr.isatty()
    start = time.perf_counter()
    for number, item in enumerate(items, 1):
        passed = time.perf_counter() - start
        line = f"[{number}/{len(items)}, {passed:.0f} s] {what}{item}"
        if in_place:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
        yield item
    if in_place:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
