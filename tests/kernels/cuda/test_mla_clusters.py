"""Latent attention in clusters on Hopper: it compiles without spills, divides well, is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.code_object import CodeObject
from aiter_inductor.kernels.cuda import mla_clusters
from aiter_inductor.kernels.cuda.mla_clusters import ClusterPlan, ClusterVariant, best_plan
from aiter_inductor.lowerings.mla import mla_decode
from aiter_inductor.lowerings.mla_problem import MlaProblem
from tests.lowerings.checks import assert_close, oracle

MANY = MlaProblem(16, 128, 1, 333, 512, 128, 64, 128, torch.bfloat16)
H100 = (132, 66, 39, 30, 22, 17, 15, 15)
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="torch sees no GPU with wgmma")


@pytest.mark.parametrize(("blocks", "parts", "page"), [(1, 1, 0), (2, 3, 0), (2, 1, 16)])
def test_it_compiles_without_spills_and_keeps_products_asynchronous(tmp_path, blocks, parts, page):
    settings = jit.JitSettings(tmp_path / "cache")
    try:
        jit.find_compiler("sm_90", settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    artifact = jit.load(ClusterVariant(blocks, parts, page).module(), "sm_90", settings)
    assert "serialized" not in artifact.log
    assert "warning" not in artifact.log
    assert " 0 bytes spill stores" in artifact.log or "nvrtc" in artifact.compiler
    facts = CodeObject.parse(artifact.read(), "sm_90").kernels["mla_attend_clusters"]
    assert facts.lds_bytes == 0


def test_plans_fill_the_chip_once():
    assert best_plan(16, 128, 4096, H100) == ClusterPlan(2, 3, 1)
    assert best_plan(32, 128, 4096, H100) == ClusterPlan(2, 1, 2)
    assert best_plan(128, 128, 4096, H100) == ClusterPlan(2, 1, 1)
    assert best_plan(1, 16, 1, H100) == ClusterPlan(1, 1, 1)


@needs_hopper
@pytest.mark.parametrize("changed", [{}, {"q_len": 2, "batch_size": 8}, {"kv_len": 1}], ids=str)
def test_many_rows_go_to_clusters(changed):
    args, kwargs = replace(MANY, **changed).sample(seed=0, device="cuda")
    found = mla_decode.providers["cuda"].run(*args, **kwargs)
    assert_close(found, oracle(mla_decode, args, kwargs), loosen=3)


@needs_hopper
@pytest.mark.parametrize(
    ("blocks", "parts", "clusters"),
    [(1, 1, 1), (1, 1, 3), (1, 2, 1), (1, 4, 2), (2, 1, 1), (2, 1, 16), (2, 2, 7), (2, 3, 1)],
)
def test_any_plan_and_rows_cut_out_of_a_wider_cache(blocks, parts, clusters):
    cache = torch.full((2, 1100, 640), torch.nan, device="cuda", dtype=torch.bfloat16)
    cache[:, :1000, :576].normal_()
    latent, k_rope = cache[:, :1000, :512], cache[:, :1000, 512:576]
    q_latent, q_rope = (
        torch.randn(128, 2, 1, n, device="cuda").bfloat16().transpose(0, 1) for n in (512, 64)
    )
    plan, found = ClusterPlan(blocks, parts, clusters), torch.full_like(q_latent, torch.nan)
    mla_clusters.attend(q_latent, q_rope, latent, k_rope, found, 0.07, plan)
    q, keys = torch.cat((q_latent, q_rope), -1), cache[:, None, :1000, :576].double()
    p = (q.double() @ keys.mT * 0.07).softmax(-1)
    assert_close(found, p @ keys[..., :512], loosen=3)
