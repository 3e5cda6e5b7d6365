"""Gradients of the normalisations on Hopper; the Python side of norm_backward.cu."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from aiter_inductor.core.arch import KNOWN
from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import KernelSignature, f32, i32, i64, pointer
from aiter_inductor.core.rows import RowNest, row_nest
from aiter_inductor.kernels.cuda.loading import arch_name, cuda_module, load_kernel
from aiter_inductor.kernels.hip.loading import CPP_TYPES

VECTOR_BYTES = 16
_WARP, _BUSY_THREADS = 32, 256
_ELEMENTS = 16  # that a thread holds, of each row and of each sum
_SHARED_BYTES = 220 << 10  # of the 227 KiB of a multiprocessor; barriers and sums take some
_COLUMNS, _SUM_THREADS = 32, 256  # a block of sum_shares_kernel


@dataclass(frozen=True)
class BackwardLayout:
    """How a row lies over threads.

    Attributes:
        threads: of a block, which holds one row.
        vectors: of 16 bytes that a thread holds.
        per_sm: blocks that share a multiprocessor.
        stages: rows under way in a block.
    """

    threads: int
    vectors: int
    per_sm: int
    stages: int

    @classmethod
    def choose(cls, N: int, itemsize: int, inputs: int) -> BackwardLayout:
        """The default for rows of `N` elements, a multiple of 512 bytes, of `inputs` tensors.

        RMSNorm of 4096 x 4096 takes an H100 40.2 us with 256 threads of 2 vectors and one block a
        multiprocessor, 40.6 with 512 of 1, 40.9 with two blocks of 256; 4096 x 7168 69.0 with 448
        of 2, 78.7 with 896 of 1, 91.0 with two blocks, which leave a thread 72 registers. Three
        rows under way are as good as six.
        """
        vectors, most = N * itemsize // VECTOR_BYTES, _ELEMENTS * itemsize // VECTOR_BYTES
        each = next(n for n in (most, most // 2, 1) if vectors % (_WARP * n) == 0)
        threads = vectors // each
        per_sm = max(_BUSY_THREADS // threads, 1)
        stages = min(_SHARED_BYTES // (per_sm * inputs * N * itemsize), 3)
        return cls(threads, each, per_sm, stages)


@dataclass(frozen=True)
class BackwardVariant:
    """One kernel of norm_backward.cu.

    Attributes:
        kernel: `norm_backward_kernel` or `sum_shares_kernel`.
        layer: LayerNorm rather than RMSNorm.
        dtype: of x and all gradients of rows.
        weight_dtype: of the weight and of its gradient.
        has_grad_sum, has_weight, has_bias: which of these there are.
        round_before_weight: of the normalisation.
        layout: how rows lie over threads.
    """

    kernel: str
    layer: bool
    dtype: torch.dtype
    weight_dtype: torch.dtype
    has_grad_sum: bool
    has_weight: bool
    has_bias: bool
    round_before_weight: bool
    layout: BackwardLayout

    def module(self) -> Module:
        """norm_backward.cu with these definitions."""
        layout = self.layout
        return cuda_module(
            "norm_backward",
            "norm_backward.cu",
            X=CPP_TYPES[self.dtype],
            W=CPP_TYPES[self.weight_dtype],
            LAYER_NORM=self.layer,
            HAS_GRAD_SUM=self.has_grad_sum,
            HAS_WEIGHT=self.has_weight,
            HAS_BIAS=self.has_bias,
            ROUND_BEFORE_WEIGHT=self.round_before_weight,
            THREADS=layout.threads,
            VECTORS=layout.vectors,
            VEC=VECTOR_BYTES // self.dtype.itemsize,
            STAGES=layout.stages,
            PER_SM=layout.per_sm,
        )

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        if self.kernel == "sum_shares_kernel":
            shares, dtype = pointer("shares", torch.float32), self.weight_dtype
            sums = pointer("first", dtype), pointer("second", dtype, optional=True)
            return KernelSignature(self.kernel, (shares, *sums, i32("num_shares")), waits=True)
        rows = [f"{name}_stride" for name in ("grad", "grad_sum", "x", "dx")]
        return KernelSignature(
            self.kernel,
            (
                pointer("grad", self.dtype, align=VECTOR_BYTES),
                pointer("grad_sum", self.dtype, optional=True, align=VECTOR_BYTES),
                pointer("x", self.dtype, align=VECTOR_BYTES),
                pointer("weight", self.weight_dtype, optional=True, align=VECTOR_BYTES),
                pointer("dx", self.dtype, align=VECTOR_BYTES),
                pointer("shares", torch.float32, optional=True),
                i32("num_rows"),
                f32("eps"),
                f32("weight_offset"),
                *map(i64, rows),
            ),
            waits=True,
        )


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` for rows [*, N]; see the op of this name."""
    rounds = round_before_weight and weight is not None
    dx, sums = _backward(grad, None, x, weight, eps, weight_offset, rounds=rounds)
    return dx, sums[0] if sums else x.new_empty(0)


