"""Linear layers whose product is scaled: `F.linear(x, q.to(x.dtype)) * scale`, `_int_mm(...) * s`.

The weight's scale is one for all or one an output feature, x's one for all or one a token, so they
may as well be applied behind the sum over K. Kernels do that too, before they round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.dtypes import QUANT_DTYPES, ROW_DTYPES
from aiter_inductor.core.graph import dtype, kind, only_user, operands, sizes
from aiter_inductor.core.match import Derived, Match, Miss, recogniser
from aiter_inductor.core.op import Op
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_per_tensor,
    gemm_fp8_rowwise,
    gemm_int8,
    gemm_w8a16,
)
from aiter_inductor.patterns.raising.gemm import (
    PATTERN,
    PRODUCTS,
    Product,
    every_token,
    follow,
    matched,
    product_at,
    rows_of_result,
    stored_weight,
    unequal_kinds,
)
from aiter_inductor.patterns.raising.gemm_operand import (
    Operand,
    in_order,
    read_operand,
    shaped,
)
from aiter_inductor.patterns.raising.gemm_scale import every_row


@dataclass
class Factors:
    """What a product is multiplied with: scales of tokens, of features, and of all."""

    tokens: list[Any] = field(default_factory=list)
    features: list[Any] = field(default_factory=list)
    all: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens) + len(self.features) + len(self.all)

    def add(self, factor: Any, shape: tuple[Any, ...], divides: bool, split: bool) -> bool:
        """Whether `factor` is a scale of a result of this shape; then it is kept, in fp32.

        With `split`, a product of two scales counts as both.
        """
        pair = operands(factor, "mul")
        if pair and (split or sizes(factor) == shape) and not divides:
            if all(_role(each, shape) for each in pair):
                first, second = pair
                return self.add(first, shape, False, split) and self.add(
                    second, shape, False, split
                )
        role = _role(factor, shape)
        made: Any = None if role is None else shaped(factor, role[1])
        if role is None or made is None:
            return False
        if dtype(factor) != torch.float32:
            made = Derived(torch.Tensor.float, (made,))
        getattr(self, role[0]).append(Derived(torch.reciprocal, (made,)) if divides else made)
        return True


def _role(factor: Any, shape: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]] | None:
    """What a factor of a result of this shape scales, and the shape in which ops take it."""
    if not isinstance(factor, fx.Node) or dtype(factor) not in ROW_DTYPES:
        return None
    found = sizes(factor) or ()
    count = math.prod(found)
    if count == 1:
        return "all", ()
    if found[-1] == count == shape[-1]:
        return "features", (count,)
    return ("tokens", found) if found == (*shape[:-1], 1) else None


@recogniser(PATTERN, *PRODUCTS)
def scaled_product(node: fx.Node) -> Match | Miss | None:
    """A linear layer on stored values, scaled after the product."""
    product = product_at(node)
    if not isinstance(product, Product) or product.weight.scales or product.weight.values.packed:
        return None
    if dtype(product.weight.values.node) not in QUANT_DTYPES:
        return None
    x = read_operand(product.x)
    both = isinstance(x, Operand) and not x.scales and not x.values.packed
    factors = _factors(product, split=False)
    if both and len(factors) != 2:
        product = product_at(node)
        assert isinstance(product, Product)
        factors = _factors(product, split=True)
    if not factors:
        return None
    if product.bias is not None:
        return Miss(PATTERN, node, f"{product.bias.name} is added before the product is scaled")
    N, K = product.weight.values.axes.sizes
    if fixed(N) is None or fixed(K) is None:
        return Miss(PATTERN, node, f"the weight is [{N}, {K}], not known when compiling")
    follow(product)
    weight = stored_weight(product.weight)
    if weight is None:
        shown = product.weight.values.node.name
        return Miss(PATTERN, node, f"{shown} is rearranged before the product")
    made = _both(product, x, weight, factors) if both else _alone(product, weight, factors)
    if isinstance(made, str):
        return Miss(PATTERN, node, made)
    op, args, kwargs = made
    kept = product.weight.nodes | (x.nodes if isinstance(x, Operand) and both else frozenset())
    return matched(product, op, (*args, product.bias), kwargs, kept)


def _factors(product: Product, split: bool) -> Factors:
    """The scales behind the product, whose end moves to the last of them."""
    found, shape = Factors(), sizes(product.end) or ()
    end: fx.Node = product.end
    passed: set[fx.Node] = set()
    while (user := only_user(end)) is not None:
        if kind(user) in ("mul", "div"):
            left, right = operands(user, kind(user) or "") or (None, None)
            factor = right if left is end else left if kind(user) == "mul" else None
            if sizes(user) != shape or not found.add(factor, shape, kind(user) == "div", split):
                break
            product.interior |= {*passed, user}
            product.end, passed = user, set()
        elif kind(user) == "cast" and dtype(user) in ROW_DTYPES:
            passed.add(user)
        else:
            break
        end = user
    return found


Made = tuple[Op, tuple[Any, ...], dict[str, Any]]


def _alone(product: Product, weight: Any, factors: Factors) -> Made | str:
    """Only the weight is quantised."""
    x, found = rows_of_result(product), [*factors.features, *factors.all]
    if factors.tokens or len(found) != 1:
        return f"the product has {len(factors)} scales, of which one is the weight's"
    if isinstance(x, str):
        return x
    scale = found[0] if factors.features else Derived(every_row, (found[0], weight))
    return gemm_w8a16, (x, weight, scale), {}


def _both(product: Product, x: Any, weight: Any, factors: Factors) -> Made | str:
    """x is quantised as well."""
    q = shaped(x.values.node, x.values.axes.sizes) if in_order(x.values) else None
    if q is None:
        return f"{x.values.node.name} is rearranged before the product"
    if reason := unequal_kinds(x, product.weight):
        return reason
    tokens, features, left = factors.tokens, factors.features, list(factors.all)
    if len(tokens) > 1 or len(features) > 1 or len(factors) != 2:
        return f"the product has {len(factors)} scales, not one of x and one of the weight"
    kwargs = {"out_dtype": dtype(product.end)}
    is_int8 = dtype(x.values.node) == torch.int8
    if not is_int8 and len(left) == 2:
        return gemm_fp8_per_tensor, (q, weight, *left), kwargs
    of_x = tokens[0] if tokens else Derived(every_token, (left.pop(0), q))
    of_weight = features[0] if features else Derived(every_row, (left.pop(0), weight))
    op = gemm_int8 if is_int8 else gemm_fp8_rowwise
    return op, (q, weight, of_x, of_weight), kwargs
