"""Latent attention as machine code of gfx942 and gfx950, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.triton import mla
from aiter_inductor.kernels.triton.mla import MlaConfig
from aiter_inductor.kernels.triton.simulated import simulating
from aiter_inductor.lowerings.mla import mla_decode
from aiter_inductor.lowerings.mla_problem import MlaProblem
from tests.lowerings.checks import assert_close, oracle

DEEPSEEK = MlaProblem(1, 16, 1, 70, 512, 128, 64, 128, torch.bfloat16)
SMALL = MlaProblem(2, 5, 2, 41, 64, 32, 16, 24, torch.bfloat16, mask="bool")


@pytest.mark.parametrize(
    ("problem", "config"),
    [(DEEPSEEK, MlaConfig(16, 32, 2)), (SMALL, MlaConfig(16, 16, 3, num_warps=2))],
    ids=["deepseek", "small"],
)
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_mla_decode(arch, problem, config):
    args, kwargs = replace(problem).sample(seed=0, device="cpu")
    with simulating(arch) as launched:
        found = mla.mla_decode(*args, **kwargs, config=config)
    assert [run.name for run in launched] == ["mla_split_kernel", "mla_reduce_kernel"]
    assert "v_mfma" in launched[0].listing
    assert_close(found, oracle(mla_decode, args, kwargs), loosen=3)
