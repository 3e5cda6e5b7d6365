"""`torch.ops.aten._weight_int4pack_mm`: rows times an int4 weight in the chip's own tiles."""

from __future__ import annotations

import torch
from torch import fx

from aiter_inductor.core.graph import arg, dtype, dtype_name, ndim, size, sizes
from aiter_inductor.core.match import Match, Miss, Output, recogniser
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.gemm_tile_packed import (
    TILE_K,
    gemm_w4a16_tile_packed,
    tile_n_here,
)
from aiter_inductor.patterns.raising.gemm import PATTERN


@recogniser(PATTERN, "int4pack_mm")
def int4pack_call(node: fx.Node) -> Match | Miss | None:
    """x [M, K], bfloat16, times a weight of `_convert_weight_to_int4pack` with 8 inner tiles."""
    x, words, scales = (arg(node, name) for name in ("input", "mat2", "scale_and_zero"))
    group_size = arg(node, "group_size")
    if ndim(x) != 2 or ndim(words) != 4 or not isinstance(group_size, int):
        return None
    features, inner = fixed(size(node, -1)), size(words, -1)
    if inner != 4:
        reason = f"{words.name} has {2 * inner} inner tiles of 16; the kernel reads 8"
        return Miss(PATTERN, node, reason)
    if dtype(x) != torch.bfloat16 or size(x, -1) != TILE_K * size(words, 1) or features is None:
        return Miss(
            PATTERN,
            node,
            f"x is {dtype_name(x)} {list(sizes(x) or ())}, not bfloat16 and as wide as the weight",
        )
    sizes_of = {
        "group_size": group_size,
        "out_features": int(features),
        "tile_n": tile_n_here(),
    }
    op, args = gemm_w4a16_tile_packed, (x, words, scales)
    return Match(op.name, op, args, sizes_of, (Output(node),), frozenset({node}))