def add_rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of `add_rms_norm` for rows [*, N]; see the op of this name."""
    rounds = round_before_weight and weight is not None
    dx, sums = _backward(grad, grad_sum, x, weight, eps, weight_offset, rounds=rounds)
    return dx, sums[0] if sums else x.new_empty(0)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, *, has_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm` for rows [*, N]; see the op of this name."""
    dx, sums = _backward(grad, None, x, weight, eps, layer=True, has_bias=has_bias)
    nothing = x.new_empty(0)
    return dx, nothing if weight is None else sums[0], sums[-1] if has_bias else nothing


def _backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    *,
    layer: bool = False,
    rounds: bool = False,
    has_bias: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradient of x, and those of weight and bias, each [N], that are wanted."""
    dx, N = torch.empty_like(x), x.shape[-1]
    dtype = x.dtype if weight is None else weight.dtype
    sums = tuple(x.new_empty(N, dtype=dtype) for _ in range((weight is not None) + has_bias))
    if x.numel() == 0:
        return dx, tuple(map(torch.zero_, sums))
    rows, nest = _in_one_loop(grad, grad_sum, x, dx)
    if weight is not None and weight.data_ptr() % VECTOR_BYTES:
        weight = weight.clone()
    layout = BackwardLayout.choose(N, x.element_size(), len(nest.strides) - 1)
    given = grad_sum is not None, weight is not None, has_bias
    variant = BackwardVariant("norm_backward_kernel", layer, x.dtype, dtype, *given, rounds, layout)
    blocks = min(nest.num_rows, layout.per_sm * _num_multiprocessors(x.device))
    shares = x.new_empty((len(sums), blocks, N), dtype=torch.float32)
    strides = [outer for outer, _ in nest.strides]
    if grad_sum is None:
        strides.insert(1, 0)
    arch, device_type = arch_name(x.device), x.device.type
    load_kernel(variant, arch, device_type).launch(
        blocks,
        layout.threads,
        layout.stages * (len(nest.strides) - 1) * N * x.element_size(),
        *(rows.grad, rows.grad_sum, rows.x, weight, rows.dx, shares),
        *(nest.num_rows, eps, weight_offset, *strides),
    )
    add = load_kernel(replace(variant, kernel="sum_shares_kernel"), arch, device_type)
    if sums:
        grid, second = (N // _COLUMNS, len(sums)), sums[1] if len(sums) > 1 else None
        add.launch(grid, _SUM_THREADS, 0, shares, sums[0], second, blocks)
    if rows.dx is not dx:
        dx.copy_(rows.dx)
    return dx, sums


class _Rows(NamedTuple):
    grad: Tensor
    grad_sum: Tensor | None
    x: Tensor
    dx: Tensor

    def loop(self) -> RowNest | None:
        """One loop over the rows whose strides and addresses are those of vectors, or None."""
        given = [tensor for tensor in self if tensor is not None]
        nest, each = row_nest(*given), VECTOR_BYTES // self.x.element_size()
        if nest is None or nest.inner != 1:
            return None
        whole = all(outer % each == 0 for outer, _ in nest.strides)
        return nest if whole and all(t.data_ptr() % VECTOR_BYTES == 0 for t in given) else None


def _in_one_loop(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, dx: Tensor
) -> tuple[_Rows, RowNest]:
    """The tensors as the kernel walks over them: copied where that is not one loop of vectors."""
    if grad_sum is not None:
        grad_sum = grad_sum.to(x.dtype)
    given = _Rows(grad, grad_sum, x, dx)
    nest = given.loop()
    if nest is None:
        copies = (None if t is None else _copied(t) for t in (grad, grad_sum, x))
        given = _Rows(*copies, x.new_empty(x.shape))
        nest = given.loop()
    assert nest is not None, "copies are one loop"
    return given, nest


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return KNOWN["sm_90"].compute_units
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
