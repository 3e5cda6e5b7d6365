"""The README's example: a function with an RMSNorm in it, compiled and explained."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import aiter_inductor


def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    total = x + residual
    return F.rms_norm(total, (total.shape[-1],), weight, 1e-6) + total


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = [torch.randn(*shape, device=device) for shape in ((64, 1024), (64, 1024), (1024,))]
    compiled = torch.compile(block, backend="aiter")
    torch.testing.assert_close(compiled(*args), block(*args))
    print(aiter_inductor.explain(block, *args, target="gfx942"))


if __name__ == "__main__":
    main()
