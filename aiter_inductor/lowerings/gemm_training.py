"""The block-scaled product in training: rounding has no gradient, so it is passed straight through.

What is multiplied are numbers in fp8; the gradient goes to the rows that they were quantised from,
as if those had been multiplied with the dequantised weight (Bengio et al. 2013, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.arch import arch_of
from aiter_inductor.core.op import Use, op
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_blockscale,
    of_gemm_blockscale,
    spread,
    spread_last,
)
from aiter_inductor.lowerings.gemm_problem import GemmProblem


@dataclass(frozen=True)
class TrainedGemmProblem(GemmProblem):
    """A GemmProblem that is told, too, what x was quantised from: rows of `out_dtype`."""

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As the product's, with x as it is after dequantisation in front."""
        (x, weight, x_scale, *others), kwargs = super().sample(seed=seed, device=device)
        wide = (x.float() * spread_last(x_scale, x.shape[-1], self.group_size)).to(self.out_dtype)
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
    return TrainedGemmProblem(**{f.name: getattr(made, f.name) for f in fields(made)})


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
    weight, bias = saved["weight"], saved["bias"]
    factor = spread(saved["weight_scale"], weight.shape, (saved["block_n"], saved["block_k"]))
    columns = (weight.to(factor.dtype) * factor).to(grad.dtype)
    of_bias = None if bias is None else grad.flatten(0, -2).sum(0).to(bias.dtype)
    return {"wide": grad @ columns, "bias": of_bias}


def product_unsupported(problem: GemmProblem, use: Use) -> str | None:
    """Why nobody computes the product without the gradient."""
    plain = Use(use.arch, force=use.force, disabled=use.disabled)
    found = gemm_fp8_blockscale.select(problem, plain)
    return None if found.provider else found.reason


def slower_in_training(problem: GemmProblem, use: Use) -> str | None:
    """Forward and backward of one layer on an H100, launch by launch: benchmarks/fp8_training.py.

    512 x 4096 x 4096 took 539 us against 453. Both calls were bound by the host, which then chose
    among providers at each call; the plan does that now, and nobody has measured since.
    """
    if use.arch.name != "sm_90":
        return None
    return "a step of 4096 x 4096 x 4096 took 582 us on an H100 and Inductor's code 469"


@gemm_fp8_blockscale_straight_through.provider(
    "torch", refuse=product_unsupported, decline=slower_in_training, traceable=True
)
def _(
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
    blocks = {"group_size": group_size, "block_n": block_n, "block_k": block_k}
    problem = of_straight_through(
        wide, x, weight, x_scale, weight_scale, bias, **blocks, out_dtype=out_dtype
    )
    # By name, so that a compiled graph does not select at each call.
    found = gemm_fp8_blockscale.select(problem, Use(arch_of(x.device))).provider
    name = "reference" if found is None else found.name
    out: Tensor = gemm_fp8_blockscale(
        x, weight, x_scale, weight_scale, bias, **blocks, out_dtype=out_dtype, provider=name
    )
    return out
