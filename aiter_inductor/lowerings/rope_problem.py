"""What a rotary embedding is asked to rotate, and the ranges its kernels take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import ROW_DTYPES, short_name
from aiter_inductor.core.heads import RANK, heads_axis, leading
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.core.rows import result_is_strided
from aiter_inductor.lowerings.arguments import apart

MAX_HEAD_DIM = 1024


@dataclass(frozen=True)
class RopeProblem:
    """Heads of one tensor, or of q and k together, rotated by tables that the heads share.

    Attributes:
        batch: sequences.
        num_tokens: tokens of a sequence.
        num_heads: heads of q.
        num_kv_heads: heads of k; 0 when there is one tensor.
        head_dim: elements of a head.
        rotary_dim: how many of them are rotated, from the first on.
        table_batch: batch size of cos and sin, 1 when sequences share them.
        table_width: last size of cos and sin, rotary_dim or half of it.
        dtype: dtype of q.
        kv_dtype: dtype of k, that of q when there is one tensor.
        table_dtype: dtype of cos and sin.
        out_dtype: dtype of the results.
        weight_dtype: dtype of the norm weights; None where nothing is normalised.
        interleaved_in: pairs are neighbours in the input.
        interleaved_out: pairs are neighbours in the output.
        transposed: the rotation is undone instead of applied.
        eps: of the norm.
        weight_offset: added to the norm weights.
        round_before_weight: the norm rounds before it multiplies by the weight.
        tokens_before_heads: the tensors are [batch, tokens, heads, head_dim], not [batch, heads,
            tokens, head_dim].
        rank: dimensions of q.
        obstacle: what no kernel takes about these tensors' sizes and strides, or None.
    """

    batch: Dim
    num_tokens: Dim
    num_heads: Dim
    num_kv_heads: Dim
    head_dim: Dim
    rotary_dim: Dim
    table_batch: Dim
    table_width: Dim
    dtype: torch.dtype
    kv_dtype: torch.dtype
    table_dtype: torch.dtype
    out_dtype: torch.dtype
    weight_dtype: torch.dtype | None = None
    interleaved_in: bool = False
    interleaved_out: bool = False
    transposed: bool = False
    eps: float = 1e-6
    weight_offset: float = 0.0
    round_before_weight: bool = False
    tokens_before_heads: bool = False
    rank: int = 4
    obstacle: str | None = None

    @classmethod
    def of_rope(cls, x: Tensor, cos: Tensor, sin: Tensor, **style: Any) -> RopeProblem:
        """The problem of rotating one tensor."""
        return cls._of(x, None, cos, sin, None, style)

    @classmethod
    def of_rope_qk(
        cls, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **style: Any
    ) -> RopeProblem:
        """The problem of rotating q and k by the same tables."""
        return cls._of(q, k, cos, sin, None, style)

    @classmethod
    def of_qk_norm_rope(
        cls,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        **style: Any,
    ) -> RopeProblem:
        """The problem of normalising the heads of q and k and rotating them."""
        problem = cls._of(q, k, cos, sin, q_weight.dtype, style)
        unfit = problem.obstacle or _unfit_weights(q, q_weight, k_weight)
        return replace(problem, eps=eps, obstacle=unfit)

    @classmethod
    def _of(
        cls,
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        weight_dtype: torch.dtype | None,
        style: dict[str, Any],
    ) -> RopeProblem:
        head_dim = dim(q.shape[-1])
        sizes = leading(q)
        heads = heads_axis(q, k, cos)
        tokens = 3 - heads
        rotary_dim = style.get("rotary_dim")
        return cls(
            batch=sizes[0],
            num_tokens=sizes[tokens],
            num_heads=sizes[heads],
            num_kv_heads=0 if k is None else leading(k)[heads],
            head_dim=head_dim,
            rotary_dim=head_dim if rotary_dim is None else rotary_dim,
            table_batch=leading(cos)[0],
            table_width=dim(cos.shape[-1]),
            dtype=q.dtype,
            kv_dtype=q.dtype if k is None else k.dtype,
            table_dtype=cos.dtype,
            out_dtype=style.get("out_dtype") or torch.promote_types(q.dtype, cos.dtype),
            weight_dtype=weight_dtype,
            interleaved_in=style.get("interleaved_in", False),
            interleaved_out=style.get("interleaved_out", False),
            transposed=style.get("transposed", False),
            weight_offset=style.get("weight_offset", 0.0),
            round_before_weight=style.get("round_before_weight", False),
            tokens_before_heads=heads == 2,
            rank=q.dim(),
            obstacle=_obstacle(q, k, cos, sin, heads) or apart(q, k, cos, sin) or None,
        )

    def bytes_moved(self) -> Dim:
        """Every head read and written once, the tables read once."""
        elements = self.batch * self.num_tokens * (self.num_heads + self.num_kv_heads)
        heads = elements * self.head_dim * (self.dtype.itemsize + self.out_dtype.itemsize)
        table = self.table_batch * self.num_tokens * self.table_width * self.table_dtype.itemsize
        return heads + 2 * table

    def flops(self) -> Dim:
        """Two multiplications and an addition for each rotated element."""
        heads = self.batch * self.num_tokens * (self.num_heads + self.num_kv_heads)
        return 3 * heads * self.rotary_dim

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random heads as models hold them, [batch, tokens, heads, head_dim] in memory."""
        generator = torch.Generator(device).manual_seed(seed)

        def heads(count: int) -> Tensor:
            shape = (self.batch, self.num_tokens, count, self.head_dim)
            x = torch.randn(shape, generator=generator, device=device)
            return x if self.tokens_before_heads else x.transpose(1, 2)

        shape = (self.table_batch, self.num_tokens, self.table_width)
        angle = 6.28 * torch.rand(shape, generator=generator, device=device)
        angle = angle.unsqueeze(2 if self.tokens_before_heads else 1)
        tables = (angle.cos().to(self.table_dtype), angle.sin().to(self.table_dtype))
        style: dict[str, Any] = {
            "interleaved_in": self.interleaved_in,
            "interleaved_out": self.interleaved_out,
            "rotary_dim": self.rotary_dim,
            "out_dtype": self.out_dtype,
        }
        tensors = [heads(self.num_heads).to(self.dtype)]
        if self.num_kv_heads:
            tensors.append(heads(self.num_kv_heads).to(self.kv_dtype))
        if self.weight_dtype is None:
            return (*tensors, *tables), {**style, "transposed": self.transposed}
        noise = 0.1 * torch.randn(2, self.head_dim, generator=generator, device=device)
        weights = (1 - self.weight_offset + noise).to(self.weight_dtype).unbind()
        style["weight_offset"] = self.weight_offset
        style["round_before_weight"] = self.round_before_weight
        return (*tensors, *weights, *tables, self.eps), style


