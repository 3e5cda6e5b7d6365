"""Turn decisions and expectations into the report's sites."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from aiter_inductor.core.expected import Region, regions, source_line
from aiter_inductor.core.graph import module_path
from aiter_inductor.core.match import Match, Miss
from aiter_inductor.core.plan import Decision
from aiter_inductor.core.report import Site


def sites_of(
    graph: fx.Graph, decisions: Sequence[Decision], misses: Iterable[Miss], number: int
) -> tuple[Site, ...]:
    """Every recognised site, then every expected one that nothing claimed. Before any rewrite.

    Args:
        graph: the graph as captured.
        decisions: what `Selector` decided.
        misses: near misses, whose sentences explain expected sites.
        number: of the graph, for `Site.graph`.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    leaves = [(leaf, decision) for decision in decisions for leaf in decision.match.leaves()]
    found = [(position[leaf.anchor], _site(leaf, decision, number)) for leaf, decision in leaves]
    known = _Known.of((leaf for leaf, _ in leaves), misses)
    for region in regions(graph):
        for site in _missed(region, known, number):
            found.append((position[next(iter(region.nodes))], site))
    return tuple(site for _, site in sorted(found, key=lambda pair: pair[0]))


def _site(leaf: Match, decision: Decision, number: int) -> Site:
    provider = decision.provider
    return Site(
        pattern=leaf.pattern,
        status="inlined" if provider is None else "fused",
        provider=None if provider is None else provider.name,
        fused_into=None if provider is None else decision.match.op.name,
        reason=decision.reason,
        module=module_path(leaf.anchor),
        source=source_line(leaf.anchor),
        problem=decision.problem,
        graph=number,
    )


@dataclass(frozen=True)
class _Known:
    """By node, the recognised sites that compute it, and the near misses at it."""

    sites: Mapping[fx.Node, Sequence[Match]]
    misses: Mapping[fx.Node, Sequence[Miss]]

    @classmethod
    def of(cls, leaves: Iterable[Match], misses: Iterable[Miss]) -> _Known:
        sites, near = defaultdict(list), defaultdict(list)
        for leaf in leaves:
            for node in leaf.interior:
                sites[node].append(leaf)
        for miss in misses:
            near[miss.node].append(miss)
        return cls(sites, near)


def _missed(region: Region, known: _Known, number: int) -> Iterator[Site]:
    here = {m for n in region.nodes for m in known.sites.get(n, ()) if region.covers(m.pattern)}
    lacking = region.number() - len(here)
    if lacking <= 0:
        return
    near = [m for n in region.nodes for m in known.misses.get(n, ()) if region.covers(m.pattern)]
    reason = near[0].reason if near else _nothing_known(region)
    node = near[0].node if near else next(iter(region.nodes))
    for _ in range(lacking):
        yield Site(
            pattern=near[0].pattern if near else region.pattern,
            status="missed",
            provider=None,
            fused_into=None,
            reason=reason,
            module=region.module,
            source=source_line(node),
            graph=number,
        )


def _nothing_known(region: Region) -> str:
    names = list(dict.fromkeys(getattr(n.target, "__name__", str(n.target)) for n in region.nodes))
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"none of its {len(region.nodes)} nodes ({shown}) starts a known {region.pattern}"
