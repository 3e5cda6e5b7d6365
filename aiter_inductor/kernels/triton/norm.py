"""x"""
from __future__ import annotations
import torch, triton, triton.language as tl
from aiter_inductor.kernels.triton.launch import launchable
@triton.jit
def _k(x, w, o, N, eps, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    m = c < N
    v = tl.load(x + r * N + c, m, 0).to(tl.float32)
    y = v * tl.rsqrt(tl.sum(v * v) / N + eps)
    tl.store(o + r * N + c, y * tl.load(w + c, m, 0).to(tl.float32), m)
def rms_norm(x, weight, eps, *, weight_offset=0.0, round_before_weight=False, out_dtype=None):
    o = torch.empty_like(x, dtype=out_dtype or x.dtype)
    N = x.shape[-1]
    launchable(_k)[(x.numel() // N,)](x, weight, o, N, eps, BLOCK=triton.next_power_of_2(N))
    return o
