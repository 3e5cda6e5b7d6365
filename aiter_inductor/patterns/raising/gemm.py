"""Linear layers whose weight, and perhaps activations, are dequantised before the product.

`F.linear(q.float() * scale, w.float() * w_scale)` in every spelling of the product, of the way the
scales are spread over blocks and of the casts. What the program rounds to half precision between
dequantisation and product is not repeated: kernels apply the scales to sums in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.dtypes import FP8_DTYPES, ROW_DTYPES
from aiter_inductor.core.graph import (
    arg,
    commuted,
    dtype,
    dtype_name,
    kind,
    ndim,
    only_user,
    size,
    sizes,
)
from aiter_inductor.core.match import Derived, Match, Miss, Output, recogniser
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_blockscale,
    gemm_fp8_per_tensor,
    gemm_fp8_rowwise,
    gemm_int8,
    gemm_w8a16,
)
from aiter_inductor.lowerings.gemm_int4 import gemm_w4a16
from aiter_inductor.lowerings.gemm_training import TRAINED
from aiter_inductor.patterns.raising.gemm_operand import Operand, in_order, read_operand, shaped
from aiter_inductor.patterns.raising.gemm_scale import Scaling, every_row, read_scaling
from aiter_inductor.patterns.raising.gemm_zero import read_zeros
from aiter_inductor.patterns.raising.straight_through import straight_through
from aiter_inductor.patterns.raising.tail import strip_widening

PATTERN = "gemm"
PRODUCTS = ("linear", "matmul", "addmm", "int_mm", "einsum")


@dataclass
class Product:
    """`x @ weight.T + bias` as the graph has it, and the node that holds its rounded result."""

    x: fx.Node
    weight: Operand
    bias: fx.Node | None
    end: fx.Node
    interior: set[fx.Node]


@recogniser(PATTERN, *PRODUCTS)
def dequantised_linear(node: fx.Node) -> Match | Miss | None:
    """A linear layer on `weight.float() * scale`."""
    product = product_at(node)
    if product is None:
        return None
    if isinstance(product, str):
        return Miss(PATTERN, node, product)
    if not product.weight.scales or product.weight.values.e2m1:
        return None
    N, K = product.weight.values.axes.sizes
    if fixed(N) is None or fixed(K) is None:
        return Miss(PATTERN, node, f"the weight is [{N}, {K}], not known when compiling")
    follow(product)
    trained = straight_through(product.x)
    x = read_operand(trained[1] if trained else product.x)
    if trained and not (isinstance(x, Operand) and x.scales):
        trained, x = None, None
    if isinstance(x, str):
        return Miss(PATTERN, node, x)
    if x is not None and x.values.e2m1:
        x = None
    weight = stored_weight(product.weight)
    if weight is None:
        shown = product.weight.values.node.name
        return Miss(PATTERN, node, f"{shown} is rearranged between dequantisation and product")
    scaling = read_scaling(product.weight)
    if isinstance(scaling, str):
        return Miss(PATTERN, node, scaling)
    if x is None or not x.scales:
        return _weight_only(product, weight, scaling)
    made = _both(node, product, weight, scaling, x)
    return _trained(product, weight, scaling, made, trained) if trained else made


def _trained(
    product: Product,
    weight: fx.Node | Derived,
    scaling: Scaling,
    made: Match | Miss | None,
    trained: tuple[fx.Node, fx.Node, frozenset[fx.Node]],
) -> Match | Miss | None:
    """A product through which gradients pass to what x was quantised from.

    Not every one has such a form; of others the weight alone is read as quantised.
    """
    if not isinstance(made, Match) or made.op not in TRAINED:
        return _weight_only(product, weight, scaling)
    wide, _, nodes = trained
    op = TRAINED[made.op]
    args, kept = (wide, *made.args), made.kept | nodes
    return replace(made, pattern=op.name, op=op, args=args, kept=kept)


def product_at(node: fx.Node) -> Product | str | None:
    """The layer behind `node` if its weight is dequantised; a sentence if no kernel does it so."""
    bias: Any = None
    in_rows = kind(node) == "linear"
    if in_rows:
        x, matrix, bias = arg(node, "input"), arg(node, "weight"), arg(node, "bias")
    elif kind(node) == "addmm":
        x, matrix, bias = arg(node, "mat1"), arg(node, "mat2"), arg(node, "input")
    elif kind(node) == "einsum":
        x, matrix, in_rows = _summed(node)
    else:
        x, matrix = arg(node, "input"), arg(node, "mat2" if kind(node) == "int_mm" else "other")
    if not isinstance(x, fx.Node) or ndim(matrix) != 2 or ndim(x) < 1:
        return None
    weight = read_operand(matrix)
    if isinstance(weight, Operand) and not in_rows:
        weight = weight.transposed()
    if not isinstance(weight, Operand):
        return weight
    if kind(node) == "addmm" and any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return "addmm scales its bias or its product; kernels add the bias as it is"
    if bias is not None and sizes(bias) != (size(node, -1),):
        return f"{getattr(bias, 'name', bias)} is added as bias but is no row of {size(node, -1)}"
    return Product(x, weight, bias, node, {node})


def _summed(node: fx.Node) -> tuple[Any, Any, bool]:
    """`(x, weight, whether it is [N, K])` of an einsum that is a linear layer; else Nones."""
    equation, *operands = node.args
    if not isinstance(equation, str) or len(operands) != 2:
        return None, None, False
    inputs, _, result = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if len(right) == 2 and left and len(set(left + right)) == len(left) + 1:
        for summed, kept, in_rows in ((right[1], right[0], True), (right[0], right[1], False)):
            if left[-1] == summed and result == left[:-1] + kept:
                return operands[0], operands[1], in_rows
    return None, None, False


def follow(product: Product) -> None:
    """Take in a bias and a narrowing cast behind the product."""
    while (user := only_user(product.end)) is not None:
        if kind(user) == "cast":
            before, after = dtype(product.end), dtype(user)
            if before != torch.float32 or after not in ROW_DTYPES or after == before:
                return
        elif product.bias is None and (bias := _row(user, product.end)) is not None:
            product.bias = bias
        else:
            return
        product.end = user
        product.interior.add(user)


def _row(user: fx.Node, end: fx.Node) -> fx.Node | None:
    for left, right in commuted(user, "add"):
        if left is end and isinstance(right, fx.Node) and dtype(right) in ROW_DTYPES:
            if sizes(right) == (size(end, -1),) and dtype(user) == dtype(end):
                return right
    return None


def stored_weight(operand: Operand) -> fx.Node | Derived | None:
    """The stored weight as [N, K], or as [N, K / 2] if a byte holds two elements."""
    N, K = operand.values.axes.sizes
    if packed := operand.values.packed:
        return packed if in_order(operand.values) and sizes(packed) == (N, K // 2) else None
    if in_order(operand.values):
        return shaped(operand.values.node, (N, K))
    turned = operand.transposed()
    if turned is None or not in_order(turned.values):
        return None
    stored = shaped(operand.values.node, (K, N))
    return None if stored is None else Derived(torch.t, (stored,))


def _weight_only(
    product: Product, weight: fx.Node | Derived, scaling: Scaling
) -> Match | Miss | None:
    x, quantised = rows_of_result(product), product.weight
    if isinstance(x, str):
        return Miss(PATTERN, product.end, x)
    kwargs: dict[str, Any] = {}
    if quantised.values.packed:
        zeros = read_zeros(quantised, scaling)
        if isinstance(zeros, str):
            return Miss(PATTERN, product.end, zeros)
        offset_binary = quantised.values.offset_binary
        kwargs = {"group_size": scaling.block_k, "offset_binary": offset_binary}
        args = (x, weight, scaling.as_blocks(), product.bias, *zeros)
        return matched(product, gemm_w4a16, args, kwargs, quantised.nodes)
    if scaling.constant:
        scale: Any = Derived(every_row, (scaling.one(), weight))
    elif scaling.by_row:
        scale = scaling.as_vector()
    else:
        scale = scaling.as_blocks()
        kwargs = {"block_n": scaling.block_n, "block_k": scaling.block_k}
    args = (x, weight, scale, product.bias)
    return matched(product, gemm_w8a16, args, kwargs, quantised.nodes)


def rows_of_result(product: Product) -> fx.Node | str:
    """x in the result's dtype, perhaps before a cast that widened it; a sentence if it is not."""
    x, wanted = product.x, dtype(product.end)
    if dtype(x) == torch.float32 and dtype(strip_widening(x)) == wanted:
        x = strip_widening(x)
    if dtype(x) == wanted:
        return x
    result = dtype_name(product.end)
    return f"x is {dtype_name(x)} and the result {result}; kernels keep x's dtype"