def rope_unsupported(problem: RopeProblem, use: Use) -> str | None:
    """What no rotary kernel takes."""
    for name, dtype in (
        ("x", problem.dtype),
        ("cos", problem.table_dtype),
        ("the result", problem.out_dtype),
        ("the norm weight", problem.weight_dtype or problem.dtype),
    ):
        if dtype not in ROW_DTYPES:
            return f"{name} is {short_name(dtype)}; rotary kernels take bfloat16, float16, float32"
    if problem.kv_dtype != problem.dtype:
        q, k = short_name(problem.dtype), short_name(problem.kv_dtype)
        return f"q is {q} but k is {k}; one launch rotates one dtype"
    head_dim = fixed(problem.head_dim)
    if head_dim is None:
        return f"head_dim {problem.head_dim} is not known when compiling"
    if not 0 < head_dim <= MAX_HEAD_DIM:
        return f"head_dim={head_dim} is outside 1 to {MAX_HEAD_DIM}"
    if fixed(problem.rotary_dim) is None or fixed(problem.table_width) is None:
        return f"the rotated width {problem.rotary_dim} is not known when compiling"
    return problem.obstacle


def _obstacle(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, heads: int) -> str | None:
    tokens = 3 - heads
    sizes, table_sizes = leading(q), leading(cos)
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        if x.dim() > RANK:
            return f"{name} has {x.dim()} dimensions; rotary kernels take up to {RANK}"
        if dim(x.stride(-1)) != 1:
            return f"the last stride of {name} is {x.stride(-1)}; rotary kernels read with stride 1"
        if result_is_strided(x):
            return f"heads of {name} overlap; rotary kernels write results whose last stride is 1"
        others = leading(x)
        if (others[0], others[tokens]) != (sizes[0], sizes[tokens]):
            return f"k has sizes {tuple(others)} before head_dim but q has {tuple(sizes)}"
        if dim(x.shape[-1]) != dim(q.shape[-1]):
            return f"head_dim is {q.shape[-1]} in q but {x.shape[-1]} in {name}"
    if unlike := unlike_tables(cos, sin):
        return unlike
    if cos.dim() > RANK:
        return f"cos has {cos.dim()} dimensions; rotary kernels take up to {RANK}"
    if table_sizes[heads] != 1:
        return f"cos has sizes {tuple(table_sizes)} before its width, so heads do not share it"
    for axis in (0, tokens):
        if table_sizes[axis] not in (1, sizes[axis]):
            return f"cos has sizes {tuple(table_sizes)} before its width but q has {tuple(sizes)}"
    return None


def unlike_tables(cos: Tensor, sin: Tensor) -> str | None:
    """Why two tensors are not the tables of one rotation, or None."""
    same = [*map(dim, cos.shape)] == [*map(dim, sin.shape)]
    if same and cos.dtype == sin.dtype:
        return None
    return f"cos is {_brief(cos)} but sin is {_brief(sin)}"


def _unfit_weights(q: Tensor, q_weight: Tensor, k_weight: Tensor) -> str | None:
    if q_weight.dtype != k_weight.dtype:
        return f"q_weight is {_brief(q_weight)} but k_weight is {_brief(k_weight)}"
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.dim() != 1 or dim(weight.shape[0]) != dim(q.shape[-1]):
            return f"{name} is {_brief(weight)} but heads have {q.shape[-1]} elements"
        if weight.stride(0) != 1:
            return f"{name} has stride {weight.stride(0)}; rotary kernels read it with stride 1"
    return None


def _brief(x: Tensor) -> str:
    return f"{short_name(x.dtype)}{list(x.shape)}"
