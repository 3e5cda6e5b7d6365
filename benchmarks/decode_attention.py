"""Attention of decoding steps on a GPU: latent rows, keys and values in pages, and dense caches.

    python benchmarks/decode_attention.py            # all
    python benchmarks/decode_attention.py mla        # or one of: mla, mla_paged, paged, rows

Each line gives the median of CUDA graph replays over inputs that together exceed the cache twice,
the rate at which the cached tokens are read, that rate over the one of a large copy in the same
run, and the largest difference from float64 in the first sequences. float64 is computed afterwards:
the first milliseconds behind it are a sixth slower.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aiter_inductor.cli.timing import ceilings, measure, rotation
from aiter_inductor.core.arch import arch_of
from aiter_inductor.core.op import Use
from aiter_inductor.kernels.cuda import mla as cuda_mla
from aiter_inductor.kernels.triton import mla as triton_mla
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.kv_cache_problem import PACK_BYTES
from aiter_inductor.lowerings.mla_paged import mla_paged_decode
from aiter_inductor.lowerings.mla_paged_problem import MlaPagedProblem
from aiter_inductor.lowerings.paged_attention import paged_attention

DEVICE = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SCALE = 192**-0.5
MLA_SIZES = [(batch, 128, 4096) for batch in (1, 2, 4, 8, 16, 32, 64, 128)]
MLA_SIZES += [(1, 128, 512), (128, 128, 512), (1, 128, 16384), (16, 128, 16384)]
MLA_SIZES += [(1, 16, 4096), (16, 16, 4096), (128, 16, 4096), (64, 16, 16384)]
LENGTHS = torch.randint(1000, 8001, (64,), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Pages:
    """Keys and values in pages, 8 heads of 128, and 32 of queries.

    Attributes:
        layout: `paged` or `packed`.
        dtype: of keys and values.
        page_size: tokens of a page.
        longest: tokens of the one sequence there is; None for 64 of 1000 to 8000.
    """

    layout: str
    dtype: torch.dtype
    page_size: int
    longest: int | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence."""
        return LENGTHS if self.longest is None else torch.tensor([self.longest])


@dataclass(frozen=True)
class Rows:
    """A dense cache [batch, kv_heads, kv_len, head_dim], of which a mask may show a part."""

    batch: int
    heads: int
    kv_heads: int
    kv_len: int
    head_dim: int
    masked: bool = True
    sinks: bool = False
    softcap: float | None = None


PAGES = [Pages("paged", BF16, size) for size in (16, 1, 256)]
PAGES += [Pages("packed", BF16, size) for size in (16, 256)]
PAGES += [Pages(layout, FP8, 16) for layout in ("paged", "packed")]
PAGES += [
    Pages(layout, dtype, 16, longest)
    for longest in (32768, 131072)
    for layout, dtype in (("paged", BF16), ("packed", BF16), ("packed", FP8))
]
ROWS = [Rows(batch, 32, 8, 4096, 128, masked=False) for batch in (1, 8, 64)]
ROWS += [Rows(1, 32, 8, 8192, 128), Rows(8, 32, 8, 4096, 128)]
ROWS += [Rows(8, 64, 8, 4096, 64, sinks=True), Rows(8, 16, 8, 4096, 256, softcap=50.0)]


def latent_inputs(batch: int, heads: int, kv_len: int) -> tuple[Tensor, ...]:
    """Absorbed and rotated queries, latent rows and rotated parts, cut out of rows of 576."""
    rows = torch.randn(batch, kv_len, 576, device=DEVICE, dtype=BF16)
    q = torch.randn(batch, heads, 1, 576, device=DEVICE, dtype=BF16)
    parts = q[..., :512], q[..., 512:], rows[..., :512], rows[..., 512:]
    return parts[0].contiguous(), parts[1].contiguous(), parts[2], parts[3]


