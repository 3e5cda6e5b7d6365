"""Casts that ought to be quantisations, by what feeds them, independently of any recogniser.

A cast to int8 or fp8 alone says little: masks and codes are cast too. It quantises if what it casts
was divided by (or multiplied with the reciprocal of) a largest magnitude that the program computes,
or was rounded or clamped after a division by a scale of one element that it is given. A scale that
is written as a number could be any factor; a clamp to the range of fp8 tells.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from aiter_inductor.core.dtypes import FP8_DTYPES, QUANT_DTYPES, quant_max
from aiter_inductor.core.graph import (
    TRANSPARENT,
    VIEWS,
    arg,
    dtype,
    kind,
    number,
    operands,
    source,
    tensor,
)

OPERATORS = frozenset(
    {
        "quantize_per_tensor",
        "quantize_per_token",
        "quantize_per_channel",
        "quantize_per_channel_group",
        "quantize_affine",
        "fake_quantize",
    }
)
_BOUNDS = frozenset({"round", "clamp", "clamp_min", "clamp_max", "minimum", "maximum"})
_BETWEEN = _BOUNDS | VIEWS | TRANSPARENT | {"cast", "add", "sub"}
_SCALE = _BETWEEN | {
    "abs", "mul", "div", "reciprocal", "pow", "where", "getitem", "select", "exp2",
}  # fmt: skip
_LARGEST = frozenset({"amax", "max", "aminmax"})
_FAR = 16


def quantisation_at(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes from the scaled values to the cast `node`, in graph order; none if it is another.

    An operator of torch's own that quantises is such a node by itself.
    """
    found = kind(node)
    if found in OPERATORS:
        return (node,)
    if found != "cast" or dtype(node) not in QUANT_DTYPES:
        return ()
    passed = [node]
    values = source(node)
    while isinstance(values, fx.Node) and kind(values) in _BETWEEN and len(passed) < _FAR:
        passed.append(values)
        values = source(values)
    if not isinstance(values, fx.Node) or kind(values) not in ("mul", "div"):
        return ()
    bounded = any(kind(each) in _BOUNDS for each in passed)
    if any(_computed(s) or (bounded and _given(s)) for s in _scales(values)):
        return (values, *reversed(passed))
    if any(_clamps_to_range(each, dtype(node)) for each in passed) and _scaled_by_number(values):
        return (values, *reversed(passed))
    return ()


def _clamps_to_range(node: fx.Node, qdtype: torch.dtype | None) -> bool:
    """Whether `node` clamps to what an fp8 type holds."""
    if qdtype not in FP8_DTYPES or kind(node) != "clamp":
        return False
    limit = quant_max(qdtype)
    return number(arg(node, "min")) == -limit and number(arg(node, "max")) == limit


def _scaled_by_number(node: fx.Node) -> bool:
    return any(number(operand) is not None for operand in operands(node, kind(node) or "") or ())


def _scales(node: fx.Node) -> Iterator[fx.Node]:
    """What may be the scale of a quotient or of a product."""
    if pair := operands(node, "div"):
        pair = (None, pair[1])
    else:
        pair = operands(node, "mul")
    yield from (each for each in pair or () if isinstance(each, fx.Node))


def _computed(scale: fx.Node) -> bool:
    """Whether a largest magnitude is among the few nodes that `scale` is made of."""
    seen: set[fx.Node] = set()
    ahead = [scale]
    while ahead and len(seen) < _FAR:
        node = ahead.pop()
        if kind(node) in _LARGEST:
            return True
        unary = kind(node) is None and len(node.all_input_nodes) == 1
        if node not in seen and (unary or kind(node) in _SCALE):
            seen.add(node)
            ahead.extend(node.all_input_nodes)
    return False


def _given(scale: fx.Node) -> bool:
    """Whether it is one element that the program holds, such as a buffer."""
    while kind(scale) in VIEWS | TRANSPARENT | {"cast", "reciprocal"}:
        scale = source(scale)
    found = tensor(scale)
    holds = scale.op in ("placeholder", "get_attr")
    return holds and found is not None and found.dim() <= 1 and all(n == 1 for n in found.shape)


_WEIGHTS = {"linear": "weight", "matmul": "other", "addmm": "mat2", "int_mm": "mat2"}
_DEQUANTISING = VIEWS | TRANSPARENT | {"cast", "mul", "div", "getitem"}


def multiplies_quantised(node: fx.Node) -> bool:
    """Whether `node` is a linear layer on a weight stored in fp8 or int8, or on torchao's."""
    if torchao_weight(node) is not None:
        return True
    ahead = [arg(node, _WEIGHTS.get(kind(node) or "", ""))]
    if (matrix := tensor(ahead[0])) is None or matrix.dim() != 2:
        return False
    for _ in range(_FAR):
        found = ahead.pop() if ahead else None
        if not isinstance(found, fx.Node):
            continue
        if found.op in ("placeholder", "get_attr") and dtype(found) in QUANT_DTYPES:
            return True
        unary = kind(found) is None and len(found.all_input_nodes) == 1
        if unary or kind(found) in _DEQUANTISING:
            ahead.extend(found.all_input_nodes)
    return False


def torchao_weight(node: fx.Node) -> torch.Tensor | None:
    """The weight of a linear layer, if it is one of torchao's tensor subclasses."""
    weight = tensor(arg(node, "weight")) if kind(node) == "linear" else None
    is_theirs = type(weight).__module__.partition(".")[0] == "torchao"
    return weight if is_theirs else None
