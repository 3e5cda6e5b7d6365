"""Quantisation operators of torch.ao and torchao: near misses, each with what no kernel reads.

`quantize_per_tensor` takes its scale as a Python number; `quantize_per_token` takes zero points as
a tensor, and the operator that makes its scales declares them float64 and returns float32.
"""

from __future__ import annotations

from torch import fx

from aiter_inductor.core.graph import arg, kind, number
from aiter_inductor.core.match import Miss, recogniser

_OPS = {
    "quantize_per_tensor": "quant_static",
    "quantize_per_token": "quant_per_token",
    "quantize_per_channel": "quant_per_token",
    "quantize_per_channel_group": "quant_per_group",
    "quantize_affine": "quant_per_group",
    "fake_quantize": "quant_static",
}
_GIVEN = {
    "quantize_per_channel": "its scales are given by channel, kernels compute one for each row",
    "quantize_per_channel_group": "its scales are given by group, kernels compute them from x",
    "quantize_affine": "its scales and zero points are given by block, kernels compute scales",
    "fake_quantize": "it gives floats again, kernels write eight bits",
}


@recogniser("quant", *_OPS)
def decomposed_quant(node: fx.Node) -> Miss:
    """Why a quantisation operator of torch.ao is left to Inductor."""
    found = kind(node) or ""
    return Miss(_OPS[found], node, _GIVEN.get(found) or _reason(node))


def _reason(node: fx.Node) -> str:
    scale, zero_point = arg(node, "scale"), arg(node, "zero_point")
    shift = number(zero_point)
    if shift is None:
        return f"the zero points {zero_point} are a tensor, not known to be 0 when compiling"
    if shift != 0:
        return f"asymmetric: the zero point {shift:g} is added, kernels have none"
    known = number(scale)
    shown = f"{scale}" if known is None else f"{known:g}"
    return f"the scale is the number {shown}, kernels read it from a tensor"
