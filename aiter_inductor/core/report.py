"""What happened at every site, as data and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from aiter_inductor.core.errors import CoverageError


@dataclass(frozen=True)
class Site:
    """One place in a model that computes a known pattern, or was expected to.

    Attributes:
        pattern: the op it was raised to: `rms_norm`, `rope`, `silu_and_mul`, ...
        status: `fused` (a kernel took it), `inlined` (recognised, left to Inductor) or `missed`
            (expected here, not recognised).
        provider: the technology that computes it, None unless fused.
        fused_into: the op of the kernel that computes it, which may be the pattern's own.
        reason: why it was left or missed; for a fused one, why that provider.
        module: path of the module in the model, empty at the root.
        source: file and line of the program, `modeling_llama.py:61`.
        problem: the sizes and dtypes that were decided on; empty where none were read.
        graph: number of the graph within its frame: 0, or that of a checkpointed region.
        code_objects: what its kernel is loaded from, where `explain` was asked for it.
    """

    pattern: str
    status: str
    provider: str | None
    fused_into: str | None
    reason: str
    module: str
    source: str
    problem: str = ""
    graph: int = 0
    code_objects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Every site of one model, over all its graphs.

    Attributes:
        target: the chip that was planned for.
        graphs: how many graphs Dynamo captured.
        sites: in graph order.
        notes: facts about the whole: calls that were refused, fusions that were not made.
    """

    target: str
    graphs: int
    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()

    def count(self, pattern: str, status: str | None = None) -> int:
        """Sites of `pattern`, of one status or of any."""
        return sum(site.pattern == pattern and status in (None, site.status) for site in self.sites)

    def missed(self) -> tuple[Site, ...]:
        """The sites that were expected and not recognised."""
        return tuple(site for site in self.sites if site.status == "missed")

    def __add__(self, other: Report) -> Report:
        return Report(
            self.target,
            self.graphs + other.graphs,
            self.sites + other.sites,
            self.notes + other.notes,
        )

    def __str__(self) -> str:
        header = ("pattern", "status", "by", "fused into", "sites", "first module", "reason")
        rows = [header, *_rows(self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
        lines = [f"aiter_inductor report: target {self.target}, {_graphs(self.graphs)}"]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        lines.extend(_code_lines(self.sites))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def assert_fused(report: Report, **expected: int) -> None:
    """Hold a report to a coverage contract, `assert_fused(report, rms_norm=9, rope=4)`.

    Raises:
        CoverageError: naming, for each pattern with another number of fused sites, every site that
            is not fused and its reason.
    """
    complaints = []
    for pattern, wanted in expected.items():
        fused = report.count(pattern, "fused")
        if fused == wanted:
            continue
        complaints.append(f"{pattern}: {fused} fused, {wanted} expected")
        for site in report.sites:
            if site.pattern == pattern and site.status != "fused":
                where = site.module or site.source or "the root module"
                complaints.append(f"  {where}: {site.status}: {site.reason}")
    if complaints:
        raise CoverageError(f"target {report.target}\n" + "\n".join(complaints))


def _rows(sites: tuple[Site, ...]) -> list[tuple[str, ...]]:
    """One row for all sites that differ only in where they are."""
    groups: Counter[tuple[str, ...]] = Counter()
    first: dict[tuple[str, ...], str] = {}
    for site in sites:
        key = (
            site.pattern,
            site.status,
            site.provider or "",
            site.fused_into if site.fused_into and site.fused_into != site.pattern else "",
            site.reason,
        )
        groups[key] += 1
        first.setdefault(key, site.module or site.source)
    return [
        (pattern, status, by, into, str(number), first[pattern, status, by, into, reason], reason)
        for (pattern, status, by, into, reason), number in groups.items()
    ]


def _code_lines(sites: tuple[Site, ...]) -> list[str]:
    """One line for each code object of each kernel, whatever the number of its sites."""
    lines = (
        f"code: {site.fused_into} by {site.provider}: {name}"
        for site in sites
        for name in site.code_objects
    )
    return list(dict.fromkeys(lines))


def _graphs(number: int) -> str:
    return f"{number} graph" + ("" if number == 1 else "s")
