"""Triton kernels that the simulator runs whole: written for these tests, plain on purpose."""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations.
import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, out, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    values = tl.load(x + row * N + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / N + eps)
    weights = tl.load(weight + columns, mask=inside).to(tl.float32)
    tl.store(out + row * N + columns, (values * scale * weights).to(tl.bfloat16), mask=inside)


@triton.jit
def rope(x, cos, sin, out, num_heads, HALF: tl.constexpr):
    token, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, HALF)
    base = (token * num_heads + head) * 2 * HALF
    c, s = tl.load(cos + token * HALF + columns), tl.load(sin + token * HALF + columns)
    low = tl.load(x + base + columns).to(tl.float32)
    high = tl.load(x + base + HALF + columns).to(tl.float32)
    tl.store(out + base + columns, (low * c - high * s).to(tl.bfloat16))
    tl.store(out + base + HALF + columns, (high * c + low * s).to(tl.bfloat16))


@triton.jit
def silu_and_mul_quant(x, out, scale, N, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    gate = tl.load(x + row * 2 * N + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * N + N + columns, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    largest = tl.maximum(tl.max(tl.abs(y)), 1e-10) / LARGEST
    tl.store(scale + row, largest)
    tl.store(out + row * N + columns, (y / largest).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gemm_block_scale(
    a, b, out, a_scale, b_scale, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    blocks = tl.cdiv(K, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(blocks):
        x = tl.load(a + (rows % M)[:, None] * K + k * BK + inner[None, :])
        y = tl.load(b + (columns % N)[None, :] * K + k * BK + inner[:, None])
        scale = tl.load(a_scale + (rows % M) * blocks + k) * tl.load(
            b_scale + tl.program_id(1) * BN // 128 * blocks + k
        )
        total += tl.dot(x, y) * scale[:, None]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(out + rows[:, None] * N + columns[None, :], total.to(tl.bfloat16), mask=inside)


@triton.jit
def flash_attention(
    Q, K, V, out, scale, length, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):
    block, head = tl.program_id(0), tl.program_id(1)
    base = head * length * D
    rows, columns, depth = block * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    q = tl.load(
        Q + base + rows[:, None] * D + depth[None, :], mask=rows[:, None] < length, other=0.0
    )
    peak = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, (block + 1) * BM, BN):
        at = start + columns
        k = tl.load(
            K + base + at[None, :] * D + depth[:, None], mask=at[None, :] < length, other=0.0
        )
        scores = tl.dot(q, k) * scale * 1.44269504
        scores = tl.where(rows[:, None] >= at[None, :], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(
            V + base + at[:, None] * D + depth[None, :], mask=at[:, None] < length, other=0.0
        )
        acc = acc * shrink[:, None] + tl.dot(p.to(tl.bfloat16), v)
        peak = higher
    tl.store(
        out + base + rows[:, None] * D + depth[None, :],
        (acc / total[:, None]).to(tl.bfloat16),
        mask=rows[:, None] < length,
    )


@triton.jit
def gemm_microscaled(
    a, a_scale, b, b_scale, out, K, FORMAT: tl.constexpr, PACKED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    inner, blocks = tl.arange(0, BK // PACKED), tl.arange(0, BK // 32)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a + rows[:, None] * (K // PACKED) + k // PACKED + inner[None, :])
        y = tl.load(b + columns[None, :] * (K // PACKED) + k // PACKED + inner[:, None])
        xs = tl.load(a_scale + rows[:, None] * (K // 32) + k // 32 + blocks[None, :])
        ys = tl.load(b_scale + columns[:, None] * (K // 32) + k // 32 + blocks[None, :])
        total += tl.dot_scaled(x, xs, FORMAT, y, ys, FORMAT)
    tl.store(out + rows[:, None] * BN + columns[None, :], total)
