"""Quantisation as programs write it, for the tests of its recognisers."""

from __future__ import annotations

import torch

FN, FNUZ, INT8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8
N, G = 256, 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def limit(qdtype):
    return 127.0 if qdtype == INT8 else torch.finfo(qdtype).max


def as_q(y, qdtype):
    """The usual end: round for int8, clamp to the symmetric range, cast."""
    top = limit(qdtype)
    return (y.round() if qdtype == INT8 else y).clamp(-top, top).to(qdtype)


def amax_kept(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x.float() / scale, qdtype), scale


def amax_before_upcast(x, qdtype):
    scale = x.abs().amax(dim=-1, keepdim=True).to(torch.float32) / limit(qdtype)
    return as_q(x / scale, qdtype), scale


def max_values(x, qdtype):
    scale = x.abs().max(dim=-1, keepdim=True).values.float() / limit(qdtype)
    return as_q(x * (1.0 / scale), qdtype), scale


def max_first(x, qdtype):
    scale = torch.max(x.float().abs(), -1, True)[0] * (1.0 / limit(qdtype))
    return as_q(x * scale.reciprocal(), qdtype), scale


def max_squeezed(x, qdtype):
    scale = x.float().abs().max(-1)[0].div(limit(qdtype))
    return as_q(x.float() / scale.unsqueeze(-1), qdtype), scale


def max_indexed(x, qdtype):
    scale = torch.amax(torch.abs(x.float()), dim=-1) / limit(qdtype)
    return as_q(x.float() / scale[..., None], qdtype), scale


def squeezed_for_return(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x / scale, qdtype), scale.squeeze(-1)


def two_ends(x, qdtype):
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = torch.maximum(low.abs(), high.abs()).float() / limit(qdtype)
    return as_q(x / scale, qdtype), scale


