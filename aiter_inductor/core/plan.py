"""From a graph to decisions: what it means, what may run together, and who computes it.

Three stages, none of which changes the graph: `raise_matches` finds ops, `fuse_matches` merges
neighbours, `select` asks the providers. `rewrite.apply` then carries out what was decided.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from aiter_inductor.core import effects as effects_
from aiter_inductor.core.config import Options
from aiter_inductor.core.faults import STRICT, Faults
from aiter_inductor.core.graph import kind, module_path, tensor, value
from aiter_inductor.core.match import Fusion, Match, Matches, Miss, Recogniser, fake, leak
from aiter_inductor.core.neighbours import neighbour
from aiter_inductor.core.op import Provider, Use
from aiter_inductor.core.problem import describe
from aiter_inductor.core.results import FakeResults, mismatch
from aiter_inductor.core.wrapped import not_plain


@dataclass(frozen=True)
class Decision:
    """Who computes one match, where it is put, why, and what it gives for fake values."""

    match: Match
    provider: Provider | None
    reason: str
    before: fx.Node | None = None
    problem: str = ""
    declined: bool = False
    results: Any = field(default=None, compare=False)


@dataclass
class Findings:
    """What raising saw: matches and the near misses that explain their absence."""

    matches: Matches = field(default_factory=Matches)
    misses: list[Miss] = field(default_factory=list)


def raise_matches(
    graph: fx.Graph, recognisers: Sequence[Recogniser], faults: Faults = STRICT
) -> Findings:
    """Try every recogniser on the nodes it is anchored on; the first match of a node stands."""
    by_kind: dict[str, list[Recogniser]] = defaultdict(list)
    for recogniser in recognisers:
        for anchor in recogniser.anchors:
            by_kind[anchor].append(recogniser)
    findings = Findings()
    taken: set[fx.Node] = set()
    effects_.effects_of.cache_clear()
    for node in graph.nodes:
        for recogniser in by_kind.get(kind(node) or "", ()):
            found: Match | Miss | None = None
            with faults.contained(f"recognising {recogniser.pattern}", node) as step:
                found = recogniser.recognise(node)
            if step.fault:
                found = Miss(recogniser.pattern, node, step.fault)
            if isinstance(found, Miss):
                findings.misses.append(found)
            elif found is not None and found.anchor not in taken:
                taken.update(output.node for output in found.outputs if output is not None)
                findings.matches.add(found)
                break
    return findings


def fuse_matches(
    matches: Matches, fusions: Sequence[Fusion], options: Options, faults: Faults = STRICT
) -> list[str]:
    """Apply each fusion, in order, to every match of its ops; returns the refusals."""
    notes = []
    for rule in fusions:
        if options.disables(rule.name):
            continue
        for op in rule.ops:
            for match in matches.of(op):
                if match not in matches:  # an earlier fusion took it in
                    continue
                fused: Match | str | None = None
                with faults.contained(f"fusing {rule.name}", match.anchor):
                    fused = rule.fuse(match, matches)
                if isinstance(fused, str):
                    notes.append(f"{rule.name} at {module_path(match.anchor) or 'root'}: {fused}")
                elif fused is not None:
                    matches.replace(fused.parts, fused)
    return notes


@dataclass(frozen=True)
class Selector:
    """Decides matches of one graph for one chip."""

    effects: effects_.Effects
    options: Options
    use: Use
    faults: Faults
    results: FakeResults = field(default_factory=FakeResults)

    def decide(self, match: Match) -> list[Decision]:
        """One decision for the whole match, or one for each part if nobody can take the whole.

        Where Inductor's code is preferred for the whole, it gets the whole: it fuses these parts
        too, and a kernel for one of them would only stand in between. A part that is taken by
        itself tells why the whole was not.
        """
        with self.faults.contained(f"planning {match.op.name}", match.anchor) as step:
            decision = self._whole(match)
        if step.fault:
            decision = Decision(match, None, step.fault)
        if decision.provider is not None or decision.declined or not match.parts:
            return [decision]
        parts = [found for part in match.parts for found in self.decide(part)]
        return [_apart(found, match.op.name, decision.reason) for found in parts]

    def _whole(self, match: Match) -> Decision:
        if off := self.options.disables(*_names(match)):
            return Decision(match, None, f"{off} is disabled")
        made = {output.node.name: value(output.node) for output in match.ends()}
        before = leak(match) or not_plain(made) or self.place(match)
        if isinstance(before, str):
            return Decision(match, None, before)
        if written := self._written_behind(match):
            return Decision(match, None, written)
        arguments = {k: fake(v) for k, v in match.op.bind(*match.args, **match.kwargs).items()}
        if reason := not_plain(arguments):
            return Decision(match, None, reason)
        problem = match.op.problem(**arguments)
        use = replace(
            self.use,
            training=_needs_grad(match),
            force=self.options.force,
            disabled=self.options.disables,
            neighbour=neighbour(match),
        )
        selection = match.op.select(problem, use)
        if selection.provider is None:
            return Decision(
                match,
                None,
                selection.reason,
                problem=describe(problem),
                declined=selection.declined,
            )
        results = self.results.of(match, selection.provider.name)
        if reason := mismatch(match, results):
            return Decision(match, None, reason, problem=describe(problem))
        return Decision(
            match, selection.provider, selection.reason, before, describe(problem), results=results
        )

    def place(self, match: Match) -> fx.Node | str:
        """The node before which the op can stand, or why there is none.

        It must stand after its last input and before the first reader of any output, and nothing
        in between may write to what the match reads or switch the autograd mode. The latest such
        place is taken, the first output's own, so that nothing lives longer than in the program.
        """
        position = self.effects.position
        inputs = list(match.inputs())
        newest = max(inputs, key=position.__getitem__)
        ends = [output.node for output in match.ends()]
        for end in ends:
            for user in end.users:
                if user not in match.interior and position[user] <= position[newest]:
                    return (
                        f"{user.name} reads {end.name} before {newest.name}, which the kernel "
                        "needs too, is computed"
                    )
        own = min(ends, key=position.__getitem__)
        before = own if position[newest] < position[own] else newest.next
        computed = match.interior | match.kept
        touched = [position[node] for node in (*computed, before)]
        reads = frozenset(s for n in (*inputs, *computed) for s in effects_.storages(n))
        span = min(touched) - 1, max(touched)
        if crossed := self.effects.between(*span, reads, match.interior):
            return f"{crossed.name} writes to what it reads or switches a mode in between"
        if reader := self._reads_what_moves(match, span):
            return f"{reader.name} reads what it writes, in between"
        return before

    def _written_behind(self, match: Match) -> str | None:
        """Why autograd would not take an op of several results: one is saved and written to."""
        if len(match.outputs) < 2 or not _needs_grad(match):
            return None
        for end in match.ends():
            if writer := self.effects.writer(end.node, match.interior):
                return f"{writer.name} writes to {end.node.name}, which its gradients are made from"
        return None

    def _reads_what_moves(self, match: Match, span: tuple[int, int]) -> fx.Node | None:
        """A node that would see a write of `match` earlier, or later, than in the program."""
        targets = [match.argument(name) for name in match.op.mutates]
        written = frozenset(s for target in targets for s in effects_.storages(target))
        return self.effects.reader(*span, written, match.interior) if written else None


def _apart(part: Decision, whole: str, reason: str) -> Decision:
    if part.provider is None:
        return part
    return replace(part, reason=f"{part.reason}, but not as {whole}: {reason}")


def _names(match: Match) -> Iterator[str]:
    """What switches a match off: its own pattern, op and module, and those of what it merges."""
    yield from filter(None, (match.pattern, match.op.name, module_path(match.anchor)))
    for part in match.parts:
        yield from _names(part)


def _needs_grad(match: Match) -> bool:
    """Whether gradients flow through the match: its result requires grad in the captured graph."""
    values = (tensor(output.node) for output in match.outputs if output is not None)
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in values)
