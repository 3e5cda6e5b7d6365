"""What a gated activation is asked to compute, and the ranges its kernels take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import QUANT_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.rows import RowProblem, rows_unsupported, with_one_scale

MAX_TOKEN_N = 32768
MAX_REACH = 2**31 - 1


@dataclass(frozen=True)
class ActivationProblem(RowProblem):
    """Rows of a gate and of what it multiplies.

    Attributes:
        activation: `silu`, `gelu`, `gelu_tanh` or `swiglu`.
        alpha: of swiglu.
        limit: of swiglu.
        amax_min: lower bound of the largest magnitude that a quantisation sees.
        last_strides: last strides of gate and up; 2 where they are interleaved in one tensor.
    """

    activation: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0
    amax_min: float = 0.0
    last_strides: tuple[Dim, Dim] = (1, 1)

    @classmethod
    def of_act_and_mul(cls, gate: Tensor, up: Tensor, **style: Any) -> ActivationProblem:
        """The activation alone."""
        return cls._of("gate up", (gate, up), style)

    @classmethod
    def of_act_and_mul_backward(
        cls, grad: Tensor, gate: Tensor, up: Tensor, **style: Any
    ) -> ActivationProblem:
        """Its gradients."""
        return cls._of("grad gate up", (gate, up, grad), style)

    @classmethod
    def of_act_and_mul_quant(
        cls, gate: Tensor, up: Tensor, *, dtype: torch.dtype, **style: Any
    ) -> ActivationProblem:
        """The activation and a quantisation with scales of its own."""
        return cls._of("gate up", (gate, up), style, dtype)

    @classmethod
    def of_act_and_mul_quant_static(
        cls, gate: Tensor, up: Tensor, scale: Tensor, *, dtype: torch.dtype, **style: Any
    ) -> ActivationProblem:
        """The activation and a quantisation whose scale is given."""
        made = cls._of("gate up scale", (gate, up), style, dtype)
        return with_one_scale(made, scale, gate)

    @classmethod
    def _of(
        cls,
        arguments: str,
        rows: tuple[Tensor, ...],
        style: dict[str, Any],
        dtype: torch.dtype | None = None,
    ) -> ActivationProblem:
        dynamic = dtype is not None and "scale" not in arguments
        base = RowProblem.of(
            arguments,
            rows,
            out_dtype=dtype,
            group_size=style.get("group_size"),
            scales=dynamic,
        )
        known = ("activation", "alpha", "limit", "amax_min")
        gate, up = rows[:2]
        return cls(
            **vars(base),
            **{name: style[name] for name in known if name in style},
            last_strides=(dim(gate.stride(-1)), dim(up.stride(-1))) if gate.dim() else (1, 1),
        )

    def bytes_moved(self) -> Dim:
        """Gate, up and a gradient read once, the results and their scales written once."""
        a_row = self.N * (2 * self.dtype.itemsize + self.out_dtype.itemsize)
        if "grad" in self.arguments:
            a_row = a_row + 2 * self.N * self.dtype.itemsize
        elif self.out_dtype in QUANT_DTYPES and "scale" not in self.arguments:
            a_row = a_row + 4 * (self.N // (self.group_size or self.N))
        return self.num_rows * a_row

    def flops(self) -> Dim:
        """About eight an element: an exponential, a division and what surrounds them."""
        return 8 * self.num_rows * self.N

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random rows, halves of one tensor or interleaved in it where the problem's are."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(width: int) -> Tensor:
            shape = (self.num_rows, width)
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        if self.last_strides == (2, 2):
            both = normal(2 * self.N)
            gate, up = both[:, ::2], both[:, 1::2]
        else:
            gate, up = normal(self.N), normal(self.N).to(self.residual_dtype or self.dtype)
        made = {"gate": gate, "up": up, "scale": torch.full((1,), 0.01, device=device)}
        if "grad" in self.arguments:
            made["grad"] = normal(self.N)
        style = {"activation": self.activation, "alpha": self.alpha, "limit": self.limit}
        return tuple(made[name] for name in self.arguments.split()), {**style, **self._quant()}

    def _quant(self) -> dict[str, Any]:
        if self.out_dtype not in QUANT_DTYPES:
            return {}
        if "scale" in self.arguments:
            return {"dtype": self.out_dtype}
        return {
            "dtype": self.out_dtype,
            "group_size": self.group_size,
            "amax_min": self.amax_min,
        }


def activation_unsupported(problem: ActivationProblem, use: Use) -> str | None:
    """What no gated activation kernel takes; a strided last dimension they do take."""
    if problem.residual_dtype != problem.dtype:
        gate, up = short_name(problem.dtype), short_name(problem.residual_dtype or problem.dtype)
        return f"gate is {gate} but up is {up}; kernels compute with one dtype"
    reach = problem.N * max(filter(None, map(fixed, problem.last_strides)), default=1)
    if (fixed(reach) or 0) > MAX_REACH:
        return f"a row reaches over {reach} elements; kernels count up to {MAX_REACH}"
    return rows_unsupported(replace(problem, row_contiguous=True), use)


def hip_activation_unsupported(problem: ActivationProblem, use: Use) -> str | None:
    """What the HIP kernel does not take, quantising or not."""
    if problem.last_strides not in ((1, 1), (2, 2)):
        shown = " and ".join(map(str, problem.last_strides))
        return f"gate and up have last strides {shown}; the kernel reads 1, or 2 in turns"
    if problem.out_dtype in QUANT_DTYPES:
        return quantised_activation_unsupported(problem, use)
    return activation_unsupported(problem, use)


def quantised_activation_unsupported(problem: ActivationProblem, use: Use) -> str | None:
    """What no quantising gated activation kernel takes."""
    if reason := activation_unsupported(problem, use):
        return reason
    one_scale_a_row = problem.group_size is None and "scale" not in problem.arguments
    if one_scale_a_row and problem.N > MAX_TOKEN_N:
        return f"N={problem.N} is above {MAX_TOKEN_N}, the most whose scale one workgroup finds"
    return None
