"""`torch.ops.quantized_decomposed`: near misses, whose scale and zero point no kernel reads.

`quantize_per_tensor` takes its scale as a Python number; `quantize_per_token` takes zero points as
a tensor, and the operator that makes its scales declares them float64 and returns float32.
"""

from __future__ import annotations

from torch import fx

from aiter_inductor.core.graph import arg, kind, number
from aiter_inductor.core.match import Miss, recogniser

_OPS = {"quantize_per_tensor": "quant_static", "quantize_per_token": "quant_per_token"}


@recogniser("quant", *_OPS)
def decomposed_quant(node: fx.Node) -> Miss:
    """Why a quantisation operator of torch.ao is left to Inductor."""
    return Miss(_OPS[kind(node) or ""], node, _reason(node))


def _reason(node: fx.Node) -> str:
    scale, zero_point = arg(node, "scale"), arg(node, "zero_point")
    shift = number(zero_point)
    if shift is None:
        return f"the zero points {zero_point} are a tensor, not known to be 0 when compiling"
    if shift != 0:
        return f"asymmetric: the zero point {shift:g} is added, kernels have none"
    return f"the scale is the number {scale}, kernels read it from a tensor"
