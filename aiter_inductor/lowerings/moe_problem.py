"""What routing chooses from, what sorting by expert is given, and what their kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed, is_row_major
from aiter_inductor.lowerings.arguments import apart

SCORINGS = ("softmax", "sigmoid", "softmax_of_chosen")
GROUP_SCORES = ("top2", "max")
MAX_EXPERTS = 1024
MAX_TOPK = 32
MAX_GROUPS = 32


@dataclass(frozen=True)
class RouteProblem:
    """Router logits and how experts are chosen from them; see the op `moe_route`.

    Attributes:
        num_tokens: rows of logits.
        num_experts: logits of a row.
        topk: experts chosen for each token.
        num_groups: groups of neighbouring experts.
        topk_groups: groups whose experts may be chosen.
        dtype: of the logits.
        bias_dtype: of the bias, None without one.
        out_dtype: of the weights.
        scoring: `softmax`, `sigmoid` or `softmax_of_chosen`.
        group_score: `top2` or `max`.
        renormalize: weights of a token are divided by their sum.
        eps: added to that sum.
        scale: factor on the weights.
        obstacle: what no kernel takes about these tensors, or None.
    """

    num_tokens: Dim
    num_experts: Dim
    topk: int
    num_groups: int
    topk_groups: int
    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    out_dtype: torch.dtype
    scoring: str
    group_score: str = "top2"
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0
    obstacle: str | None = None

    @classmethod
    def of(
        cls,
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
    ) -> RouteProblem:
        """From the arguments of `moe_route`."""
        return cls(
            num_tokens=dim(logits.shape[0]),
            num_experts=dim(logits.shape[-1]),
            topk=topk,
            num_groups=num_groups,
            topk_groups=topk_groups,
            dtype=logits.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            out_dtype=out_dtype or torch.float32,
            scoring=scoring,
            group_score=group_score,
            renormalize=renormalize,
            eps=eps,
            scale=scale,
            obstacle=_unfit_logits(logits, bias),
        )

    def bytes_moved(self) -> Dim:
        """Logits and bias read once, weights and numbers of experts written once."""
        read = self.num_tokens * self.num_experts * self.dtype.itemsize
        chosen = self.num_tokens * self.topk * (self.out_dtype.itemsize + 8)
        return read + chosen + self.num_experts * (self.bias_dtype or torch.uint8).itemsize

    def flops(self) -> Dim:
        """One comparison for each logit and expert chosen."""
        return self.num_tokens * self.num_experts * (1 + self.topk)

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random logits, and a bias a tenth as large."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = self.num_tokens, self.num_experts
        logits = torch.randn(shape, generator=generator, device=device).to(self.dtype)
        bias = None
        if self.bias_dtype is not None:
            bias = torch.randn(self.num_experts, generator=generator, device=device) / 10
            bias = bias.to(self.bias_dtype)
        return (logits, bias), {
            "topk": self.topk,
            "scoring": self.scoring,
            "num_groups": self.num_groups,
            "topk_groups": self.topk_groups,
            "group_score": self.group_score,
            "renormalize": self.renormalize,
            "eps": self.eps,
            "scale": self.scale,
            "out_dtype": self.out_dtype,
        }


def route_unsupported(problem: RouteProblem, use: Use) -> str | None:
    """What no routing kernel takes."""
    if problem.obstacle:
        return problem.obstacle
    for name, dtype in (
        ("logits", problem.dtype),
        ("bias", problem.bias_dtype or torch.float32),
        ("weights", problem.out_dtype),
    ):
        if dtype not in ROW_DTYPES:
            return f"{name}: {short_name(dtype)}; kernels take bfloat16, float16, float32"
    experts = fixed(problem.num_experts)
    if experts is None:
        return f"num_experts {problem.num_experts} is not known when compiling"
    for name, size, most in (
        ("num_experts", experts, MAX_EXPERTS),
        ("topk", problem.topk, min(MAX_TOPK, experts)),
        ("num_groups", problem.num_groups, MAX_GROUPS),
        ("topk_groups", problem.topk_groups, problem.num_groups),
    ):
        if not 1 <= size <= most:
            return f"{name}={size} is outside 1 to {most}"
    group_size = experts // problem.num_groups
    if experts % problem.num_groups:
        return f"num_experts={experts} is no multiple of num_groups={problem.num_groups}"
    if problem.topk > problem.topk_groups * group_size:
        return (
            f"topk={problem.topk} exceeds the {problem.topk_groups * group_size} experts of "
            f"topk_groups={problem.topk_groups} groups"
        )
    if problem.num_groups > 1 and problem.group_score == "top2" and group_size == 1:
        return "a group of one expert has no two best"
    return None


@dataclass(frozen=True)
class SortProblem:
    """Chosen experts that are to be brought together, expert by expert, in blocks.

    Attributes:
        num_tokens: rows of chosen experts.
        topk: experts of a token.
        num_experts: experts in all.
        block_m: entries of a block; each expert's entries fill whole blocks.
        dtype: of the experts' numbers.
        weight_dtype: of the weights.
        obstacle: what no kernel takes about these tensors, or None.
    """

    num_tokens: Dim
    topk: Dim
    num_experts: int
    block_m: int
    dtype: torch.dtype = torch.int64
    weight_dtype: torch.dtype = torch.float32
    obstacle: str | None = None

    @classmethod
    def of(cls, experts: Tensor, weights: Tensor, *, num_experts: int, block_m: int) -> SortProblem:
        """From the arguments of `moe_sort`."""
        obstacle = None
        shapes = [[*map(dim, x.shape)] for x in (experts, weights)]
        if shapes[0] != shapes[1] or experts.dim() != 2:
            obstacle = f"experts {shapes[0]} and weights {shapes[1]} differ"
        elif not (is_row_major(experts) and is_row_major(weights)):
            obstacle = "experts or weights are not contiguous"
        else:
            obstacle = apart(experts, weights) or None
        num_tokens, topk = dim(experts.shape[0]), dim(experts.shape[-1])
        dtypes = experts.dtype, weights.dtype
        return cls(num_tokens, topk, num_experts, block_m, *dtypes, obstacle)

    def bytes_moved(self) -> Dim:
        """Experts and weights read once, the sorted entries and the blocks written once."""
        entries = self.num_tokens * self.topk
        capacity = sorted_capacity(entries, self.num_experts, self.block_m)
        read = entries * (self.dtype.itemsize + self.weight_dtype.itemsize)
        return read + capacity * 8 + capacity // self.block_m * 4 + (self.num_experts + 1) * 4

    def flops(self) -> Dim:
        """One comparison for each entry."""
        return self.num_tokens * self.topk

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Distinct random experts for each token, and random weights."""
        generator = torch.Generator(device).manual_seed(seed)
        scores = torch.rand(self.num_tokens, self.num_experts, generator=generator, device=device)
        weights, experts = scores.topk(self.topk)
        args = experts.to(self.dtype), weights.to(self.weight_dtype)
        return args, {"num_experts": self.num_experts, "block_m": self.block_m}


