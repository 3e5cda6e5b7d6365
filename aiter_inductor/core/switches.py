"""Names that were switched off but that nothing bears."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from aiter_inductor.core.arch import KNOWN
from aiter_inductor.core.config import Options
from aiter_inductor.core.op import OPS


def switching_nothing(
    options: Options, patterns: Iterable[str], modules: Iterable[str]
) -> list[str]:
    """A sentence for each name in `options.disable` that switches nothing off.

    A note and not an error: a module path may belong to another graph of the program.

    Args:
        options: of the plan.
        patterns: names of recognisers and fusions.
        modules: paths of the modules that hold a site.
    """
    paths = set(modules)
    known = {*patterns, *OPS, *(name for arch in KNOWN.values() for name in arch.providers)}
    sentences = []
    for name in sorted(options.disable - known):
        if any(path == name or path.startswith(f"{name}.") for path in paths):
            continue
        nearest = difflib.get_close_matches(name, sorted(known | paths), n=1, cutoff=0.0)
        sentences.append(
            f"aiter.disable names {name!r}, which is no pattern, op or provider and no module "
            f"with a site here; the nearest name is {nearest[0]!r}"
        )
    return sentences
