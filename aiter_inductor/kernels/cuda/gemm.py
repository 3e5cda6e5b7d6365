"""Linear layers in fp8 on Hopper's tensor cores; the Python side of gemm_fp8_*.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import (
    KernelSignature,
    i32,
    i64,
    pointer,
    tensor_map,
    tensor_map_of,
)
from aiter_inductor.kernels.cuda.gemm_config import BLOCK_K, BOX_M, GemmConfig
from aiter_inductor.kernels.cuda.loading import arch_name, cuda_module, load_kernel

_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", None: "none"}
_NO_MAP = bytes(128)
THREADS = 384
"""Two warpgroups that multiply and one that copies."""


@dataclass(frozen=True)
class GemmVariant:
    """One compilation of gemm_fp8_tiles.cu or gemm_fp8_tokens.cu.

    Attributes:
        config: which of the two, and its tiles.
        scaling: `block`, `row` or `tensor`.
        out_dtype: of the result.
        bias_dtype: of the bias; None if there is none.
        store_by_tma: whether results leave by TMA, which wants rows of a multiple of 16 bytes.
    """

    config: GemmConfig
    scaling: str
    out_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    store_by_tma: bool

    @property
    def _source(self) -> str:
        return "gemm_fp8_tokens.cu" if self.config.swap else "gemm_fp8_tiles.cu"

    @property
    def _kernel(self) -> str:
        return self._source.removesuffix(".cu")

    def module(self) -> Module:
        """The source with these definitions."""
        config = self.config
        own: dict[str, object] = {"GEMM_TOKENS": config.block_m, "GEMM_PER_SM": config.per_sm}
        if not config.swap:
            own = {
                "GEMM_BLOCK_M": config.block_m,
                "GEMM_WIDTH": config.width,
                "GEMM_BAND": config.band,
                "GEMM_STORE_BY_TMA": self.store_by_tma,
            }
        return cuda_module(
            self._kernel,
            self._source,
            GEMM_SCALING=self.scaling,
            GEMM_OUT=_NUMBERS[self.out_dtype],
            GEMM_BIAS=_NUMBERS[self.bias_dtype],
            GEMM_BLOCK_N=config.block_n,
            GEMM_STAGES=config.stages,
            GEMM_CLUSTER=config.cluster,
            **own,
        )

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        maps = ("x_map", "weight_map") if self.config.swap else ("x_map", "weight_map", "out_map")
        strides = ("x_row", "x_block", "weight_row", "weight_block")
        return KernelSignature(
            self._kernel,
            (
                *map(tensor_map_of, maps),
                pointer("x_scale", torch.float32),
                pointer("weight_scale", torch.float32),
                pointer("bias", self.bias_dtype, optional=True),
                pointer("out", self.out_dtype),
                i32("M"),
                i32("N"),
                i32("K"),
                *map(i64, strides),
            ),
            waits=True,
        )


@dataclass(frozen=True)
class _Sizes:
    """As much of a problem as the choice of tiles asks for."""

    M: int
    N: int
    K: int


def gemm_fp8_blockscale(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, both e4m3; see the op of this name.

    Scales may have any strides. Blocks are 128 along K and N.

    Args:
        config: how to cut the product; None takes the default for these sizes.
    """
    rows = x_scale.reshape(-1, x_scale.shape[-1])
    return _gemm(x, weight, rows, weight_scale, bias, "block", out_dtype, config)


def gemm_fp8_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, a scale each row; see the op of this name."""
    of_x, of_weight = x_scale.reshape(-1, 1).contiguous(), weight_scale.reshape(-1, 1).contiguous()
    return _gemm(x, weight, of_x, of_weight, bias, "row", out_dtype, config)


def gemm_fp8_per_tensor(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, a scale each; see the op of this name."""
    of_x, of_weight = x_scale.reshape(1, 1), weight_scale.reshape(1, 1)
    return _gemm(x, weight, of_x, of_weight, bias, "tensor", out_dtype, config)


def _gemm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scaling: str,
    out_dtype: torch.dtype,
    config: GemmConfig | None,
) -> Tensor:
    N, K = weight.shape
    rows = x.reshape(-1, K)
    M = rows.shape[0]
    out = x.new_empty((M, N), dtype=out_dtype)
    if M and N:
        rows, weight = _readable(rows), _readable(weight)
        if config is None:
            config = _default(M, N, K, _num_sms(x.device))
        variant = GemmVariant(
            config,
            scaling,
            out_dtype,
            None if bias is None else bias.dtype,
            out_dtype != torch.float32 and N % 8 == 0 and not config.swap,
        )
        _launch(variant, rows, weight, x_scale, weight_scale, bias, out)
    return out.reshape(*x.shape[:-1], N)


def _launch(
    variant: GemmVariant,
    rows: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    (M, K), N, config = rows.shape, weight.shape[0], variant.config
    kernel = load_kernel(variant, arch_name(rows.device), rows.device.type)
    if rows.is_meta:
        return kernel.launch()
    strides = (*x_scale.stride(), *weight_scale.stride())
    numbers = (x_scale, weight_scale, bias, out, M, N, K, *strides)
    shared_bytes = config.shared_bytes(K)
    if config.swap:
        maps = _map(rows, config.block_m), _map(weight, config.block_n)
        grid = (-(-N // config.block_n) * config.cluster, -(-M // config.block_m))
        return kernel.launch(grid, config.block_n * 2 + 32, shared_bytes, *maps, *numbers)
    maps = _map(rows, config.block_m), _map(weight, config.block_n // config.cluster)
    tiles = -(-M // (config.block_m * config.cluster)) * -(-N // config.block_n)
    clusters = min(tiles, _num_sms(rows.device) // config.cluster)
    out_map = _NO_MAP
    if variant.store_by_tma:
        out_map = tensor_map(out, (BOX_M, config.box_n), swizzle=2 * config.box_n)
    grid = clusters * config.cluster
    return kernel.launch(grid, THREADS, shared_bytes, *maps, out_map, *numbers)


def _map(matrix: Tensor, rows: int) -> bytes:
    """By which TMA copies `rows` rows of 128 bytes of K."""
    return tensor_map(matrix, (rows, BLOCK_K))


def _readable(matrix: Tensor) -> Tensor:
    """The matrix as TMA can read it: rows without gaps, or 16-byte aligned ones."""
    if matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=4096)
def _default(M: int, N: int, K: int, num_sms: int) -> GemmConfig:
    return GemmConfig.default(_Sizes(M, N, K), num_sms)


@lru_cache
def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; on meta tensors an H200's."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
