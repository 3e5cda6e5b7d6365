"""Quantised products in training: rounding has no gradient, so it is passed straight through.

What is multiplied are numbers in eight bits; the gradient goes to the rows that they were quantised
from, as if those had been multiplied with the dequantised weight (Bengio et al. 2013, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.arch import arch_of
from aiter_inductor.core.op import Op, Use, Verdict, op
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_blockscale,
    gemm_fp8_rowwise,
    gemm_int8,
    gradients_of_rows,
    of_gemm_blockscale,
    of_gemm_rowwise,
    spread,
    spread_last,
)
from aiter_inductor.lowerings.gemm_problem import GemmProblem

MANY_ROWS = 4096


@dataclass(frozen=True)
class TrainedGemmProblem(GemmProblem):
    """A GemmProblem that is told, too, what x was quantised from: rows of `out_dtype`."""

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As the product's, with x as it is after dequantisation in front."""
        (x, weight, x_scale, *others), kwargs = super().sample(seed=seed, device=device)
        group_size = self.group_size or x.shape[-1]
        wide = (x.float() * spread_last(x_scale, x.shape[-1], group_size)).to(self.out_dtype)
        return (wide, x, weight, x_scale, *others), kwargs


def of_straight_through(
    wide: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
) -> TrainedGemmProblem:
    """The problem of the product itself: `wide` is not read."""
    blocks = {"group_size": group_size, "block_n": block_n, "block_k": block_k}
    made = of_gemm_blockscale(x, weight, x_scale, weight_scale, bias, **blocks, out_dtype=out_dtype)
    return _trained(made)


def of_rowwise_straight_through(
    wide: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> TrainedGemmProblem:
    """As `of_straight_through`, of products scaled by rows."""
    return _trained(of_gemm_rowwise(x, weight, x_scale, weight_scale, bias, out_dtype=out_dtype))


def _trained(made: GemmProblem) -> TrainedGemmProblem:
    return TrainedGemmProblem(**vars(made))


@op(problem=of_straight_through)
def gemm_fp8_blockscale_straight_through(
    wide: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`gemm_fp8_blockscale`, whose gradient goes to what x was quantised from.

    Args:
        wide: [*, K], any float dtype: gets the gradient `grad @ weight`, dequantised.
        x, weight, x_scale, weight_scale, bias: as there; the bias gets a gradient too.
        group_size, block_n, block_k, out_dtype: as there.

    Returns:
        [*, N], `out_dtype`.
    """
    blocks = {"group_size": group_size, "block_n": block_n, "block_k": block_k}
    out: Tensor = gemm_fp8_blockscale.reference(
        x, weight, x_scale, weight_scale, bias, **blocks, out_dtype=out_dtype
    )
    return out


@gemm_fp8_blockscale_straight_through.backward("weight", "weight_scale", "bias")
def _(saved: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    weight = saved["weight"]
    factor = spread(saved["weight_scale"], weight.shape, (saved["block_n"], saved["block_k"]))
    return _to_wide(saved, grad, factor)


def _to_wide(saved: dict[str, Any], grad: Tensor, factor: Tensor) -> dict[str, Tensor | None]:
    """Gradients of `wide` and of the bias; `factor` dequantises the weight."""
    columns = saved["weight"].to(factor.dtype) * factor
    found = gradients_of_rows(grad, columns, saved["bias"])
    return {"wide": found["x"], "bias": found["bias"]}


@op(problem=of_rowwise_straight_through)
def gemm_fp8_rowwise_straight_through(
    wide: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`gemm_fp8_rowwise`, whose gradient goes to what x was quantised from.

    Args:
        wide: [*, K], any float dtype: gets the gradient `grad @ weight`, dequantised.
        x, weight, x_scale, weight_scale, bias, out_dtype: as there; the bias gets a gradient too.

    Returns:
        [*, N], `out_dtype`.
    """
    out: Tensor = gemm_fp8_rowwise.reference(
        x, weight, x_scale, weight_scale, bias, out_dtype=out_dtype
    )
    return out


@op(problem=of_rowwise_straight_through)
def gemm_int8_straight_through(
    wide: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`gemm_int8`, whose gradient goes to what x was quantised from.

    Args:
        wide: [*, K], any float dtype: gets the gradient `grad @ weight`, dequantised.
        x, weight, x_scale, weight_scale, bias, out_dtype: as there; the bias gets a gradient too.

    Returns:
        [*, N], `out_dtype`.
    """
    out: Tensor = gemm_int8.reference(x, weight, x_scale, weight_scale, bias, out_dtype=out_dtype)
    return out


for made in (gemm_fp8_rowwise_straight_through, gemm_int8_straight_through):

    @made.backward("weight", "weight_scale", "bias")
    def _(saved: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
        return _to_wide(saved, grad, saved["weight_scale"].reshape(-1, 1))


TRAINED = {
    gemm_fp8_blockscale: gemm_fp8_blockscale_straight_through,
    gemm_fp8_rowwise: gemm_fp8_rowwise_straight_through,
    gemm_int8: gemm_int8_straight_through,
}
"""Of each product the op through which gradients pass."""


def slower_in_training(problem: GemmProblem, use: Use) -> str | None:
    """Few rows on Hopper, where the host is what a step waits for: benchmarks/fp8_training.py.

    Four layers of 4096 x 4096 by blocks, in us on an H100, Inductor's code second: 4096 rows 1476
    and 1778, 2048 rows 1136 and 954, 1024 rows 1007 and 729, 512 rows 847 and 631. On the chip a
    step of one layer takes 310 us and 404 at 4096 rows, 66 and 72 at 512. With launches prepared
    once an H200 takes 1598 and 1776 at 4096, 1152 and 991 at 2048, 896 and 807 at 1024, 1071 and
    968 at 512. By rows 4096 took 1968 and 1889 beside other work on the card, int8 was not
    measured.
    """
    rows = fixed(problem.M)
    many = rows is not None and rows >= MANY_ROWS
    if use.arch.name != "sm_90" or (many and problem.scaling == "block"):
        return None
    if many:
        return "4 x 4096 x 4096 x 4096 by rows took 1968 us a step on sm_90, Inductor 1889"
    return f"M={problem.M}: 2048 rows of 4 x 4096 x 4096 take 1136 us a step on sm_90, Inductor 954"


def _multiplying(product: Op) -> Callable[..., Tensor]:
    """The product by whom its own op selects, when the graph is made, and by name in the graph."""
    signature = TRAINED[product].signature

    def run(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        device = given.pop("wide").device
        found = product.select(product.problem(**given), Use(arch_of(device))).provider
        name = "reference" if found is None else found.name
        out: Tensor = product(**given, provider=name)
        return out

    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def _unsupported(product: Op) -> Verdict:
    """Why nobody computes the product without the gradient."""

    def verdict(problem: GemmProblem, use: Use) -> str | None:
        plain = Use(use.arch, force=use.force, disabled=use.disabled)
        found = product.select(problem, plain)
        return None if found.provider else found.reason

    return verdict


for product, trained in TRAINED.items():
    trained.provider(
        "torch", refuse=_unsupported(product), decline=slower_in_training, traceable=True
    )(_multiplying(product))