def two_reductions(x, qdtype):
    amax = torch.max(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float()
    return as_q(x * (limit(qdtype) / amax), qdtype), amax / limit(qdtype)


def vector_norm(x, qdtype):
    amax = torch.linalg.vector_norm(x.float(), ord=float("inf"), dim=-1, keepdim=True)
    return as_q(x.float() / (amax / limit(qdtype)), qdtype), amax / limit(qdtype)


def norm_method(x, qdtype):
    scale = x.float().norm(p=float("inf"), dim=-1, keepdim=True) / limit(qdtype)
    return as_q(x.float() / scale, qdtype), scale


def inverse_returned(x, qdtype):
    inverse = limit(qdtype) / x.abs().amax(-1, keepdim=True).float()
    return as_q(x.float() * inverse, qdtype), inverse


def both_returned(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    inverse = 1 / scale
    return as_q(x * inverse, qdtype), scale, inverse


def nothing_returned(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x / scale, qdtype)


def clamp_in_two(x, qdtype):
    top, scale = limit(qdtype), x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    y = x / scale if qdtype != INT8 else torch.round(x / scale)
    return y.clamp_min(-top).clamp_max(max=top).to(qdtype), scale


def no_clamp(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return (x / scale).to(qdtype) if qdtype != INT8 else (x / scale).round().to(qdtype), scale


def clamped_to_all_of_int8(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    low = -128 if qdtype == INT8 else -limit(qdtype)
    y = torch.clamp(x / scale, min=low, max=limit(qdtype))
    return (y.round() if qdtype == INT8 else y).to(dtype=qdtype), scale


def amax_bounded(x, qdtype):
    amax = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-4)
    return as_q(x * (limit(qdtype) / amax), qdtype), amax / limit(qdtype)


def amax_bounded_by_maximum(x, qdtype):
    amax = torch.maximum(x.float().abs().amax(-1, keepdim=True), torch.tensor(1e-4))
    return as_q(x / (amax / limit(qdtype)), qdtype), amax / limit(qdtype)


def scale_bounded(x, qdtype):
    scale = (x.float().abs().amax(-1, keepdim=True) / limit(qdtype)).clamp_min(1e-6)
    return as_q(x / scale, qdtype), scale


def inverse_bounded(x, qdtype):
    inverse = (limit(qdtype) / x.float().abs().amax(-1, keepdim=True)).clamp(max=1e6)
    return as_q(x * inverse, qdtype), inverse.reciprocal()


def dequantised_again(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x / scale, qdtype).to(torch.float32) * scale


def spread_out(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x / scale.expand_as(x), qdtype), scale


PER_TOKEN = {
    f.__name__: f
    for f in (
        amax_kept, amax_before_upcast, max_values, max_first, max_squeezed, max_indexed,
        squeezed_for_return, two_ends, two_reductions, vector_norm, norm_method, inverse_returned,
        both_returned, nothing_returned, clamp_in_two, no_clamp, clamped_to_all_of_int8,
        amax_bounded, amax_bounded_by_maximum, scale_bounded, inverse_bounded, dequantised_again,
        spread_out,
    )
}  # fmt: skip


def grouped_view(x, qdtype):
    groups = x.float().view(*x.shape[:-1], x.shape[-1] // G, G)
    scale = groups.abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(groups / scale, qdtype).view(x.shape), scale.squeeze(-1)


def grouped_unflatten(x, qdtype):
    groups = x.unflatten(-1, (-1, G))
    scale = groups.abs().amax(-1).float() / limit(qdtype)
    return as_q(groups / scale.unsqueeze(-1), qdtype).flatten(-2), scale


def grouped_flat(x, qdtype):
    groups = x.reshape(-1, G)
    amax = groups.abs().max(dim=-1, keepdim=True)[0].float().clamp(min=1e-10)
    scale = amax / limit(qdtype)
    q = as_q(groups / scale, qdtype).reshape(x.shape)
    return q, scale.reshape(*x.shape[:-1], x.shape[-1] // G)


def grouped_left_in_groups(x, qdtype):
    groups = x.view(-1, x.shape[-1] // G, G)
    scale = groups.abs().float().amax(dim=2) / limit(qdtype)
    return as_q(groups * (1.0 / scale[:, :, None]), qdtype), scale


def deepseek(x, qdtype):
    rows = x.reshape(-1, x.shape[-1])
    groups = rows.view(rows.shape[0], -1, G)
    amax = groups.abs().float().amax(dim=2).view(rows.shape[0], -1).clamp(1e-4)
    q = groups * (limit(qdtype) / amax.unsqueeze(2))
    q = (q.round() if qdtype == INT8 else q).to(qdtype).view(rows.shape)
    return q, (amax / limit(qdtype)).view(rows.shape[0], -1)


def grouped_repeated(x, qdtype):
    scale = x.float().unflatten(-1, (-1, G)).abs().amax(-1) / limit(qdtype)
    return as_q(x / scale.repeat_interleave(G, dim=-1), qdtype), scale


def grouped_scale_bounded(x, qdtype):
    groups = x.float().unflatten(-1, (x.shape[-1] // G, G))
    scale = torch.clamp(groups.abs().amax(-1, keepdim=True) / limit(qdtype), min=1e-6)
    return as_q(groups / scale, qdtype).reshape(x.shape), scale


PER_GROUP = {
    f.__name__: f
    for f in (
        grouped_view, grouped_unflatten, grouped_flat, grouped_left_in_groups, deepseek,
        grouped_repeated, grouped_scale_bounded,
    )
}  # fmt: skip


def whole_max(x, qdtype):
    scale = x.abs().max().float() / limit(qdtype)
    return as_q(x.float() / scale, qdtype), scale


def whole_amax(x, qdtype):
    scale = (x.float().abs().amax() / limit(qdtype)).clamp(min=1e-9)
    return as_q(x.float() / scale, qdtype), scale


def whole_vector(x, qdtype):
    amax = x.flatten().abs().max().float()
    return as_q(x.float() * (limit(qdtype) / amax), qdtype), (amax / limit(qdtype)).reshape(1)


def whole_ends(x, qdtype):
    low, high = x.float().aminmax()
    scale = torch.max(high, -low) / limit(qdtype)
    return as_q(x.float() * scale.reciprocal(), qdtype), scale.view(1)


def whole_with_dims(x, qdtype):
    scale = x.float().abs().amax((0, 1, 2), keepdim=True) / limit(qdtype)
    return as_q(x / scale, qdtype), scale


PER_TENSOR = {
    f.__name__: f for f in (whole_max, whole_amax, whole_vector, whole_ends, whole_with_dims)
}


def given_scalar(x, scale, qdtype):
    return as_q(x.float() / scale, qdtype)


def given_inverse(x, scale, qdtype):
    return as_q(x.float() * (1.0 / scale), qdtype)


def given_reciprocal(x, scale, qdtype):
    return as_q(scale.reciprocal() * x.float(), qdtype)


def given_quantising(x, scale, qdtype):
    return as_q(x.to(torch.float32) * scale, qdtype)


def given_to_all_of_int8(x, scale, qdtype):
    low = -128 if qdtype == INT8 else -limit(qdtype)
    y = torch.clamp(x.float() / scale, low, limit(qdtype))
    return (y.round() if qdtype == INT8 else y).to(qdtype)


STATIC = {
    f.__name__: f
    for f in (given_to_all_of_int8, given_scalar, given_inverse, given_reciprocal, given_quantising)
}


class Program(torch.nn.Module):
    """A spelling whose row length is known under `dynamic=True` too."""

    def __init__(self, spelling, qdtype, dtype, *args):
        super().__init__()
        self.spelling, self.qdtype, self.args = spelling, qdtype, args
        self.shift = torch.nn.Parameter(torch.zeros(N, dtype=dtype))

    def forward(self, x):
        return self.spelling(x + self.shift, *self.args, self.qdtype)


def rows(dtype, mode="static", *, lead=(2, 5)):
    x = torch.randn(*lead, N).to(dtype)
    if mode == "mark_dynamic":
        torch._dynamo.mark_dynamic(x, 1)
    return x
