"""Which headers a source pulls in, so that a change in any of them is a change of the cache key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


def included_files(sources: Iterable[Path], include_dirs: Iterable[Path] = ()) -> tuple[Path, ...]:
    """Every file that `sources` include, transitively, in the order of first mention.

    A name that is found neither beside the including file nor in `include_dirs` belongs to the
    compiler, whose version is part of the cache key. Conditions are not evaluated: a header named
    under any `#if` counts.
    """
    search = tuple(include_dirs)
    found: dict[Path, None] = {}
    waiting = [Path(source) for source in sources]
    while waiting:
        file = waiting.pop(0)
        for quoted, angled in _INCLUDE.findall(file.read_text(encoding="utf-8")):
            places = (file.parent, *search) if quoted else search
            for place in places:
                header = (place / (quoted or angled)).resolve()
                if header.is_file():
                    if header not in found:
                        found[header] = None
                        waiting.append(header)
                    break
    return tuple(found)