def unequal_kinds(x: Operand, weight: Operand) -> str | None:
    """Why no kernel multiplies two quantised operands, or None: int8 by int8, fp8 by fp8."""
    stored = x.values.node, weight.values.node
    kinds = {dtype(node) for node in stored}
    if len(kinds) == 1 or kinds <= {*FP8_DTYPES}:
        return None
    shown = " and ".join(map(dtype_name, stored))
    return f"x and weight are {shown}; kernels multiply equal kinds"


def _both(
    node: fx.Node, product: Product, weight: fx.Node | Derived, w: Scaling, x: Operand
) -> Match | Miss | None:
    q = shaped(x.values.node, x.values.axes.sizes) if in_order(x.values) else None
    if q is None:
        shown = x.values.node.name
        return Miss(PATTERN, node, f"{shown} is rearranged between dequantisation and product")
    scaling = read_scaling(x)
    if isinstance(scaling, str):
        return Miss(PATTERN, node, scaling)
    if scaling.columns.axes and not scaling.tokens:
        reason = f"{scaling.name} varies along K but not by token; no kernel takes that"
        return Miss(PATTERN, node, reason)
    if product.weight.values.packed or x.values.packed:
        return Miss(PATTERN, node, "both operands are quantised and one is int4; no kernel is")
    if unequal := unequal_kinds(x, product.weight):
        return Miss(PATTERN, node, unequal)
    is_int8 = dtype(x.values.node) == torch.int8
    kwargs: dict[str, Any] = {"out_dtype": dtype(product.end)}
    coarse = scaling.per_row and (w.constant or w.by_row)
    if is_int8 and not coarse:
        return Miss(PATTERN, node, f"int8 is scaled by blocks ({w.shown()}); kernels scale rows")
    op, scales = gemm_fp8_blockscale, (scaling.as_groups(), w.as_blocks())
    if not is_int8 and scaling.constant and w.constant:
        op, scales = gemm_fp8_per_tensor, (scaling.one(), w.one())
    elif coarse:
        op = gemm_int8 if is_int8 else gemm_fp8_rowwise
        by_row = w.as_vector() if w.by_row else Derived(every_row, (w.one(), weight))
        by_token = scaling.as_groups()
        if scaling.constant and not scaling.tokens:
            by_token = Derived(every_token, (scaling.one(), q))
        scales = (by_token, by_row)
    elif scaling.constant and not scaling.tokens:
        reason = (
            f"x has one scale, {scaling.name}, and the weight {w.shown()}; no kernel mixes them"
        )
        return Miss(PATTERN, node, reason)
    else:
        kwargs |= {"group_size": scaling.block_k, "block_n": w.block_n, "block_k": w.block_k}
    if scales[0] is None or scales[1] is None:
        return Miss(PATTERN, node, f"{scaling.name} cannot be reshaped to one scale a group")
    nodes = product.weight.nodes | x.nodes
    return matched(product, op, (q, weight, *scales, product.bias), kwargs, nodes)


def every_token(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One scale [] as a scale a token [*, 1] of x [*, K]."""
    return scale.expand(*x.shape[:-1], 1)


def matched(
    product: Product,
    op: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kept: frozenset[fx.Node],
) -> Match:
    """The product as a call of `op`; `kept` are the nodes that dequantise its operands."""
    interior = frozenset(product.interior)
    return Match(op.name, op, args, kwargs, (Output(product.end),), interior, kept=kept)
