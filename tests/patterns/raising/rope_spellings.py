"""Rotary embeddings as programs write them: one function of `(x, cos, sin)` a spelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HEADS, TOKENS, D = 2, 5, 16


@dataclass(frozen=True)
class Spelling:
    """A program that rotates heads.

    Attributes:
        rotate: of x [batch, heads, tokens, D] and tables that broadcast to it.
        width: last size of the tables it takes.
        kwargs: arguments of the op that should be found, dtypes left out.
        joined: its result is contiguous whatever x's strides are.
    """

    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    width: int = D
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    joined: bool = False


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def _rotate_half(x: Tensor) -> Tensor:
    a, b = _halves(x)
    return torch.cat((-b, a), dim=-1)


def _rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def neox(x, cos, sin):
    return (x * cos) + (_rotate_half(x) * sin)


def neox_commuted(x, cos, sin):
    return sin * _rotate_half(x) + cos * x


def neox_chunk(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([b.neg(), a], -1) * sin


def neox_split(x, cos, sin):
    a, b = torch.split(x, x.shape[-1] // 2, dim=-1)
    return x * cos + torch.cat([b * -1, a], axis=-1) * sin


def neox_split_sizes(x, cos, sin):
    a, b = x.split([D // 2, D // 2], -1)
    return torch.add(torch.mul(x, cos), torch.mul(torch.cat((-b, a), 3), sin))


def neox_narrow(x, cos, sin):
    a, b = x.narrow(-1, 0, D // 2), torch.narrow(x, 3, D // 2, D // 2)
    return x.mul(cos).add(torch.concat((-b, a), -1).mul(sin))


def neox_unbound(x, cos, sin):
    a, b = x.unflatten(-1, (2, D // 2)).unbind(-2)
    return x * cos + torch.cat((-b, a), -1) * sin


def neox_stacked(x, cos, sin):
    a, b = _halves(x)
    return x * cos + torch.stack((-b, a), dim=-2).flatten(-2) * sin


def neox_subtracted(x, cos, sin):
    a, b = _halves(x)
    return x * cos - torch.cat((b, -a), -1) * sin


def neox_turned_back(x, cos, sin):
    a, b = _halves(x)
    return x * cos + torch.cat((b, -a), -1) * sin


def neox_in_fp32(x, cos, sin):
    f = x.float()
    return (f * cos.float() + _rotate_half(f) * sin.float()).to(x.dtype)


def neox_as_x(x, cos, sin):
    return neox(x.to(torch.float32), cos, sin).type_as(x)


def partial(x, cos, sin):
    R = cos.shape[-1]
    rotated, passed = x[..., :R], x[..., R:]
    return torch.cat((neox(rotated, cos, sin), passed), dim=-1)


def partial_by_halves(x, cos, sin):
    rotated, passed = x.split([D // 2, D // 2], -1)
    a, b = rotated.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, passed), -1)


def partial_every_two(x, cos, sin):
    R = cos.shape[-1]
    rotated = x[..., :R] * cos + _rotate_every_two(x[..., :R]) * sin
    return torch.cat([rotated, x[..., R:]], -1)


def halves(x, cos, sin):
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def halves_commuted(x, cos, sin):
    a, b = x.split(D // 2, dim=-1)
    return torch.cat([cos * a - sin * b, sin * a + cos * b], dim=-1)


def halves_turned_back(x, cos, sin):
    a, b = _halves(x)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def halves_in_fp32(x, cos, sin):
    a, b = torch.chunk(x.float(), 2, dim=-1)
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)), dim=-1)


def even_odd_to_halves(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def even_odd_transposed(x, cos, sin):
    b, h, s, d = x.shape
    x = x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
    return x * cos + _rotate_half(x) * sin


def even_odd_permuted(x, cos, sin):
    x = x.unflatten(-1, (-1, 2)).permute(0, 1, 2, 4, 3).flatten(-2)
    return x * cos + _rotate_half(x) * sin


def halves_to_even_odd(x, cos, sin):
    a, b = _halves(x)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def every_two(x, cos, sin):
    return x * cos + _rotate_every_two(x) * sin


def every_two_repeated(x, cos, sin):
    cos, sin = (t[..., : D // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
    return x * cos + _rotate_every_two(x) * sin


def every_two_of_half(x, cos, sin):
    cos, sin = torch.repeat_interleave(cos, 2, 3), torch.repeat_interleave(sin, 2, -1)
    return every_two(x, cos, sin)


def every_two_unbound(x, cos, sin):
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos + torch.stack((-b, a), -1).reshape(x.shape) * sin


def pairs_in_fp32(x, cos, sin):
    f = x.float().reshape(*x.shape[:-1], -1, 2)
    a, b = f[..., 0], f[..., 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).type_as(x)


def as_complex(x, cos, sin):
    f = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(f * torch.complex(cos, sin)).flatten(3).type_as(x)


def as_complex_commuted(x, cos, sin):
    f = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(torch.complex(cos, sin) * f).reshape(x.shape).to(x.dtype)


BOTH = {"interleaved_in": True, "interleaved_out": True}
HALF = D // 2

SPELLINGS: Mapping[str, Spelling] = {
    "neox": Spelling(neox),
    "neox_commuted": Spelling(neox_commuted),
    "neox_chunk": Spelling(neox_chunk),
    "neox_split": Spelling(neox_split),
    "neox_split_sizes": Spelling(neox_split_sizes),
    "neox_narrow": Spelling(neox_narrow),
    "neox_unbound": Spelling(neox_unbound),
    "neox_stacked": Spelling(neox_stacked),
    "neox_subtracted": Spelling(neox_subtracted),
    "neox_turned_back": Spelling(neox_turned_back),
    "neox_in_fp32": Spelling(neox_in_fp32),
    "neox_as_x": Spelling(neox_as_x),
    "partial": Spelling(partial, 8, {"rotary_dim": 8}, joined=True),
    "partial_by_halves": Spelling(partial_by_halves, 4, {"rotary_dim": 8}, joined=True),
    "partial_every_two": Spelling(partial_every_two, 8, {"rotary_dim": 8, **BOTH}, joined=True),
    "halves": Spelling(halves, HALF, joined=True),
    "halves_commuted": Spelling(halves_commuted, HALF, joined=True),
    "halves_turned_back": Spelling(halves_turned_back, HALF, joined=True),
    "halves_in_fp32": Spelling(halves_in_fp32, HALF, joined=True),
    "even_odd_to_halves": Spelling(even_odd_to_halves, HALF, {"interleaved_in": True}, joined=True),
    "even_odd_transposed": Spelling(even_odd_transposed, D, {"interleaved_in": True}, joined=True),
    "even_odd_permuted": Spelling(even_odd_permuted, D, {"interleaved_in": True}, joined=True),
    "halves_to_even_odd": Spelling(
        halves_to_even_odd, HALF, {"interleaved_out": True}, joined=True
    ),
    "every_two": Spelling(every_two, D, BOTH),
    "every_two_repeated": Spelling(every_two_repeated, D, BOTH),
    "every_two_of_half": Spelling(every_two_of_half, HALF, BOTH),
    "every_two_unbound": Spelling(every_two_unbound, D, BOTH),
    "pairs_in_fp32": Spelling(pairs_in_fp32, HALF, BOTH, joined=True),
    "as_complex": Spelling(as_complex, HALF, BOTH),
    "as_complex_commuted": Spelling(as_complex_commuted, HALF, BOTH),
}
