"""Latent attention over pages on Hopper: mla.cu, whose tiles come page by page."""

from __future__ import annotations

import math

from torch import Tensor

from aiter_inductor.kernels.cuda.mla import (
    RANK,
    Launches,
    Operands,
    mappable,
    with_positive_scale,
)
from aiter_inductor.kernels.cuda.mla_plan import KEYS, MAX_CLUSTERS, ROWS, MlaPlan, processors
from aiter_inductor.kernels.prepared import Plans, facts_of, same_memory

LEAST_TILES = 2  # of a cluster: one sequence of 4096 tokens takes an H100 17 us with 2, 19 with 1


def mla_paged_decode(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    rank: int = 512,
    plan: MlaPlan | None = None,
) -> Tensor:
    """Attend to the bf16 or e4m3 latent rows of pages; see the op of this name."""
    num_seqs, num_heads, _ = q.shape
    out = q.new_empty(num_seqs, num_heads, rank)
    if out.numel() == 0 or cache.shape[0] == 0 or block_tables.shape[1] * cache.shape[1] == 0:
        return out.zero_()
    scale, q = with_positive_scale(scale, q)
    given = Operands(q, q, cache, cache, block_tables, seq_lens, kv_scale)
    key = plan, facts_of(q, cache, block_tables, seq_lens, kv_scale)
    launches = _PLANS.get(key) or _PLANS.keep(key, _launches(given, out, plan))
    launches.run(_taken(given) if launches.copies else given, out, scale)
    return out


_PLANS = Plans[Launches]()


def _taken(given: Operands) -> Operands:
    """As the kernels read them: the same tensors, or copies; both parts are in one tensor each."""
    q, cache, tables, lengths = (
        *(mappable(given.q_latent), mappable(given.latent)),
        *(given.tables, given.lengths),
    )
    assert tables is not None
    assert lengths is not None
    tables = tables if tables.stride(-1) == 1 else tables.contiguous()
    return Operands(q, q, cache, cache, tables, lengths.contiguous(), given.kv_scale)


def _launches(given: Operands, out: Tensor, plan: MlaPlan | None) -> Launches:
    taken = _taken(given)
    q, cache, tables = taken.q_latent.unsqueeze(2), taken.latent, taken.tables
    assert tables is not None
    if plan is None:
        plan = paged_plan(q.shape[1], processors(q.device))
    page_size = cache.shape[1]
    return Launches.of(
        taken._replace(q_latent=q[..., :RANK], q_rope=q[..., RANK:]),
        out.unsqueeze(2),
        plan,
        tables.shape[1] * page_size,
        min(page_size, KEYS // plan.blocks),
        copies=not same_memory(given, taken),
        page=page_size,
        rope_bytes=RANK * q.element_size(),
    )


def paged_plan(num_heads: int, num_processors: int) -> MlaPlan:
    """A plan that fills the chip, whatever the lengths are, which lie on the device.

    64 clusters of 66 lose nothing on an H100 where lengths differ (160 us, 159), and cut none of
    128 sequences of one length (249 us, 266).
    """
    row_blocks = math.ceil(num_heads / ROWS)
    most = min(max(num_processors // row_blocks, 1), MAX_CLUSTERS)
    power = 1 << (most.bit_length() - 1)
    return MlaPlan(2 - row_blocks % 2, power if 16 * power >= 15 * most else most, LEAST_TILES)
