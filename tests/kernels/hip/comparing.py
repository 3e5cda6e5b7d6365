"""How results of HIP kernels are compared with the ops' references."""

from __future__ import annotations

import torch
from torch import Tensor

# Half a unit in the last place for the final rounding, as much again for one before it.
RELATIVE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}


def assert_close_to_float64(out: Tensor, exact: Tensor, *, roundings: int = 1) -> None:
    """`out` is `exact`, computed in float64, but for `roundings` to its dtype."""
    assert out.shape == exact.shape
    error = (out.double() - exact).abs()
    limit = roundings * RELATIVE[out.dtype] * exact.abs() + 1e-6 * exact.abs().amax()
    worst = (error - limit).argmax()
    assert (error <= limit).all(), (
        f"element {int(worst)} is {out.flatten()[worst]}, not {exact.flatten()[worst]}"
    )


def assert_quantised_alike(
    q: Tensor, scale: Tensor, q_ref: Tensor, scale_ref: Tensor, *, tipped: float = 0.002
) -> None:
    """Equal but for a few ties that a last bit before the rounding tips over, by one step each.

    `tipped` is the fraction that may be.

    Where the reference is NaN or infinite, so is the kernel.
    """
    assert (q.dtype, q.shape, scale.shape) == (q_ref.dtype, q_ref.shape, scale_ref.shape)
    torch.testing.assert_close(scale, scale_ref, rtol=2**-7, atol=0, equal_nan=True)
    tipped_scales = (scale != scale_ref) & ~scale_ref.isnan()
    assert tipped_scales.float().mean() <= 0.02
    a, b = q.float(), q_ref.float()
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(), b.nan_to_num()
    step = 1.0 if q.dtype == torch.int8 else 0.126 * b.abs() + 2**-9
    assert ((a - b).abs() <= step).all()
    group_size = q.shape[-1] // scale.shape[-1]
    same_scale = (~tipped_scales).repeat_interleave(group_size, -1).expand(q.shape)
    assert (a != b)[same_scale].float().mean() <= tipped
