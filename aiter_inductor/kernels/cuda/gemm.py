"""Linear layers in fp8 on Hopper's tensor cores; the Python side of gemm_fp8_*.cu."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import (
    NO_MAP,
    KernelSignature,
    i32,
    i64,
    pointer,
    tensor_map,
    tensor_map_of,
)
from aiter_inductor.kernels.cuda.gemm_config import BLOCK_K, BOX_M, GemmConfig
from aiter_inductor.kernels.cuda.loading import arch_name, cuda_module, load_kernel
from aiter_inductor.kernels.prepared import Plans, facts_of, same_memory

_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", None: "none"}
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
    given = _Operands(x, weight, x_scale, weight_scale, bias)
    return _gemm(given, "block", out_dtype, config)


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
    given = _Operands(x, weight, x_scale, weight_scale, bias)
    return _gemm(given, "row", out_dtype, config)


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
    given = _Operands(x, weight, x_scale, weight_scale, bias)
    return _gemm(given, "tensor", out_dtype, config)


class _Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    x_scale: Tensor
    weight_scale: Tensor
    bias: Tensor | None


def _gemm(
    given: _Operands, scaling: str, out_dtype: torch.dtype, config: GemmConfig | None
) -> Tensor:
    key = scaling, out_dtype, config, facts_of(*given)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS.keep(key, GemmPlan.of(given, scaling, out_dtype, config))
    return plan.run(given)


def _taken(given: _Operands, scaling: str) -> _Operands:
    """As the kernels read them: rows, and scales with two dimensions."""
    x, weight, x_scale, weight_scale, bias = given
    if scaling == "block":
        x_scale = x_scale.reshape(-1, x_scale.shape[-1])
    else:
        x_scale, weight_scale = (s.reshape(-1, 1).contiguous() for s in (x_scale, weight_scale))
    rows = _readable(x.reshape(-1, weight.shape[1]))
    return _Operands(rows, _readable(weight), x_scale, weight_scale, bias)


@dataclass(frozen=True)
class GemmPlan:
    """All of a product but its addresses.

    Attributes:
        out_shape, out_dtype: of the result.
        scaling: `block`, `row` or `tensor`.
        copies: whether the kernel takes copies of some operands.
        launch: the kernel; None where the result is empty.
        maps: of x and the weight.
        out_map: of the result, if it leaves by TMA.
        num_maps: that the kernel takes.
        numbers: its last arguments.
    """

    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    scaling: str = ""
    copies: bool = False
    launch: Callable[..., None] | None = None
    maps: tuple[bytes, bytes] = (NO_MAP, NO_MAP)
    out_map: bytes | None = None
    num_maps: int = 2
    numbers: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, given: _Operands, scaling: str, out_dtype: torch.dtype, config: GemmConfig | None
    ) -> GemmPlan:
        """The plan of all products of operands with these facts."""
        N, K = given.weight.shape
        out_shape = (*given.x.shape[:-1], N)
        if math.prod(out_shape) == 0:
            return cls(out_shape, out_dtype)
        taken = _taken(given, scaling)
        rows, bias, M = taken.x, taken.bias, math.prod(out_shape[:-1])
        if config is None:
            config = GemmConfig.default(_Sizes(M, N, K), _num_sms(rows.device))
        by_tma = out_dtype != torch.float32 and N % 8 == 0 and not config.swap
        bias_dtype = None if bias is None else bias.dtype
        variant = GemmVariant(config, scaling, out_dtype, bias_dtype, by_tma)
        kernel = load_kernel(variant, arch_name(rows.device), rows.device.type)
        grid, threads = _grid(config, M, N, _num_sms(rows.device))
        out_map = None
        if by_tma:
            out = rows.new_empty(M, N, dtype=out_dtype)
            out_map = tensor_map(out, (BOX_M, config.box_n), swizzle=2 * config.box_n)
        columns = config.block_n // (1 if config.swap else config.cluster)
        return cls(
            out_shape,
            out_dtype,
            scaling,
            not same_memory(given, taken),
            partial(kernel.launch, grid, threads, config.shared_bytes(K)),
            (_map(rows, config.block_m), _map(taken.weight, columns)),
            out_map,
            2 if config.swap else 3,
            (M, N, K, *taken.x_scale.stride(), *taken.weight_scale.stride()),
        )

    def run(self, given: _Operands) -> Tensor:
        """The product of operands with the plan's facts."""
        out = given.x.new_empty(self.out_shape, dtype=self.out_dtype)
        if self.launch is None:
            return out
        x, weight, x_scale, weight_scale, bias = (
            _taken(given, self.scaling) if self.copies else given
        )
        maps: tuple[object, ...] = (self.maps[0], x, 0), (self.maps[1], weight, 0)
        if self.num_maps == 3:
            maps = (*maps, NO_MAP if self.out_map is None else (self.out_map, out, 0))
        self.launch(*maps, x_scale, weight_scale, bias, out, *self.numbers)
        return out


_PLANS = Plans[GemmPlan]()


def _grid(config: GemmConfig, M: int, N: int, num_sms: int) -> tuple[tuple[int, int], int]:
    """Blocks along both, and threads of one."""
    if config.swap:
        grid = -(-N // config.block_n) * config.cluster, -(-M // config.block_m)
        return grid, config.block_n * 2 + 32
    tiles = -(-M // (config.block_m * config.cluster)) * -(-N // config.block_n)
    return (min(tiles, num_sms // config.cluster) * config.cluster, 1), THREADS


def _map(matrix: Tensor, rows: int) -> bytes:
    """By which TMA copies `rows` rows of 128 bytes of K."""
    return tensor_map(matrix, (rows, BLOCK_K))


def _readable(matrix: Tensor) -> Tensor:
    """The matrix as TMA can read it: rows without gaps, or 16-byte aligned ones."""
    if matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


@lru_cache
def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; on meta tensors an H200's."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
