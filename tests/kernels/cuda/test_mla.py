"""Latent attention on Hopper: it compiles without spills, divides well, and is right on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.kernels.cuda import mla
from aiter_inductor.lowerings.mla import mla_decode
from aiter_inductor.lowerings.mla_problem import MlaProblem
from tests.lowerings.checks import assert_close, oracle

DEEPSEEK = MlaProblem(2, 128, 1, 1000, 512, 128, 64, 128, torch.bfloat16)
SM_90 = Use(arch_named("sm_90"))
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="torch sees no GPU with wgmma")


def test_it_compiles_without_spills_and_keeps_products_asynchronous(tmp_path):
    settings = jit.JitSettings(tmp_path / "cache")
    try:
        jit.find_compiler("sm_90", settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    artifact = jit.load(mla.MlaVariant().module(), "sm_90", settings)
    assert "serialized" not in artifact.log
    assert "warning" not in artifact.log
    assert " 0 bytes spill stores" in artifact.log or "nvrtc" in artifact.compiler


def test_splits_fill_the_chip_once():
    assert mla.best_splits(32, 2048, 4096, 132) == 4
    assert mla.best_splits(256, 16384, 4096, 132) == 1
    assert 8 <= mla.best_splits(2, 128, 4096, 132) <= 64
    assert mla.best_splits(2, 128, 1, 132) == 1


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


def test_few_heads_of_many_sequences_go_to_triton():
    chosen = mla_decode.select(replace(DEEPSEEK, num_heads=16, batch_size=128), SM_90)
    assert chosen.provider is mla_decode.providers["triton"]
    assert "num_heads=16 at batch_size=128" in chosen.reason
    for kept in ({"num_heads": 16}, {"num_heads": 32, "batch_size": 128}):
        assert mla_decode.select(replace(DEEPSEEK, **kept), SM_90).provider.name == "cuda"


@needs_hopper
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"kv_len": 1},
        {"kv_len": 31, "num_heads": 16},
        {"kv_len": 4096, "batch_size": 1},
        {"num_heads": 33, "q_len": 2, "kv_len": 77},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_mla_decode(changed):
    args, kwargs = replace(DEEPSEEK, **changed).sample(seed=0, device="cuda")
    found = mla_decode.providers["cuda"].run(*args, **kwargs)
    assert_close(found, oracle(mla_decode, args, kwargs), loosen=3)


@needs_hopper
@pytest.mark.parametrize("splits", [1, 2, 3, 32, 64])
def test_any_split_and_rows_cut_out_of_a_wider_cache(splits):
    cache = torch.full((2, 1100, 640), torch.nan, device="cuda", dtype=torch.bfloat16)
    cache[:, :1000, :576].normal_()
    latent, k_rope = cache[:, :1000, :512], cache[:, :1000, 512:576]
    q_latent, q_rope = (
        torch.randn(128, 2, 1, n, device="cuda").bfloat16().transpose(0, 1) for n in (512, 64)
    )
    found = mla.attend(q_latent, q_rope, latent, k_rope, 0.07, splits)
    q, keys = torch.cat((q_latent, q_rope), -1), cache[:, None, :1000, :576].double()
    p = (q.double() @ keys.mT * 0.07).softmax(-1)
    assert_close(found, p @ keys[..., :512], loosen=3)
