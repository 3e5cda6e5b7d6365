"""Rotary position embeddings in every layout that models use, alone and behind a head norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.measured import (
    cede_rotation,
    decline_rotation,
    decline_rotation_in_hip,
)
from aiter_inductor.lowerings.norm import rms_norm
from aiter_inductor.lowerings.providers import add_hip, add_triton
from aiter_inductor.lowerings.rope_problem import RopeProblem, rope_unsupported


@op(problem=RopeProblem.of_rope)
def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate each pair of elements of a head by its token's angle, in fp32, rounding once.

    Pair i is elements `2i, 2i+1` where a layout is interleaved, `i, i + rotary_dim/2` where not.
    The result keeps the stride order of `x` where models add `x * cos + rotate_half(x) * sin` or
    multiply complex numbers: input and output layouts equal, the whole head rotated, and either
    full-width tables or interleaved pairs. Elsewhere models concatenate: it is contiguous.

    Args:
        x: [*, D], any float dtype.
        cos: broadcastable to [*, rotary_dim] (in the order of the output, of the input when
            `transposed`) or to [*, rotary_dim / 2] (one angle a pair).
        sin: like `cos`.
        interleaved_in: layout of the pairs in `x`.
        interleaved_out: layout of the pairs in the result.
        rotary_dim: leading elements that are rotated, the others pass through; None means D.
        transposed: multiply by the transposed rotation, which is the gradient.
        out_dtype: dtype of the result; None promotes those of `x` and `cos`.

    Returns:
        [*, D].

    Raises:
        ValueError: when `rotary_dim` is odd or more than D, or `cos` is neither as wide as it nor
            half as wide.
    """
    D = x.shape[-1]
    rotary_dim = D if rotary_dim is None else rotary_dim
    _check_widths(D, rotary_dim, cos, sin)
    acc = accumulate_dtype(torch.promote_types(x.dtype, cos.dtype))
    out = out_dtype or torch.promote_types(x.dtype, cos.dtype)
    f, c, s = x[..., :rotary_dim].to(acc), cos.to(acc), sin.to(acc)
    half_width = cos.shape[-1] != rotary_dim
    if interleaved_in == interleaved_out and (interleaved_in or not half_width):
        if half_width:
            c, s = _join(c, c, interleaved_in), _join(s, s, interleaved_in)
        rotated = _rotate_in_place_of_pairs(f, c, s, interleaved_in, transposed)
    else:
        table_interleaved = interleaved_in if transposed else interleaved_out
        c1, c2 = (c, c) if half_width else _pairs(c, table_interleaved)
        s1, s2 = (s, s) if half_width else _pairs(s, table_interleaved)
        if transposed:
            s1, s2 = -s2, -s1
        a, b = _pairs(f, interleaved_in)
        rotated = _join(a * c1 - b * s1, b * c2 + a * s2, interleaved_out)
    if rotary_dim == D:
        return rotated.to(out)
    return torch.cat((rotated.to(out), x[..., rotary_dim:].to(out)), dim=-1)


def _rotate_in_place_of_pairs(
    f: Tensor, c: Tensor, s: Tensor, interleaved: bool, transposed: bool
) -> Tensor:
    """The rotation as a sum of products of whole heads, which keeps the strides of `f`."""
    if transposed:
        a, b = _pairs(f * s, interleaved)
        return f * c + _join(b, -a, interleaved)
    a, b = _pairs(f, interleaved)
    return f * c + _join(-b, a, interleaved) * s


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _join(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)


def _check_widths(D: int, rotary_dim: int, cos: Tensor, sin: Tensor) -> None:
    if rotary_dim % 2 or not 0 <= rotary_dim <= D:
        raise ValueError(f"rotary_dim={rotary_dim} is not an even number up to head_dim={D}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape[-1] not in (rotary_dim, rotary_dim // 2):
            raise ValueError(
                f"{name} is {table.shape[-1]} wide, neither rotary_dim={rotary_dim} nor half of it"
            )


@rope.backward("cos", "sin")
def _(saved: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    return {"x": rope(grad, saved["cos"], saved["sin"], **_inverse(saved, grad))}


@op(problem=RopeProblem.of_rope_qk)
def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate the heads of `q` and of `k` by the same angles; see `rope` for the arguments.

    Args:
        q: [*, D]; [batch, num_heads, num_tokens, D] or [batch, num_tokens, num_heads, D] where
            kernels are to take it.
        k: [*, D], with heads of its own number.

    Returns:
        q and k rotated, each as `rope` returns it.
    """
    return (
        rope.reference(
            q,
            cos,
            sin,
            interleaved_in=interleaved_in,
            interleaved_out=interleaved_out,
            rotary_dim=rotary_dim,
            transposed=transposed,
            out_dtype=out_dtype,
        ),
        rope.reference(
            k,
            cos,
            sin,
            interleaved_in=interleaved_in,
            interleaved_out=interleaved_out,
            rotary_dim=rotary_dim,
            transposed=transposed,
            out_dtype=out_dtype,
        ),
    )


@rope_qk.backward("cos", "sin")
def _(
    saved: dict[str, Any], grad_q: Tensor | None, grad_k: Tensor | None
) -> dict[str, Tensor | None]:
    tables = saved["cos"], saved["sin"]
    if grad_q is not None and grad_k is not None and grad_q.dtype == grad_k.dtype:
        dq, dk = rope_qk(grad_q, grad_k, *tables, **_inverse(saved, grad_q))
        return {"q": dq, "k": dk}
    return {
        name: None if grad is None else rope(grad, *tables, **_inverse(saved, grad))
        for name, grad in (("q", grad_q), ("k", grad_k))
    }


def _inverse(saved: dict[str, Any], grad: Tensor) -> dict[str, Any]:
    """The style of the call that undoes a call.

    Its result has the gradient's own dtype: promotion by fp32 tables would add a cast.
    """
    return {
        "interleaved_in": saved["interleaved_out"],
        "interleaved_out": saved["interleaved_in"],
        "rotary_dim": saved["rotary_dim"],
        "transposed": not saved["transposed"],
        "out_dtype": grad.dtype,
    }


@op(problem=RopeProblem.of_qk_norm_rope)
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS-normalise each head of `q` and `k`, rounding to their dtype, then rotate it.

    Args:
        q: [batch, num_heads, num_tokens, D] or [batch, num_tokens, num_heads, D].
        k: the same with num_kv_heads.
        q_weight: [D].
        k_weight: [D].
        cos, sin, interleaved_in, interleaved_out, rotary_dim, out_dtype: as in `rope`.
        eps, weight_offset, round_before_weight: as in `rms_norm`.

    Returns:
        q and k, each as `rope` returns it.
    """
    q, k = (
        rms_norm.reference(
            x, weight, eps, weight_offset=weight_offset, round_before_weight=round_before_weight
        )
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    rotated: tuple[Tensor, Tensor] = rope_qk.reference(
        q,
        k,
        cos,
        sin,
        interleaved_in=interleaved_in,
        interleaved_out=interleaved_out,
        rotary_dim=rotary_dim,
        out_dtype=out_dtype,
    )
    return rotated


for made in (rope, rope_qk):
    add_triton(made, "rope", refuse=rope_unsupported, decline=decline_rotation, cede=cede_rotation)
    add_hip(made, "rope", refuse=rope_unsupported, decline=decline_rotation_in_hip)
add_triton(qk_norm_rope, "rope", refuse=rope_unsupported, cede=cede_rotation)
add_hip(qk_norm_rope, "rope", refuse=rope_unsupported)