def latent_error(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """The largest difference from float64 over the first two sequences."""
    q_latent, q_rope, latent, k_rope = (x[:2].double() for x in inputs)
    scores = q_latent.squeeze(2) @ latent.mT + q_rope.squeeze(2) @ k_rope.mT
    exact = (scores * SCALE).softmax(-1) @ latent
    return float((run(*inputs)[:2].squeeze(2).double() - exact).abs().max())


def race_mla(batch: int, heads: int, kv_len: int) -> None:
    """Print the CUDA kernel and the Triton kernel at one size."""
    cached = batch * kv_len * 576 * 2
    sets = [latent_inputs(batch, heads, kv_len) for _ in range(rotation(cached, DEVICE))]
    runs: dict[str, Callable[..., Tensor]] = {
        "cuda": partial(cuda_mla.attend, scale=SCALE),
        "triton": partial(triton_mla.attend, mask=None, scale=SCALE, causal=False),
    }
    calls = {name: [partial(run, *inputs) for inputs in sets] for name, run in runs.items()}
    flops = 2 * batch * heads * kv_len * (576 + 512)
    for name, timing in measure(calls, DEVICE, graph=True, rounds=12).items():
        us = timing.median_us
        print(
            f"mla {name} batch={batch} heads={heads} kv_len={kv_len}: {us:.1f} us"
            f" ±{timing.spread:.3f}, {cached / us / 1e3:.0f} GB/s, {flops / us / 1e6:.0f} TFLOPS,"
            f" error {latent_error(runs[name], sets[0]):.1e}",
            flush=True,
        )


@dataclass(frozen=True)
class LatentPages:
    """Latent rows in pages.

    Attributes:
        name: of the lengths.
        lengths: tokens of each sequence.
        page_size: tokens of a page.
        heads: of the queries.
        dtype: of the rows; fp8 ones have a scale.
    """

    name: str
    lengths: Tensor
    page_size: int
    heads: int = 128
    dtype: torch.dtype = BF16


FIXED = torch.full((128,), 4096)
LATENT_PAGES = [
    LatentPages(name, lengths, page_size, heads, dtype)
    for name, lengths in (("64 of 1000 to 8000", LENGTHS), ("128 of 4096", FIXED))
    for page_size, heads, dtype in (
        (1, 128, BF16),
        (16, 128, BF16),
        (64, 128, BF16),
        (64, 128, FP8),
        (64, 16, BF16),
        (64, 16, FP8),
    )
]
LATENT_PAGES += [LatentPages("1 of 4096", FIXED[:1], 64), LatentPages("16 of 4096", FIXED[:16], 64)]


def mla_pages(pages: LatentPages) -> tuple[Tensor | None, ...]:
    """Arguments of `mla_paged_decode` with pages in random order."""
    tables, count = random_tables(pages.lengths, pages.page_size), len(pages.lengths)
    num_pages = int((-(-pages.lengths // pages.page_size)).sum())
    q = torch.randn(count, pages.heads, 576, device=DEVICE, dtype=BF16)
    cache = torch.randn(num_pages, pages.page_size, 576, device=DEVICE, dtype=BF16)
    scale = torch.ones(1, device=DEVICE) if pages.dtype == FP8 else None
    return q, cache.to(pages.dtype), tables.to(DEVICE), pages.lengths.int().to(DEVICE), scale


def race_mla_paged(pages: LatentPages) -> None:
    """Print the CUDA kernel, where it takes such pages, and the Triton kernel."""
    tokens = int(pages.lengths.sum())
    cached = tokens * 576 * pages.dtype.itemsize
    sets = [mla_pages(pages) for _ in range(rotation(cached, DEVICE))]
    problem, use = MlaPagedProblem.of(*sets[0], scale=SCALE), Use(arch_of(DEVICE))
    runs = {
        name: partial(mla_paged_decode.providers[name].run, scale=SCALE)
        for name in ("cuda", "triton")
        if not mla_paged_decode.providers[name].refusal(problem, use)
    }
    q, cache, tables, lengths, kv_scale = sets[0]
    exact = mla_paged_decode.reference(
        q[:2].double(), cache, tables[:2], lengths[:2], kv_scale, scale=SCALE
    )
    calls = {name: [partial(run, *inputs) for inputs in sets] for name, run in runs.items()}
    for name, timing in measure(calls, DEVICE, graph=True, rounds=12).items():
        us = timing.median_us
        error = float((runs[name](*sets[0])[:2].double() - exact).abs().max())
        print(
            f"mla_paged {name} {pages.name} page_size={pages.page_size} heads={pages.heads}"
            f" {pages.dtype}: {us:.1f} us ±{timing.spread:.3f}, {cached / us / 1e3:.0f} GB/s,"
            f" {2 * tokens * pages.heads * 1088 / us / 1e6:.0f} TFLOPS, error {error:.1e}",
            flush=True,
        )


def random_tables(lengths: Tensor, page_size: int) -> Tensor:
    """Tables of pages in random order; -1 beyond a length."""
    used = -(-lengths // page_size)
    order = torch.randperm(int(used.sum())).int()
    tables = torch.full((len(lengths), int(used.max())), -1, dtype=torch.int32)
    for row, ids in zip(tables, order.split(used.tolist()), strict=True):
        row[: len(ids)] = ids
    return tables


def paged_inputs(pages: Pages) -> tuple[Any, ...]:
    """Arguments of the op with pages in random order."""
    lengths, tables = pages.lengths, random_tables(pages.lengths, pages.page_size)
    num_pages = int((-(-lengths // pages.page_size)).sum())
    heads, D, pack = 8, 128, PACK_BYTES // pages.dtype.itemsize
    shapes: list[tuple[int, ...]] = [(num_pages, pages.page_size, heads, D)] * 2
    if pages.layout == "packed":
        shapes = [
            (num_pages, heads, D // pack, pages.page_size, pack),
            (num_pages, heads, pages.page_size // pack, D, pack),
        ]
    caches = [torch.randn(s, device=DEVICE, dtype=BF16).to(pages.dtype) for s in shapes]
    scale = torch.ones(1, device=DEVICE) if pages.dtype == FP8 else None
    q = torch.randn(len(lengths), 32, D, device=DEVICE, dtype=BF16)
    return (q, *caches, tables.to(DEVICE), lengths.int().to(DEVICE), scale, scale)


def race_paged(pages: Pages) -> None:
    """Print both kernels at one layout."""
    cached = int(pages.lengths.sum()) * 8 * 128 * 2 * pages.dtype.itemsize
    sets = [paged_inputs(pages)]
    if pages.longest is not None:
        sets += [paged_inputs(pages) for _ in range(rotation(cached, DEVICE) - 1)]
    kwargs: dict[str, Any] = {"scale": 128**-0.5, "layout": pages.layout}
    runs = {
        name: partial(paged_attention.providers[name].run, **kwargs) for name in ("hip", "triton")
    }
    calls = {name: [partial(run, *args) for args in sets] for name, run in runs.items()}
    timings = measure(calls, DEVICE, graph=True)
    q, keys, values, tables, lengths, *scales = sets[0]
    few = q[:4].double(), keys, values, tables[:4], lengths[:4]
    exact = paged_attention.reference(*few, *scales, **kwargs)
    for name, timing in timings.items():
        us = timing.median_us
        rate = cached / us / 1e3
        error = float((runs[name](*sets[0])[:4].double() - exact).abs().max())
        print(
            f"paged {name} {pages}: {us:.1f} us, {rate:.0f} GB/s,"
            f" {rate / ceilings(DEVICE).copy_gbps:.2f} of a copy, error {error:.1e}",
            flush=True,
        )


def rows_inputs(rows: Rows) -> tuple[Any, ...]:
    """One query a sequence, a cache of which a mask shows a half to three quarters, and sinks."""
    B, T = rows.batch, rows.kv_len
    q = torch.randn(B, rows.heads, 1, rows.head_dim, device=DEVICE, dtype=BF16)
    k, v = torch.randn(2, B, rows.kv_heads, T, rows.head_dim, device=DEVICE, dtype=BF16)
    filled = torch.linspace(T // 2, 3 * T // 4, B, device=DEVICE)
    mask = (torch.arange(T, device=DEVICE) < filled[:, None])[:, None, None]
    sinks = torch.randn(rows.heads, device=DEVICE, dtype=BF16)
    return q, k, v, mask if rows.masked else None, sinks if rows.sinks else None


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """As transformers' eager attention computes it."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(len(q), -1, 1, 1)), -1)
    weights = scores.softmax(-1, dtype=scores.dtype if q.dtype == torch.float64 else torch.float32)
    return weights.to(q.dtype)[..., : k.shape[2]] @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: None) -> Tensor:
    """As transformers asks torch, which shares heads of keys itself where there is no mask."""
    if mask is not None:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=mask is None)


def race_rows(rows: Rows) -> None:
    """Print the HIP kernel, what Inductor makes, and torch's SDPA where it can be asked."""
    sets = [rows_inputs(rows)]
    cached = 2 * sets[0][1].numel() * 2
    sets += [rows_inputs(rows) for _ in range(rotation(cached, DEVICE) - 1)]
    kwargs: dict[str, Any] = {"scale": rows.head_dim**-0.5, "softcap": rows.softcap}
    runs: dict[str, Callable[..., Tensor]] = {
        "hip": partial(attention.providers["hip"].run, **kwargs),
        "inductor": partial(torch.compile(plain_attention, dynamic=False), **kwargs),
    }
    if not rows.sinks and rows.softcap is None:
        runs["sdpa"] = sdpa
    calls = {name: [partial(run, *inputs) for inputs in sets] for name, run in runs.items()}
    timings = measure(calls, DEVICE, graph=True, rounds=12)
    *first, sinks = (x if x is None or x.dim() == 1 else x[:2] for x in sets[0])
    wide = (x.double() if x is not None and x.is_floating_point() else x for x in (*first, sinks))
    exact = plain_attention(*wide, **kwargs)
    for name, timing in timings.items():
        error = float((runs[name](*sets[0])[:2].double() - exact).abs().max())
        print(f"rows {name} {rows}: {timing.median_us:.1f} us, error {error:.1e}", flush=True)


def main() -> None:
    """Race what was named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["mla", "mla_paged", "paged", "rows"])
    what = parser.parse_args().what
    torch.manual_seed(0)
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, copy {ceilings(DEVICE).copy_gbps:.0f} GB/s")
    if what in (None, "mla"):
        for size in MLA_SIZES:
            race_mla(*size)
    if what in (None, "mla_paged"):
        for latent_pages in LATENT_PAGES:
            race_mla_paged(latent_pages)
    if what in (None, "paged"):
        for pages in PAGES:
            race_paged(pages)
    if what in (None, "rows"):
        for rows in ROWS:
            race_rows(rows)


if __name__ == "__main__":
    main()
