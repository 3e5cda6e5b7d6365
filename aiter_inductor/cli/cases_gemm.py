"""What `bench` measures of linear layers and batches of products on quantised operands."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from aiter_inductor.cli.family import Arguments, Dims, Family

GEMM_DIMS: Dims = {"num_rows": 4096, "N": 7168, "K": 2048}
BMM_DIMS: Dims = {"batch": 16, "num_rows": 512, "N": 2048, "K": 2048, "turned": 0}
ROWS_DIMS: Dims = {"num_rows": 4096, "N": 7168}
GROUP_SIZE = 128


def _gemm(scaling: str, dtype: torch.dtype | None = None, tiled: bool = False) -> Family:
    """Linear layers; one-byte operands are `dtype`, or the chip's fp8."""

    def example(dims: Dims, fp8: torch.dtype) -> Arguments:
        M, N, K, one_byte = dims["num_rows"], dims["N"], dims["K"], dtype or fp8
        group, packed = GROUP_SIZE, scaling == "weight_group"
        blocks = {
            "block": (-(-N // group), -(-K // group)),
            "weight_block": (-(-N // group), -(-K // group)),
            "weight_group": (N, -(-K // group)),
            "row": (N,),
            "tensor": (),
        }
        x_scales = {"block": (M, -(-K // group)), "row": (M, 1), "tensor": ()}
        x_dtype = one_byte if scaling in x_scales else torch.bfloat16
        columns = (N, K // 2) if packed else (N // 16, 16 * K) if tiled else (N, K)
        args = (
            torch.empty(M, K, dtype=x_dtype, device="meta"),
            torch.empty(columns, dtype=torch.uint8 if packed else one_byte, device="meta"),
            *(torch.empty(x_scales[s], device="meta") for s in x_scales if s == scaling),
            torch.empty(blocks[scaling], device="meta"),
        )
        return args, {"group_size": group} if packed else {}

    return Family(GEMM_DIMS, example)


def _residual(scaling: str) -> Family:
    """Linear layers with a residual."""

    def example(dims: Dims, fp8: torch.dtype) -> Arguments:
        args, kwargs = _gemm(scaling).example(dims, fp8)
        shape = dims["num_rows"], dims["N"]
        return (*args, torch.empty(shape, dtype=torch.bfloat16, device="meta")), kwargs

    return Family(GEMM_DIMS, example)


def _straight_through(scaling: str, dtype: torch.dtype | None = None) -> Family:
    """Products, and the rows before they were quantised."""

    def example(dims: Dims, fp8: torch.dtype) -> Arguments:
        args, kwargs = _gemm(scaling, dtype).example(dims, fp8)
        return (torch.empty(args[0].shape, dtype=torch.bfloat16, device="meta"), *args), kwargs

    return Family(GEMM_DIMS, example)


def _rows_of_32(dims: Dims, fp8: torch.dtype) -> Arguments:
    """Rows to be quantised in groups of 32."""
    shape = dims["num_rows"], dims["N"] // 32 * 32
    return (torch.empty(shape, dtype=torch.bfloat16, device="meta"),), {}


def _mxfp4() -> Family:
    """Linear layers in MXFP4."""

    def example(dims: Dims, fp8: torch.dtype) -> Arguments:
        K = dims["K"] // 32 * 32
        rows = [dims["num_rows"], dims["N"]]
        shapes = [(n, K // by) for by in (2, 32) for n in rows]
        empty = (torch.empty(shape, dtype=torch.uint8, device="meta") for shape in shapes)
        return tuple(empty), {}

    return Family(GEMM_DIMS, example)


def _int4_tiles(dims: Dims, fp8: torch.dtype) -> Arguments:
    """A weight in int4 tiles, padded to whole ones."""
    M, N, K = dims["num_rows"], dims["N"], dims["K"]
    padded_n, padded_k = -(-N // 16) * 16, -(-K // GROUP_SIZE) * GROUP_SIZE
    scales = (padded_k // GROUP_SIZE, padded_n, 2)
    args = (
        torch.empty(M, K, dtype=torch.bfloat16, device="meta"),
        torch.empty(padded_n // 8, padded_k // 128, 32, 4, dtype=torch.int32, device="meta"),
        torch.empty(scales, dtype=torch.bfloat16, device="meta"),
    )
    return args, {"group_size": GROUP_SIZE, "out_features": N}


def _bmm(dims: Dims, fp8: torch.dtype) -> Arguments:
    """A batch of products, scaled by groups of 128 and blocks of 128 x 128.

    With `turned` the weights are stored [B, K, N].
    """
    B, M, N, K = (dims[name] for name in ("batch", "num_rows", "N", "K"))
    turned = dims.get("turned", 0) > 0
    weight = torch.empty(B, *((K, N) if turned else (N, K)), dtype=fp8, device="meta")
    args = (
        torch.empty(B, M, K, dtype=fp8, device="meta"),
        weight.mT if turned else weight,
        torch.empty(B, M, -(-K // 128), device="meta"),
        torch.empty(B, -(-N // 128), -(-K // 128), device="meta"),
    )
    return args, {}


GEMM_FAMILIES: Mapping[str, Family] = {
    "quant_mxfp4": Family(ROWS_DIMS, _rows_of_32),
    "gemm_fp8_blockscale": _gemm("block"),
    "gemm_fp8_rowwise": _gemm("row"),
    "gemm_fp8_per_tensor": _gemm("tensor"),
    "gemm_int8": _gemm("row", torch.int8),
    "gemm_w8a16": _gemm("weight_block"),
    "gemm_w4a16": _gemm("weight_group"),
    "gemm_fp8_blockscale_preshuffled": _gemm("block", tiled=True),
    "gemm_fp8_rowwise_preshuffled": _gemm("row", tiled=True),
    "gemm_mxfp4": _mxfp4(),
    "gemm_w4a16_tile_packed": Family(GEMM_DIMS, _int4_tiles),
    "gemm_fp8_blockscale_add": _residual("block"),
    "gemm_fp8_rowwise_add": _residual("row"),
    "bmm_fp8": Family(BMM_DIMS, _bmm),
    "gemm_fp8_blockscale_straight_through": _straight_through("block"),
    "gemm_fp8_rowwise_straight_through": _straight_through("row"),
    "gemm_int8_straight_through": _straight_through("row", torch.int8),
}
