"""Latent attention over few keys on Hopper: it compiles, takes what fits, and is right."""

from __future__ import annotations

import re

import pytest
import torch

from aiter_inductor.kernels.cuda import mla
from aiter_inductor.kernels.cuda.mla_few import FewVariant
from aiter_inductor.kernels.cuda.mla_plan import FewPlan, few_plan
from tests.kernels.cuda.compiling import compiled
from tests.lowerings.checks import assert_close

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="torch sees no GPU with wgmma")
SCALE = 0.07


@pytest.mark.parametrize("variant", [FewVariant(1, 2), FewVariant(2, 4)])
def test_it_compiles_without_spills_into_the_memory_of_a_block(tmp_path, variant):
    artifact = compiled(variant, tmp_path)
    assert "serialized" not in artifact.log
    assert "warning" not in artifact.log
    if "nvrtc" not in artifact.compiler:  # which says nothing of spills
        assert re.findall(r"(\d+) bytes spill stores", artifact.log) == ["0"]
    assert variant.shared_bytes <= 227 * 1024


def test_only_what_fits_side_by_side_and_pays_is_taken():
    assert few_plan(1, 128, 66, 132) == FewPlan(1, 2, groups=2, clusters=33)
    assert few_plan(1, 128, 67, 132) is None
    assert few_plan(2, 128, 64, 132) is None
    assert few_plan(1, 16, 64, 132) == FewPlan(1, 2, groups=1, clusters=32)
    assert few_plan(1, 16, 120, 132) == FewPlan(1, 4, groups=1, clusters=30)
    assert few_plan(1, 16, 132, 132) is None
    assert few_plan(1, 128, 60, 132) == FewPlan(2, 2, groups=1, clusters=30)
    assert few_plan(1, 192, 40, 132) == FewPlan(1, 2, groups=3, clusters=20)
    assert few_plan(8, 128, 8, 132) is None


def inputs(batch: int, heads: int, q_len: int, kv_len: int) -> tuple[torch.Tensor, ...]:
    """Queries, and keys cut out of rows whose other columns are NaN, as are rows that follow."""
    cache = torch.full((batch, kv_len + 70, 640), torch.nan, device="cuda", dtype=torch.bfloat16)
    cache[:, :kv_len, :576].normal_()
    q = torch.randn(batch, heads, q_len, 576, device="cuda").bfloat16()
    parts = q.split((512, 64), -1)
    return (*(x.contiguous() for x in parts), *cache[:, :kv_len, :576].split((512, 64), -1))


def exact(q_latent, q_rope, latent, k_rope):
    """In float64."""
    q, keys = (torch.cat(x, -1).double() for x in ((q_latent, q_rope), (latent, k_rope)))
    return (q @ keys[:, None].mT * SCALE).softmax(-1) @ latent[:, None].double()


def attend(*args):
    """Into poisoned memory, and surely by this kernel."""
    rows, tiles = args[0].shape[1] * args[0].shape[2], -(-args[2].shape[1] // 64)
    assert few_plan(len(args[0]), rows, tiles, mla.processors(args[0].device)) is not None
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return mla.attend(*args, SCALE)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_hopper
@pytest.mark.parametrize("kv_len", [1, 63, 65, 256, 257, 1000, 4096])
@pytest.mark.parametrize("heads", [16, 128])
def test_lengths(heads, kv_len):
    args = inputs(1, heads, 1, kv_len)
    assert_close(attend(*args), exact(*args), loosen=3)


@needs_hopper
@pytest.mark.parametrize("shape", [(3, 33, 2, 500), (4, 128, 1, 1000), (2, 64, 3, 300)])
def test_sequences_rows_and_groups_of_rows(shape):
    args = inputs(*shape)
    assert_close(attend(*args), exact(*args), loosen=3)


@needs_hopper
@pytest.mark.parametrize("exponent", [-100, -20, 100])
def test_any_magnitude(exponent):
    q_latent, q_rope, latent, k_rope = inputs(1, 128, 1, 700)
    zeros, scaled = torch.zeros_like(q_latent), latent * 2.0**exponent
    found = attend(zeros, q_rope, scaled, k_rope) * 2.0**-exponent
    assert_close(found, exact(zeros, q_rope, latent, k_rope), loosen=3)


@needs_hopper
def test_nan_and_scores_far_apart_stay_where_they_are():
    q_latent, q_rope, latent, k_rope = inputs(2, 128, 1, 1000)
    args = q_latent, q_rope, latent.clone(), k_rope.clone()
    args[3][0, 300] = 1000 * q_rope[0, 5, 0]  # one key of one row outweighs every tile but its own
    before = attend(*args)
    assert_close(before, exact(*args), loosen=3)
    args[2][1, 17, 3] = torch.nan
    after = attend(*args)
    assert after[1, :, 0, 3].isnan().all()
    assert torch.equal(after[0], before[0])


@needs_hopper
def test_calls_on_several_streams_and_in_graphs_agree():
    args = inputs(1, 128, 1, 4096)
    expected = attend(*args)
    streams = [torch.cuda.Stream() for _ in range(4)]
    graphs = []
    for stream in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            graphs.append((graph, [mla.attend(*args, SCALE) for _ in range(8)]))
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (graph, found) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                for x in found:
                    x.fill_(torch.nan)
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, expected) for _, found in graphs for x in found)


@needs_hopper
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("key_blocks", [2, 4])
@pytest.mark.parametrize("kv_len", [64, 1000, 5000])
def test_any_plan_even_where_clusters_wait_for_others(blocks, key_blocks, kv_len):
    args, tiles = inputs(2, 128, 1, kv_len), -(-kv_len // 64)
    plan = FewPlan(blocks, key_blocks, 2 // blocks, -(-tiles // key_blocks))
    assert_close(mla.attend(*args, SCALE, plan=plan), exact(*args), loosen=3)