def sorted_capacity(entries: Dim, num_experts: int, block_m: int) -> Dim:
    """Places that the padded blocks of all experts may need: a multiple of block_m.

    Every expert but those without entries may waste block_m - 1 places.
    """
    few = entries * block_m
    many = (entries + num_experts * (block_m - 1)) // block_m * block_m
    return min(few, many) if isinstance(entries, int) else many


def sort_unsupported(problem: SortProblem, use: Use) -> str | None:
    """What no sorting kernel takes."""
    if problem.obstacle:
        return problem.obstacle
    if problem.dtype not in (torch.int32, torch.int64):
        return f"experts are {short_name(problem.dtype)}; kernels take int32 and int64"
    if problem.weight_dtype not in ROW_DTYPES:
        weights = short_name(problem.weight_dtype)
        return f"weights are {weights}; kernels take bfloat16, float16, float32"
    if not 1 <= problem.num_experts <= MAX_EXPERTS:
        return f"num_experts={problem.num_experts} is outside 1 to {MAX_EXPERTS}"
    if problem.block_m < 1 or problem.block_m & (problem.block_m - 1):
        return f"block_m={problem.block_m} is no power of two"
    return None


def _unfit_logits(logits: Tensor, bias: Tensor | None) -> str | None:
    if logits.dim() != 2 or dim(logits.stride(-1)) != 1:
        return (
            f"logits of shape {list(logits.shape)} and strides {logits.stride()} are not "
            f"[num_tokens, num_experts] with contiguous rows"
        )
    if bias is not None and (bias.dim() != 1 or dim(bias.shape[0]) != dim(logits.shape[1])):
        return f"bias is {list(bias.shape)} for {logits.shape[1]} experts"
    if bias is not None and dim(bias.stride(0)) != 1:
        return f"bias has stride {bias.stride(0)}"
    return apart(logits, bias) or None
