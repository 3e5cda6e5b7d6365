"""Calls of this package's own MXFP4 operators, which PyTorch has no other words for."""

from __future__ import annotations

import operator

from torch import fx

from aiter_inductor.core.graph import kind
from aiter_inductor.core.match import Match, Miss, Output, recogniser
from aiter_inductor.lowerings.mxfp4 import gemm_mxfp4, quant_mxfp4


@recogniser("mxfp4", quant_mxfp4.name, gemm_mxfp4.name)
def called_operator(node: fx.Node) -> Match | Miss | None:
    """`torch.ops.aiter_inductor.gemm_mxfp4(...)`, for which the plan is to choose a kernel."""
    if node.kwargs.get("provider", ""):
        return None
    op = quant_mxfp4 if kind(node) == quant_mxfp4.name else gemm_mxfp4
    kwargs = {name: given for name, given in node.kwargs.items() if name != "provider"}
    if op is gemm_mxfp4:
        return Match(op.name, op, node.args, kwargs, (Output(node),), frozenset({node}))
    parts = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if not parts or len(parts) < len(node.users):
        return Miss(op.name, node, "its two results are used in another way than one by one")
    outputs = tuple(Output(parts[i]) if i in parts else None for i in range(2))
    return Match(op.name, op, node.args, kwargs, outputs, frozenset({node, *parts.values()}))
