"""Rotary embeddings, in every spelling and layout that models use.

The walk starts where two products are added and follows the result to where the head is whole
again. What counts is what each element of it is computed from: `x[a]·cos − x[b]·sin` for the first
of a pair and `x[b]·cos + x[a]·sin` for the second, with the pairs' places in x and in the result,
and the order of the tables, read off the graph. Heads turned the other way, as NanoChat's, have
both signs of sin reversed; the op gets -sin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.dtypes import promoted
from aiter_inductor.core.graph import dtype, kind, only_user, operands, size, sizes, source, tensor
from aiter_inductor.core.match import Derived, Match, Miss, Output, nodes_in, recogniser
from aiter_inductor.lowerings.rope import rope
from aiter_inductor.patterns.raising.rope_grid import Cell, Read
from aiter_inductor.patterns.raising.rope_lanes import Lanes
from aiter_inductor.patterns.raising.rope_views import last_sizes

PATTERN = "rope"

_GROWS = frozenset(
    {"cast", "cat", "stack", "flatten", "reshape", "transpose", "view_as_real", "contiguous"}
)
_MOST_STEPS = 6
"""From a sum to the whole head: a cast, a stack, a flatten, a cat, a transpose and a copy."""
_TUPLES = frozenset({"chunk", "split", "unbind"})
_LAYOUTS = ((False, False), (True, False), (True, True), (False, True))


@dataclass(frozen=True)
class Rotation:
    """What the elements of a head turned out to be.

    Attributes:
        x: the node that is rotated.
        cos, sin: tables, nodes or `Derived`s.
        interleaved_in, interleaved_out: layouts of the pairs.
        rotary_dim: elements rotated.
        settled: the op would lay the result out as the program does.
    """

    x: fx.Node
    cos: Any
    sin: Any
    interleaved_in: bool
    interleaved_out: bool
    rotary_dim: int
    settled: bool


@dataclass(frozen=True)
class Obstacle:
    """Why a head is not a rotation, and how far it was one."""

    reason: str
    progress: int = 0


@recogniser(PATTERN, "add", "sub", "view_as_real")
def rotary_embedding(node: fx.Node) -> Match | Miss | None:
    """A pair of rotated elements, whole heads of them, and what passes by."""
    if not _adds_products(node):
        return None
    lanes = Lanes()
    found: list[tuple[fx.Node, Rotation]] = []
    obstacles: list[Obstacle] = []
    for end in _ends(node):
        grid = lanes.sum(end, 1)
        if grid is None:
            continue
        rotation = _rotation(lanes, end, grid.cells)
        if isinstance(rotation, Obstacle):
            obstacles.append(rotation)
        else:
            found.append((end, rotation))
    if obstacle := _open_width(node):
        return Miss(PATTERN, node, obstacle)
    if found:
        settled = [pair for pair in found if pair[1].settled]
        return _match(lanes, *(settled or found)[-1])
    if obstacles and _permutes(lanes, node):
        nearest = max(obstacles, key=lambda obstacle: obstacle.progress)
        return Miss(PATTERN, node, nearest.reason)
    return None


def _adds_products(node: fx.Node) -> bool:
    if kind(node) == "view_as_real":
        return kind(source(node)) == "mul"
    pair = operands(node, kind(node) or "")
    return pair is not None and all(kind(_plain(operand)) == "mul" for operand in pair)


def _open_width(core: fx.Node) -> str | None:
    """A sentence if the head's size is open and `core` reads a part of something."""
    if kind(core) == "view_as_real" or last_sizes(core, 1) is not None:
        return None
    products = [_plain(operand) for operand in operands(core, kind(core) or "") or ()]
    factors = [_plain(factor) for product in products for factor in operands(product, "mul") or ()]
    if any(kind(factor) in ("cat", "stack", "getitem", "narrow", "slice") for factor in factors):
        return f"head_dim {size(core, -1)} of {core.name} is not known when compiling"
    return None


def _plain(node: Any) -> Any:
    while kind(node) in ("cast", "neg"):
        node = source(node)
    return node


def _ends(core: fx.Node) -> Iterator[fx.Node]:
    """`core` and what its elements alone become, up to where something else reads them."""
    end: fx.Node | None = core
    for _ in range(_MOST_STEPS):
        if end is None:
            return
        yield end
        user = only_user(end)
        end = user if kind(user) in _GROWS else None


def _rotation(lanes: Lanes, end: fx.Node, cells: Sequence[Cell]) -> Rotation | Obstacle:
    """Read a whole head as a rotation of one tensor."""
    R = 0
    while len(cells) > R and len(cells[R]) == 2 and all(len(r) == 2 for _, r in cells[R]):
        R += 1
    if R == 0 or R % 2:
        return Obstacle(f"{R} leading elements of {end.name} are sums of two products, not pairs")
    nearest = Obstacle(_no_tensor(end, cells[:R]))
    for x in _inputs(lanes, end, len(cells)):
        place = {read: i for i, read in enumerate(_reads(lanes, x))}
        found = _rotation_of(lanes, end, x, place, cells, R)
        if isinstance(found, Rotation):
            return found
        nearest = max(nearest, found, key=lambda obstacle: obstacle.progress)
    return nearest


