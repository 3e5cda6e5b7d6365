"""Routing of tokens to experts; the Python side of moe_route.hip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import KernelSignature, f32, i32, i64, pointer
from aiter_inductor.kernels.hip.loading import (
    CPP_TYPES,
    arch_name,
    hip_module,
    load_kernel,
    wave_size,
)
from aiter_inductor.kernels.hip.rows import LaunchPlan
from aiter_inductor.kernels.prepared import Plans

SCORINGS = ("softmax", "sigmoid", "softmax_of_chosen")
THREADS = 128


@dataclass(frozen=True)
class RouteVariant:
    """One compilation of moe_route.hip; see the op `moe_route` for the fields.

    Attributes:
        group_lanes: lanes that hold a group of experts.
        lanes: of a token.
        per_lane: experts that a lane holds.
    """

    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    out_dtype: torch.dtype
    scoring: str
    num_experts: int
    num_groups: int
    topk_groups: int
    group_score: str
    topk: int
    renormalize: bool
    group_lanes: int
    lanes: int
    per_lane: int

    def module(self) -> Module:
        """moe_route.hip with these definitions."""
        return hip_module(
            "moe_route",
            "moe_route.hip",
            X=CPP_TYPES[self.dtype],
            BIAS_T=CPP_TYPES[self.bias_dtype or torch.float32],
            HAS_BIAS=self.bias_dtype is not None,
            OUT=CPP_TYPES[self.out_dtype],
            SCORING=SCORINGS.index(self.scoring),
            EXPERTS=self.num_experts,
            GROUPS=self.num_groups,
            TOPK_GROUPS=self.topk_groups,
            TOP2=self.group_score == "top2",
            TOPK=self.topk,
            RENORMALIZE=self.renormalize,
            THREADS=THREADS,
            GROUP_LANES=self.group_lanes,
            LANES=self.lanes,
            PER_LANE=self.per_lane,
        )

    def signature(self) -> KernelSignature:
        """moe_route_kernel's parameters."""
        return KernelSignature(
            "moe_route_kernel",
            (
                pointer("logits", self.dtype),
                pointer("bias", self.bias_dtype, optional=True),
                pointer("weights", self.out_dtype),
                pointer("experts", torch.int64),
                i32("num_tokens"),
                i64("logits_token"),
                f32("eps"),
                f32("scale"),
            ),
            waits=True,
        )


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    *,
    topk: int,
    scoring: str,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2",
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose `topk` of the experts of each row of `logits`; see the op of this name.

    Raises:
        ValueError: for logits that are not contiguous within a token, or too many groups.
    """
    dtype = out_dtype or torch.float32
    weights = logits.new_empty((logits.shape[0], topk), dtype=dtype)
    experts = logits.new_empty((logits.shape[0], topk), dtype=torch.int64)
    if logits.shape[0] == 0:
        return weights, experts
    style = (scoring, logits.shape[1], num_groups, topk_groups, group_score, topk, renormalize)
    bias_dtype = None if bias is None else bias.dtype
    place = arch_name(logits.device), logits.device.type
    key = (*place, style, logits.shape[0], logits.stride(), logits.dtype, bias_dtype, dtype)
    plan = _PLANS.get(key)
    if plan is None:
        lanes = _lanes(logits.shape[1], num_groups, wave_size(place[0]))
        variant = RouteVariant(logits.dtype, bias_dtype, dtype, *style, *lanes)
        plan = _PLANS.keep(key, _plan(variant, logits))
    arguments = (logits, bias, weights, experts, *plan.sizes, *plan.strides, eps, scale)
    plan.launch(plan.grid, plan.threads, 0, *arguments)
    return weights, experts


_PLANS = Plans[LaunchPlan]()


def _lanes(num_experts: int, num_groups: int, wave: int) -> tuple[int, int, int]:
    """Lanes of a group, lanes of a token, experts of a lane: a group's lanes are a power of two."""
    if num_experts % num_groups or num_groups > wave:
        raise ValueError(f"{num_experts} experts in {num_groups} groups, of at most {wave}")
    group_size = num_experts // num_groups
    most = wave // (1 << (num_groups - 1).bit_length())
    group_lanes = min(most, 1 << (group_size - 1).bit_length())
    lanes = group_lanes << (num_groups - 1).bit_length()
    return group_lanes, lanes, -(-group_size // group_lanes)


def _plan(variant: RouteVariant, logits: Tensor) -> LaunchPlan:
    if logits.stride(1) != 1:
        raise ValueError(f"logits with strides {logits.stride()} are not contiguous")
    num_tokens, place = logits.shape[0], arch_name(logits.device)
    return LaunchPlan(
        load_kernel(variant, place, logits.device.type).launch,
        (-(-num_tokens // (THREADS // variant.lanes)), 1),
        THREADS,
        (num_tokens,),
        (logits.stride(0),),
    )
