"""What Inductor would fuse with a site is found through views, and only that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from aiter_inductor import explain

N = 64


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (N,), torch.ones(N, dtype=x.dtype), 1e-6)


ALONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "between linears": lambda x, w: norm(x @ w) @ w,
    "behind a part of a linear": lambda x, w: norm((x @ w.repeat(1, 2)).split(N, -1)[1]) @ w,
    "through views": lambda x, w: norm((x @ w).view(2, -1, N)).transpose(0, 1).reshape(-1, N) @ w,
    "of the program's own input": lambda x, w: norm(x),
}
BESIDE: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "what makes it": ("sin", lambda x, w: norm((x @ w).sin()) @ w),
    "an embedding": ("embedding", lambda x, w: norm(F.embedding(x[:, 0].long(), w)) @ w),
    "what reads it": ("add", lambda x, w: norm(x @ w) + x),
    "what reads it through a view": ("mul", lambda x, w: norm(x @ w).view(2, -1, N) * 2),
    "a copy of another layout": ("contiguous", lambda x, w: norm(x @ w).t().contiguous()),
}


def reason(program: Callable[[Tensor, Tensor], Tensor], target: str = "sm_90") -> tuple[str, str]:
    x, w = torch.rand(8, N).bfloat16(), torch.randn(N, N).bfloat16()
    with torch.no_grad():
        sites = explain(program, x, w, target=target).sites
    (site,) = (site for site in sites if site.pattern == "rms_norm")
    return site.status, site.reason


@pytest.mark.parametrize("name", ALONE)
def test_a_norm_that_stands_alone_is_taken(name: str) -> None:
    assert reason(ALONE[name])[0] == "fused"


@pytest.mark.parametrize("name", BESIDE)
def test_a_norm_beside_generated_code_is_left_to_inductor(name: str) -> None:
    status, sentence = reason(BESIDE[name][1])
    assert status == "inlined"
    assert f"Inductor computes it in one kernel with {BESIDE[name][0]}" in sentence
    assert reason(BESIDE[name][1], target="gfx942")[0] == "fused"  # nothing is measured there
