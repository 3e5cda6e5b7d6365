"""What a mistake of this package costs a user: one site, and a warning that names it.

Planning reads graphs of any program there is. Where it raises something that nobody foresaw, the
site stays with Inductor, whose code is right in any case. With the option `aiter.strict`, which all
tests set, the exception goes on to the user instead.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath

from torch import fx

from aiter_inductor.core.expected import source_line
from aiter_inductor.core.graph import module_path

FRAMES = 3


class PlanningFault(RuntimeWarning):
    """A site was left to Inductor because planning it raised."""


@dataclass
class Step:
    """One step of a plan; `fault` is the sentence about its exception, empty if there was none."""

    fault: str = ""


@dataclass
class Faults:
    """The exceptions of one plan.

    Attributes:
        strict: let them pass.
        sentences: one for each that was contained.
    """

    strict: bool
    sentences: list[str] = field(default_factory=list)

    @contextmanager
    def contained(self, doing: str, node: fx.Node) -> Iterator[Step]:
        """A block that ends where it raises, in strict mode with the exception."""
        step = Step()
        try:
            yield step
        except Exception as error:
            if self.strict:
                raise
            step.fault = _sentence(doing, node, error)
            self.sentences.append(step.fault)
            warnings.warn(step.fault, PlanningFault, stacklevel=3)


STRICT = Faults(strict=True)


def _sentence(doing: str, node: fx.Node, error: Exception) -> str:
    where = module_path(node) or "the root module"
    if line := source_line(node):
        where += f" ({line})"
    frames = traceback.extract_tb(error.__traceback__)[: -FRAMES - 1 : -1]
    path = " < ".join(f"{PurePath(f.filename).name}:{f.lineno} {f.name}" for f in frames)
    return (
        f"{doing} at {where} raised {type(error).__name__}: {error} [{path}]; Inductor compiles "
        "it instead. The option aiter.strict raises."
    )