def _inputs(lanes: Lanes, end: fx.Node, width: int) -> Iterator[fx.Node]:
    """Nodes of `end`'s size whose elements are all different, the earliest first."""
    for node, rank in list(lanes.read):
        if rank == 1 and sizes(node) == sizes(end):
            reads = _reads(lanes, node)
            if len(reads) == width == len(set(reads)):
                yield node


def _reads(lanes: Lanes, node: fx.Node) -> tuple[Read, ...]:
    """The elements that the last dimension of `node` holds; none if it is no such row."""
    grid = lanes.read.get((node, 1))
    return (grid.reads if grid is not None else None) or ()


def _no_tensor(end: fx.Node, cells: Sequence[Cell]) -> str:
    names = dict.fromkeys(read[0].name for cell in cells for _, reads in cell for read in reads)
    size = list(sizes(end) or ())
    return f"{end.name} mixes elements of {', '.join(names)}; none of them is all of a {size} head"


def _rotation_of(
    lanes: Lanes,
    end: fx.Node,
    x: fx.Node,
    place: dict[Read, int],
    cells: Sequence[Cell],
    R: int,
) -> Rotation | Obstacle:
    products: list[dict[int, tuple[int, Read]]] = []
    for i, cell in enumerate(cells[:R]):
        factors = {}
        for sign, (left, right) in cell:
            if (left in place) == (right in place):
                which = "both factors" if left in place else "no factor"
                return Obstacle(f"element {i} of {end.name} has {which} from {x.name}", 1)
            mine, table = (left, right) if left in place else (right, left)
            factors[place[mine]] = (sign, table)
        if len(factors) != 2:
            return Obstacle(f"element {i} of {end.name} reads {x.name}[{place[mine]}] twice", 1)
        products.append(factors)
    for i, cell in enumerate(cells[R:], R):
        sign, reads = cell[0]
        if len(cell) != 1 or sign != 1 or len(reads) != 1 or place.get(reads[0]) != i:
            return Obstacle(f"element {i} of {end.name} is not {x.name}[{i}] passed through", 2)
    nearest = Obstacle("", -1)
    for layout in _LAYOUTS:
        for turn in (1, -1):
            found = _tables_of(x, products, layout, turn)
            if isinstance(found, Obstacle):
                nearest = max(nearest, found, key=lambda obstacle: obstacle.progress)
            else:
                return _with_tables(lanes, end, x, found, layout, turn, len(cells))
    return nearest


def _tables_of(
    x: fx.Node,
    products: Sequence[dict[int, tuple[int, Read]]],
    layout: tuple[bool, bool],
    turn: int,
) -> tuple[list[Read], list[Read]] | Obstacle:
    """What cos and sin are for each element, if x is laid out so and `turn` is the sign of sin."""
    interleaved_in, interleaved_out = layout
    half = len(products) // 2
    cos, sin = [], []
    for i, factors in enumerate(products):
        pair, second = _pair(i, half, interleaved_out)
        a, b = (2 * pair, 2 * pair + 1) if interleaved_in else (pair, pair + half)
        own, other, sign = (b, a, turn) if second else (a, b, -turn)
        if own not in factors or other not in factors:
            return Obstacle(_wrong(x, i, factors, own, other, sign), 3 + i)
        if factors[own][0] != 1 or factors[other][0] != sign:
            return Obstacle(_wrong(x, i, factors, own, other, sign), 3 + i)
        cos.append(factors[own][1])
        sin.append(factors[other][1])
    return cos, sin


