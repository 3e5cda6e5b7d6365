"""Linear layers on quantised operands as people write them in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

FN, INT8 = torch.float8_e4m3fn, torch.int8
LIMIT = {FN: 448.0, INT8: 127.0}


def quantise(x, scale, qdtype=FN):
    y = x / scale
    if qdtype == INT8:
        y = y.round()
    return y.clamp(-LIMIT[qdtype], LIMIT[qdtype]).to(qdtype)


def groups_quantised(x, size=128):
    """`(q [*, K], scale [*, K / size])`."""
    groups = x.float().unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 448.0
    return quantise(groups, scale).flatten(-2), scale.squeeze(-1)


def tokens_quantised(x, qdtype=FN):
    """`(q [*, K], scale [*, 1])`."""
    f = x.float()
    scale = f.abs().amax(-1, keepdim=True).clamp(min=1e-6) / LIMIT[qdtype]
    return quantise(f, scale, qdtype), scale


# Weights: (q [N, K], scale [ceil(N/128), ceil(K/128)]) -> [N, K] float.


def interleaved(w, s):
    return w.float() * s.repeat_interleave(128, 0).repeat_interleave(128, 1)


def interleaved_cut(w, s):
    spread = s.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return w.to(torch.float32) * spread[: w.shape[0], : w.shape[1]]


def viewed(w, s):
    N, K = w.shape
    return (w.view(N // 128, 128, K // 128, 128).float() * s[:, None, :, None]).view(N, K)


def expanded(w, s):
    N, K = w.shape
    spread = s[:, None, :, None].expand(-1, 128, -1, 128).reshape(N, K)
    return w.float() * spread


def unsqueezed(w, s):
    blocks = w.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
    return (blocks.float() * s.unsqueeze(1).unsqueeze(-1)).reshape(w.shape)


def scale_first(w, s):
    return s.repeat_interleave(128, 1).repeat_interleave(128, 0) * w.float()


WEIGHTS = {f.__name__: f for f in
           (interleaved, interleaved_cut, viewed, expanded, unsqueezed, scale_first)}  # fmt: skip


# Activations: (q [*, K], scale [*, K / 128]) -> [*, K] float.


def grouped(q, s):
    return (q.unflatten(-1, (-1, 128)).float() * s.unsqueeze(-1)).flatten(-2)


def grouped_view(q, s):
    return (q.float().view(*q.shape[:-1], -1, 128) * s[..., None]).view(q.shape)


def repeated(q, s):
    return q.float() * s.repeat_interleave(128, -1)


def expanded_last(q, s):
    return q.to(torch.float32) * s.unsqueeze(-1).expand(*s.shape, 128).reshape(q.shape)


ACTIVATIONS = {f.__name__: f for f in (grouped, grouped_view, repeated, expanded_last)}


# Products: (x [*, K], weight [N, K], bias [N] or None).


def linear(x, w, b):
    return F.linear(x, w, b)


def at_transposed(x, w, b):
    y = x @ w.T
    return y if b is None else y + b


def torch_matmul(x, w, b):
    y = torch.matmul(x, w.t())
    return y if b is None else b + y


def matmul_transposed(x, w, b):
    y = x.matmul(w.transpose(0, 1))
    return y if b is None else y + b


def addmm(x, w, b):
    flat = x.reshape(-1, x.shape[-1])
    y = torch.mm(flat, w.t()) if b is None else torch.addmm(b, flat, w.t())
    return y.view(*x.shape[:-1], w.shape[0])


PRODUCTS = {f.__name__: f for f in
            (linear, at_transposed, torch_matmul, matmul_transposed, addmm)}  # fmt: skip


class Layer(nn.Module):
    """A quantised weight with its scale, and a function of `(x, weight, scale, bias)`."""

    def __init__(self, forward, shape, scale_shape, qdtype=FN, bias=None):
        super().__init__()
        self.compute = forward
        weight = torch.randn(shape).to(qdtype) if qdtype == FN else torch.randint(-127, 128, shape)
        unit = 1.0 if qdtype == FN else 1 / 64
        self.register_buffer("weight", weight.to(qdtype))
        self.register_buffer("scale", unit * (0.02 + torch.rand(scale_shape) / 20))
        self.register_buffer("bias", None if bias is None else torch.randn(shape[0]).to(bias))

    def forward(self, x):
        return self.compute(x, self.weight, self.scale, self.bias)


def blockscale(weight=interleaved, activation=grouped, product=linear, compute=torch.bfloat16):
    def forward(x, w, s, b):
        q, x_scale = groups_quantised(x)
        rows, columns = activation(q, x_scale).to(compute), weight(w, s).to(compute)
        return product(rows, columns, b).to(x.dtype)

    return forward
