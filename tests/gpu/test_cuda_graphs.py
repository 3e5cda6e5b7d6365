"""What only a GPU shows: rewritten graphs under CUDA graphs, and on two devices at once."""

from __future__ import annotations

import pytest
import torch

import aiter_inductor

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU is here, and a CPU has no CUDA graphs"
)

N = 512


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.RMSNorm(N, eps=1e-6), torch.nn.Linear(N, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


def forced(mode: str, model: torch.nn.Module) -> torch.nn.Module:
    from torch._inductor import list_mode_options

    options = {**list_mode_options()[mode], "aiter.force": True}
    return torch.compile(model, backend="aiter", options=options)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_replays_read_new_inputs_and_new_weights(mode: str) -> None:
    model = Block().cuda().bfloat16()
    compiled = forced(mode, model)
    with torch.no_grad():
        for step in range(5):
            x = torch.randn(16, N, device="cuda", dtype=torch.bfloat16)
            model.norm.weight.add_(0.25 * step)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2e-2, atol=2e-2)
    assert aiter_inductor.report(compiled).count("rms_norm", "fused") == 1


def test_training_under_graphs() -> None:
    model = Block().cuda()
    compiled = forced("reduce-overhead", model)
    for _ in range(4):
        x = torch.randn(16, N, device="cuda")
        found = {}
        for name, run in (("eager", model), ("compiled", compiled)):
            model.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            run(x).square().mean().backward()
            found[name] = [p.grad.clone() for p in model.parameters()]
        torch.testing.assert_close(found["compiled"], found["eager"], rtol=1e-3, atol=1e-4)


def test_no_rows_and_odd_strides_on_the_gpu() -> None:
    model = Block().cuda().bfloat16()
    compiled = torch.compile(model, backend="aiter", dynamic=True, options={"aiter.force": True})
    wide = torch.randn(8, 2 * N, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for x in (wide[:, :N], wide[:, ::2], wide[:0, :N], wide[:1, :N].expand(8, N)):
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