def _pair(i: int, half: int, interleaved: bool) -> tuple[int, bool]:
    """Which pair element i belongs to, and whether it is the second of it."""
    return (i // 2, bool(i % 2)) if interleaved else (i % half, i >= half)


def _wrong(
    x: fx.Node, i: int, factors: dict[int, tuple[int, Read]], own: int, other: int, sign: int
) -> str:
    terms = (
        f"{'+' if sign > 0 else '-'}{x.name}[{at}]·{table[0].name}[{table[2]}]"
        for at, (sign, table) in factors.items()
    )
    wanted = f"{x.name}[{own}]·cos {'+' if sign > 0 else '-'} {x.name}[{other}]·sin"
    return f"element {i} is {' '.join(terms)}, where a rotation has {wanted}"


def _with_tables(
    lanes: Lanes,
    end: fx.Node,
    x: fx.Node,
    tables: tuple[list[Read], list[Read]],
    layout: tuple[bool, bool],
    turn: int,
    D: int,
) -> Rotation | Obstacle:
    R = len(tables[0])
    progress = 3 + R
    summed = kind(_plain(end)) in ("add", "sub")
    # The op's result is laid out like x for one kind of table and contiguous for the other where
    # neither layout is interleaved and nothing passes through; see `lowerings.rope`.
    ambiguous = layout == (False, False) and R == D
    cos, sin = (_table(lanes, reads, layout[1], ambiguous and summed) for reads in tables)
    for name, reads, table in zip(("cos", "sin"), tables, (cos, sin), strict=True):
        if table is None:
            order = ", ".join(f"{read[0].name}[{read[2]}]" for read in reads[:6])
            return Obstacle(f"{name} is read as {order}, ..., which is no table's order", progress)
    assert cos is not None
    assert sin is not None
    if cos[1] != sin[1]:
        return Obstacle(f"cos is {cos[1]} wide but sin is {sin[1]}", progress)
    if cos[0] == sin[0]:
        return Obstacle(f"cos and sin are both {next(nodes_in(cos[0])).name}", progress)
    for node in nodes_in((cos[0], sin[0])):
        if (found := tensor(node)) is not None and found.requires_grad and torch.is_grad_enabled():
            return Obstacle(f"{node.name} requires grad and rope has none for its tables", progress)
    settled = not ambiguous or (cos[1] == R) == summed
    turned = sin[0] if turn > 0 else Derived(torch.neg, (sin[0],))
    return Rotation(x, cos[0], turned, *layout, R, settled)


def _table(
    lanes: Lanes, reads: Sequence[Read], interleaved: bool, prefer_full: bool
) -> tuple[Any, int] | None:
    """A table that holds `reads`, and its width: one for each element, or one for each pair."""
    R = len(reads)
    half = R // 2
    pairs: list[Read | None] = [None] * half
    shared = True
    for i, read in enumerate(reads):
        pair, _ = _pair(i, half, interleaved)
        shared = shared and pairs[pair] in (None, read)
        pairs[pair] = read
    full = _holding(lanes, tuple(reads))
    narrow = _holding(lanes, tuple(pairs)) if shared else None
    options = ((full, R), (narrow, half)) if prefer_full else ((narrow, half), (full, R))
    return next((option for option in options if option[0] is not None), None)


def _holding(lanes: Lanes, wanted: tuple[Read | None, ...]) -> Any:
    """The earliest node, or the cheapest view to insert, whose elements are `wanted`."""
    for node, rank in lanes.read:
        if rank == 1 and _reads(lanes, node) == wanted:
            return node
    first = wanted[0]
    if first is None:
        return None
    node, rank, start = first
    if rank != 1:
        return None
    if (found := tensor(node)) is not None and found.is_complex():
        if wanted == tuple((node, 1, 2 * i + start) for i in range(len(wanted))) and start < 2:
            return Derived(torch.select, (Derived(torch.view_as_real, (node,)), -1, start))
    elif wanted == tuple((node, 1, start + i) for i in range(len(wanted))):
        return Derived(torch.narrow, (node, -1, start, len(wanted)))
    return None


def _permutes(lanes: Lanes, core: fx.Node) -> bool:
    """Whether a product reads elements out of their places or with signs of their own."""
    grid = lanes.sum(core, 1)
    if grid is None:
        return kind(core) == "view_as_real"
    if any(len(cell) != 2 or any(len(reads) != 2 for _, reads in cell) for cell in grid.cells):
        return False
    for term in range(2):
        if len({cell[term][0] for cell in grid.cells}) == 2:
            return True
        for factor in range(2):
            places = [cell[term][1][factor][2] for cell in grid.cells]
            if len(set(places)) == len(places) > 1 and places != list(range(len(places))):
                return True
    return False


def _match(lanes: Lanes, end: fx.Node, found: Rotation) -> Match:
    kwargs: dict[str, Any] = {}
    if found.interleaved_in:
        kwargs["interleaved_in"] = True
    if found.interleaved_out:
        kwargs["interleaved_out"] = True
    if (width := sizes(found.x)) and width[-1] != found.rotary_dim:
        kwargs["rotary_dim"] = found.rotary_dim
    table = next(nodes_in(found.cos))
    x_dtype, table_dtype, out = dtype(found.x), dtype(table), dtype(end)
    assert x_dtype is not None
    assert table_dtype is not None
    table_dtype = table_dtype.to_real()
    if out != promoted(x_dtype, table_dtype):
        kwargs["out_dtype"] = out
    args = (found.x, found.cos, found.sin)
    return Match(PATTERN, rope, args, kwargs, (Output(end),), _between(lanes, end, found.x))


def _between(lanes: Lanes, end: fx.Node, x: fx.Node) -> frozenset[fx.Node]:
    """The nodes that make `end` out of `x`: those that read it, directly or through each other."""
    seen = {node for node, _ in (*lanes.read, *lanes.computed)}
    reaches = {x: True}

    def depends(node: fx.Node) -> bool:
        if node not in reaches:
            reaches[node] = False
            for each in node.all_input_nodes:
                if node not in lanes.sources and (each in seen or kind(each) in _TUPLES):
                    reaches[node] |= depends(each)
        return reaches[node]

    depends(end)
    return frozenset(node for node, reached in reaches.items() if reached and node is not x)
