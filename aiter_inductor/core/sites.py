"""Turn decisions and expectations into the report's sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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
    claimed = [leaf for leaf, _ in leaves]
    for region in regions(graph):
        for site in _missed(region, claimed, misses, number):
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


def _missed(
    region: Region, claimed: Sequence[Match], misses: Iterable[Miss], number: int
) -> Iterator[Site]:
    here = [m for m in claimed if region.covers(m.pattern) and m.interior & region.nodes.keys()]
    lacking = region.number() - len(here)
    if lacking <= 0:
        return
    near = [miss for miss in misses if miss.node in region.nodes and region.covers(miss.pattern)]
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
