"""MXFP4: linears on operands dequantised by a table."""

from __future__ import annotations

from typing import Any

from torch import fx

from aiter_inductor.core.graph import dtype
from aiter_inductor.core.match import Match, Miss, recogniser
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.mxfp4 import GROUP, gemm_mxfp4
from aiter_inductor.patterns.raising.gemm import PRODUCTS, Product, follow, matched, product_at
from aiter_inductor.patterns.raising.gemm_e2m1 import read_e8m0
from aiter_inductor.patterns.raising.gemm_operand import Operand, in_order, read_operand, shaped
from aiter_inductor.patterns.raising.gemm_scale import read_scaling


@recogniser(gemm_mxfp4.name, *PRODUCTS)
def dequantised_mxfp4(node: fx.Node) -> Match | Miss | None:
    """A linear layer both of whose operands are elements from a table times powers of two."""
    product = product_at(node)
    if not isinstance(product, Product) or not product.weight.values.e2m1:
        return None
    x = read_operand(product.x)
    if not isinstance(x, Operand) or not x.values.e2m1:
        reason = f"x, {product.x.name}, is not in MXFP4; kernels multiply two such operands"
        return Miss(gemm_mxfp4.name, node, reason)
    follow(product)
    operands = []
    for operand in (x, product.weight):
        found = _stored(operand)
        if isinstance(found, str):
            return Miss(gemm_mxfp4.name, node, found)
        operands.append(found)
    (q, of_x), (weight, of_weight) = operands
    args = (q, weight, of_x, of_weight, product.bias)
    kwargs = {"out_dtype": dtype(product.end)}
    return matched(product, gemm_mxfp4, args, kwargs, product.weight.nodes | x.nodes)


def _stored(operand: Operand) -> tuple[Any, Any] | str:
    """The bytes of the elements [*, K / 2] and of the scales [*, K / 32], or why not."""
    values, shape = operand.values, operand.values.axes.sizes
    assert values.packed is not None
    K = fixed(shape[-1])
    packed = None if K is None else shaped(values.packed, (*shape[:-1], K // 2))
    if K is None or packed is None or not in_order(values):
        return f"{values.packed.name} is rearranged between dequantisation and product"
    scaling = read_scaling(operand)
    if isinstance(scaling, str):
        return scaling
    block = K if scaling.columns.count == 1 else scaling.block_k
    if scaling.divides or not scaling.tokens or block != GROUP:
        return f"{scaling.name} is not multiplied with {GROUP} elements of each row"
    codes = read_e8m0(scaling.node)
    if codes is None:
        return f"{scaling.name} is not known to be a power of two that a byte holds"
    made = shaped(codes, (*shape[:-1], K // GROUP))
    return f"{codes.name} is shaped anew" if made is None else (packed, made)
