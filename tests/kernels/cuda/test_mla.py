"""Latent attention on Hopper: it compiles without spills, divides well, and is right on a GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.code_object import CodeObject
from aiter_inductor.core.op import Use
from aiter_inductor.kernels.cuda import mla
from aiter_inductor.kernels.cuda.mla import AttendVariant
from aiter_inductor.kernels.cuda.mla_plan import MlaPlan, best_plan, parts_of_sequences
from aiter_inductor.lowerings.mla import mla_decode
from aiter_inductor.lowerings.mla_problem import MlaProblem
from tests.kernels.cuda.compiling import compiled
from tests.lowerings.checks import assert_close, oracle

DEEPSEEK = MlaProblem(2, 128, 1, 1000, 512, 128, 64, 128, torch.bfloat16)
SM_90 = Use(arch_named("sm_90"))
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="torch sees no GPU with wgmma")


@pytest.mark.parametrize(
    ("variant", "most_spilled"),
    [(AttendVariant(1), 0), (AttendVariant(2, page=16), 0), (AttendVariant(2, fp8=True), 48)],
)
def test_it_compiles_and_keeps_products_asynchronous(tmp_path, variant, most_spilled):
    artifact = compiled(variant, tmp_path)
    assert "serialized" not in artifact.log
    assert "warning" not in artifact.log
    if "nvrtc" not in artifact.compiler:  # which says nothing of spills
        assert int(re.findall(r"(\d+) bytes spill stores", artifact.log)[0]) <= most_spilled
    assert CodeObject.parse(artifact.read(), "sm_90").kernels["mla_attend"].lds_bytes == 0


def test_plans_fill_the_chip_once():
    assert best_plan(128, 128, 64, 132) == MlaPlan(2, 64)
    assert parts_of_sequences(128, 64, MlaPlan(2, 64)) == 1
    assert best_plan(16, 128, 64, 132).clusters in (64, 65, 66)
    assert 16 <= best_plan(1, 128, 64, 132).clusters <= 66
    assert best_plan(4, 192, 64, 132).blocks == 1
    assert parts_of_sequences(1, 1, best_plan(1, 16, 1, 132)) == 1


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.5])
def test_scales_become_positive(scale):
    q, k = torch.randn(3, 8), torch.randn(5, 8)
    found, other = mla.with_positive_scale(scale, q)
    assert found > 0
    assert_close(other @ k.T * found, q @ k.T * scale)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"dtype": torch.float16}, "latent rows are float16, not bfloat16"),
        ({"kv_lora_rank": 256}, "kv_lora_rank=256 is not 512"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim=32 is not 64"),
        ({"mask": "bool"}, "it reads no mask: mask=bool causal=False"),
    ],
)
def test_what_it_refuses_goes_to_another_provider(changed, sentence):
    problem = replace(DEEPSEEK, **changed)
    assert mla_decode.select(DEEPSEEK, SM_90).provider is mla_decode.providers["cuda"]
    assert mla_decode.providers["cuda"].refusal(problem, SM_90) == f"cuda: {sentence}"
    assert mla_decode.select(problem, SM_90).provider is mla_decode.providers["triton"]


@needs_hopper
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"kv_len": 1},
        {"kv_len": 31, "num_heads": 16},
        {"kv_len": 4096, "batch_size": 1},
        {"num_heads": 33, "q_len": 2, "kv_len": 77},
        {"batch_size": 70, "kv_len": 65},
        {"cache_dtype": torch.float8_e4m3fn},
        {"cache_dtype": torch.float8_e4m3fn, "num_heads": 16, "kv_len": 4000},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_mla_decode(changed):
    args, kwargs = replace(DEEPSEEK, **changed).sample(seed=0, device="cuda")
    found = mla_decode.providers["cuda"].run(*args, **kwargs)
    assert_close(found, oracle(mla_decode, args, kwargs), loosen=3)


@needs_hopper
@pytest.mark.parametrize(
    "plan",
    [MlaPlan(1, 1), MlaPlan(1, 7), MlaPlan(2, 1), MlaPlan(2, 5, 3), MlaPlan(2, 66)],
    ids=str,
)
def test_any_plan_and_rows_cut_out_of_a_wider_cache(plan):
    cache = torch.full((3, 1100, 640), torch.nan, device="cuda", dtype=torch.bfloat16)
    cache[:, :1000, :576].normal_()
    latent, k_rope = cache[:, :1000, :512], cache[:, :1000, 512:576]
    q_latent, q_rope = (
        torch.randn(128, 3, 1, n, device="cuda").bfloat16().transpose(0, 1) for n in (512, 64)
    )
    found = mla.attend(q_latent, q_rope, latent, k_rope, 0.07, plan=plan)
    q, keys = torch.cat((q_latent, q_rope), -1), cache[:, None, :1000, :576].double()
    p = (q.double() @ keys.mT * 0.07).softmax(-1)
    assert_close(found, p @ keys[..., :512], loosen=3)


@needs_hopper
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e30])
def test_parts_are_as_exact_as_bf16_at_any_magnitude(magnitude):
    q_latent, q_rope = (torch.randn(2, 128, 1, n, device="cuda").bfloat16() for n in (512, 64))
    latent = (torch.randn(2, 700, 512, device="cuda") * magnitude).bfloat16()
    latent[..., 100:200] *= 2.0**-12
    k_rope = torch.randn(2, 700, 64, device="cuda").bfloat16()
    zeros = torch.zeros_like(q_latent)
    whole = mla.attend(zeros, q_rope, latent, k_rope, 0.5, plan=MlaPlan(2, 1))
    parts = mla.attend(zeros, q_rope, latent, k_rope, 0.5, plan=MlaPlan(2, 11)).float() / magnitude
    p = (q_rope.double() @ k_rope[:, None].double().mT * 0.5).softmax(-1)
    exact = (p @ latent[:, None].double()).float() / magnitude
    for columns in (slice(100), slice(100, 200), slice(200, 512)):
        worst = [
            (x[..., columns] - exact[..., columns]).abs().max()
            for x in (whole.float() / magnitude, parts)
        ]
        assert worst[1] <= 2.0 * worst[0]


@needs_hopper
def test_nan_stays_in_its_sequence():
    q_latent, q_rope = (torch.randn(3, 128, 1, n, device="cuda").bfloat16() for n in (512, 64))
    latent, k_rope = (torch.randn(3, 300, n, device="cuda").bfloat16() for n in (512, 64))
    before = mla.attend(q_latent, q_rope, latent, k_rope, 0.07, plan=MlaPlan(2, 4))
    latent[1, 17, 3] = torch.nan
    after = mla.attend(q_latent, q_rope, latent, k_rope, 0.07, plan=MlaPlan(2, 4))
    assert after[1, :, 0, 3].isnan().all()
    assert torch.equal(after[::2], before[::2])
