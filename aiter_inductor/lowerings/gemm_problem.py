"""The problem of a linear layer whose weight, and often its activations, are quantised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import ROW_DTYPES, short_name
from aiter_inductor.core.problem import Dim, dim, is_row_major, product
from aiter_inductor.lowerings.arguments import apart
from aiter_inductor.lowerings.gemm_tiles import in_tiles


@dataclass(frozen=True)
class GemmProblem:
    """`out[M, N] = x[M, K] @ weight[N, K].T`, with scales and an optional bias.

    Attributes:
        M, N, K: all leading dimensions of x together, output and input features.
        dtype: of x.
        weight_dtype: of the weight; uint8 where a byte holds two int4.
        out_dtype: of the result.
        scaling: `block`: x by groups of `group_size` along K and the weight by `block_n` x
            `block_k`; `row`: x by token and the weight by row; `tensor`: one scale each;
            `weight_row`, `weight_block`, `weight_group`: only the weight, by row, by block, by
            groups of `group_size` along K.
        bias_dtype: of the bias; None if there is none.
        group_size, block_n, block_k: as far as `scaling` says; else 0.
        x_contiguous, weight_contiguous: whether the tensor is row-major without gaps.
        scales_contiguous: whether every scale tensor is.
        mismatch: why the tensors do not belong together, or None.
        layout: of the weight: `rows`, or `16x16` tiles.
        has_zero: of int4, whether a code of 0 stands for something else than 0.
        offset_binary: of int4, whether codes are stored with 8 added.
    """

    M: Dim
    N: Dim
    K: Dim
    dtype: torch.dtype
    weight_dtype: torch.dtype
    out_dtype: torch.dtype
    scaling: str
    bias_dtype: torch.dtype | None = None
    group_size: int = 0
    block_n: int = 0
    block_k: int = 0
    x_contiguous: bool = True
    weight_contiguous: bool = True
    scales_contiguous: bool = True
    mismatch: str | None = None
    layout: str = "rows"
    has_zero: bool = False
    offset_binary: bool = False

    @classmethod
    def of(
        cls,
        scaling: str,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor | None,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        out_dtype: torch.dtype | None = None,
        group_size: int = 0,
        block_n: int = 0,
        block_k: int = 0,
        weight_zero: Tensor | None = None,
    ) -> GemmProblem:
        """The problem of one call; `x_scale` is None where only the weight is quantised."""
        scales = [scale for scale in (x_scale, weight_scale, weight_zero) if scale is not None]
        made = cls(
            M=product(x.shape[:-1]),
            N=dim(weight.shape[0]) if weight.dim() else 1,
            K=dim(x.shape[-1]) if x.dim() else 1,
            dtype=x.dtype,
            weight_dtype=weight.dtype,
            out_dtype=out_dtype or x.dtype,
            scaling=scaling,
            bias_dtype=None if bias is None else bias.dtype,
            group_size=group_size,
            block_n=block_n,
            block_k=block_k,
            x_contiguous=is_row_major(x),
            weight_contiguous=is_row_major(weight),
            scales_contiguous=all(map(is_row_major, scales)),
            has_zero=weight_zero is not None,
        )
        reason = _mismatch(made, x, weight, x_scale, weight_scale, bias, weight_zero)
        return replace(made, mismatch=reason)

    def x_scale_shape(self, leading: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
        """The shape of x's scale for these leading sizes; None where x is not quantised."""
        if self.scaling == "block":
            return (*leading, ceil_div(self.K, self.group_size))
        return {"row": (*leading, 1), "tensor": ()}.get(self.scaling)

    def weight_scale_shape(self) -> tuple[Dim, ...]:
        """The shape of the weight's scale."""
        if self.scaling in ("block", "weight_block"):
            return (ceil_div(self.N, self.block_n), ceil_div(self.K, self.block_k))
        if self.scaling == "weight_group":
            return (self.N, ceil_div(self.K, self.group_size))
        return () if self.scaling == "tensor" else (self.N,)

    def bytes_moved(self) -> Dim:
        """x, weight, scales and bias read once, the result written once."""
        weights = self.N * self.K * self.weight_dtype.itemsize
        if self.scaling == "weight_group":
            weights = weights // 2
        of_x = self.x_scale_shape((self.M,))
        scales = math.prod(self.weight_scale_shape()) * (2 if self.has_zero else 1)
        scales += 0 if of_x is None else math.prod(of_x)
        bias = self.N * self.bias_dtype.itemsize if self.bias_dtype else 0
        rows = self.M * (self.K * self.dtype.itemsize + self.N * self.out_dtype.itemsize)
        return rows + weights + 4 * scales + bias

    def flops(self) -> Dim:
        """A multiplication and an addition for each of M·N·K."""
        return 2 * self.M * self.N * self.K

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Values that fill their dtype's range, scales that give a result of about one."""
        generator = torch.Generator(device).manual_seed(seed)

        def uniform(shape: tuple[Dim, ...]) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        def values(shape: tuple[Dim, ...], dtype: torch.dtype) -> Tensor:
            if dtype.is_floating_point:
                return torch.randn(shape, generator=generator, device=device).to(dtype)
            low, high = (0, 256) if dtype == torch.uint8 else (-127, 128)
            made = torch.randint(low, high, shape, generator=generator, device=device)
            return made.to(dtype)

        packed = self.scaling == "weight_group"
        x = values((self.M, self.K), self.dtype)
        weight = values((self.N, self.K // 2 if packed else self.K), self.weight_dtype)
        weight = in_tiles(weight) if self.layout == "16x16" else weight
        steps = 4 if packed else 1 if self.weight_dtype.is_floating_point else 73
        unit = 1 / (steps * max(1, self.K) ** 0.5)
        weight_scale = unit * (0.5 + uniform(self.weight_scale_shape()))
        bias = None if self.bias_dtype is None else values((self.N,), self.bias_dtype)
        x_shape = self.x_scale_shape((self.M,))
        if packed:
            zero = unit * uniform(self.weight_scale_shape()) if self.has_zero else None
            return (x, weight, weight_scale, bias, zero), self._keywords()
        if x_shape is None:
            return (x, weight, weight_scale, bias), self._keywords()
        x_scale = (0.5 + uniform(x_shape)) / (1 if self.dtype.is_floating_point else 73)
        return (x, weight, x_scale, weight_scale, bias), self._keywords()

    def _keywords(self) -> dict[str, Any]:
        blocks = {"block_n": self.block_n, "block_k": self.block_k}
        if self.scaling == "weight_group":
            return {"group_size": self.group_size, "offset_binary": self.offset_binary}
        if self.scaling.startswith("weight"):
            return blocks if self.scaling == "weight_block" else {}
        if self.scaling == "block":
            return {"group_size": self.group_size, **blocks, "out_dtype": self.out_dtype}
        return {"out_dtype": self.out_dtype}


def ceil_div(size: Dim, by: int) -> Dim:
    """How many blocks of `by` cover `size`."""
    return -(-size // by)


def _mismatch(
    made: GemmProblem,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_zero: Tensor | None,
) -> str | None:
    if x.dim() == 0 or weight.dim() != 2:
        return f"x is {_shape(x)} and weight {_shape(weight)}; they must be [*, K] and [N, K]"
    held = dim(weight.shape[1]) * (2 if made.scaling == "weight_group" else 1)
    if held != made.K:
        return f"x has {made.K} elements a row and weight {held}"
    if bias is not None and tuple(map(dim, bias.shape)) != (made.N,):
        return f"bias is {_shape(bias)} but the result has {made.N} columns"
    wanted = made.weight_scale_shape()
    if not _fits(weight_scale, wanted, loose=made.scaling in ("row", "tensor")):
        return f"weight_scale is {_shape(weight_scale)}, weight wants {list(wanted)}"
    if x_scale is not None:
        wanted = made.x_scale_shape(tuple(map(dim, x.shape[:-1]))) or ()
        if not _fits(x_scale, wanted, loose=made.scaling == "tensor"):
            return f"x_scale is {_shape(x_scale)}, x wants {list(wanted)}"
    if weight_zero is not None and not _fits(weight_zero, made.weight_scale_shape(), loose=False):
        return f"weight_zero is {_shape(weight_zero)}, not as weight_scale {_shape(weight_scale)}"
    named = {"x_scale": x_scale, "weight_scale": weight_scale, "weight_zero": weight_zero}
    wrong = _wrong_scales(named, made.scaling)
    return wrong or apart(x, weight, bias, *named.values()) or None


def _wrong_scales(named: Mapping[str, Tensor | None], scaling: str) -> str | None:
    """float32, but of int4 any float dtype: there the formats that others store keep x's."""
    allowed = (*ROW_DTYPES, torch.float64) if scaling == "weight_group" else (torch.float32,)
    for name, scale in named.items():
        if scale is not None and scale.dtype not in allowed:
            return f"{name} is {short_name(scale.dtype)}, not float32"
    return None


def _fits(scale: Tensor, wanted: tuple[Dim, ...], *, loose: bool) -> bool:
    """Whether a scale has this shape; loosely, dimensions of one may come or go."""
    found = tuple(map(dim, scale.shape))
    if not loose:
        return found == wanted
    return [n for n in found if n != 1] == [n for n in wanted if n != 1]


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(str(dim(s)) for s in x.shape) + "]"
