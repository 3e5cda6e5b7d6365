"""Convert a model's linears to quantised ones, in place.

The modules are plain PyTorch, but for MXFP4's: they run on any backend and device, and
`backend="aiter"` compiles each to one quantisation, fused into what feeds it, and one product that
applies the scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiter_inductor.core.arch import arch_of
from aiter_inductor.core.dtypes import ROW_DTYPES, quant_max, short_name
from aiter_inductor.lowerings.gemm_tiles import TILE, in_rows, in_tiles
from aiter_inductor.lowerings.mxfp4 import GROUP, dequantised, quant_mxfp4

BLOCK = 128
INT4_MAX = 7.0
AMAX_MIN = 1e-10
"""Keeps the scale of zeros positive; far below what a trained weight or an activation reaches."""


class QuantisedLinear(nn.Module):
    """What quantised linears share: a weight in eight or four bits, and an optional bias [N].

    Attributes:
        layout: of the weight in memory, `rows`, or `16x16`: tiles, [N / 16, 16 K], as
            `lowerings/gemm_tiles.py` describes them. A state dict holds the weight as it is stored
            and may be loaded by a layer of the other layout.
        element: format of the weight's elements, where bytes hold two of them.
    """

    weight: Tensor
    bias: Tensor | None
    layout: str = "rows"
    element: str | None = None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.limit = quant_max(dtype)
        self.dtype = dtype
        self.register_parameter("bias", linear.bias)

    def extra_repr(self) -> str:
        """Sizes and format, as `nn.Linear` prints its own."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        shown = (
            f"{sizes}, bias={self.bias is not None}, dtype={self.element or short_name(self.dtype)}"
        )
        return shown if self.layout == "rows" else f"{shown}, layout={self.layout}"

    def rows(self) -> Tensor:
        """The weight, one row an output feature, however it is stored."""
        return self.weight if self.layout == "rows" else in_rows(self.weight)

    def store_in_tiles(self) -> None:
        """Lay the weight out anew, once."""
        self.weight, self.layout = in_tiles(self.weight), "16x16"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """The shape of a stored weight says how it is laid out."""
        given = state_dict.get(f"{prefix}weight")
        N, K = self.out_features, self.in_features
        if given is not None and self.layout == "16x16" and given.shape == (N, K):
            state_dict[f"{prefix}weight"] = in_tiles(given)
        elif given is not None and self.layout == "rows" and given.shape == (N // TILE, TILE * K):
            state_dict[f"{prefix}weight"] = in_rows(given)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """`quantised` to the layer's format."""
        return quantised(values, self.dtype, self.limit)


def quantised(values: Tensor, dtype: torch.dtype, limit: float) -> tuple[Tensor, Tensor]:
    """`(q, scale)` of float32 values, one scale for the last dimension."""
    scale = values.abs().amax(-1, keepdim=True).clamp(min=AMAX_MIN) / limit
    q = values / scale
    if not dtype.is_floating_point:
        q = q.round()
    return q.clamp(-limit, limit).to(dtype), scale


def in_training(x: Tensor) -> bool:
    """Whether a gradient is to flow to `x`."""
    return torch.is_grad_enabled() and x.requires_grad


def straight_through(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounded(x)`, with the gradient of `x` where one is to flow: rounding has none.

    The sum is exact: a rounded number is 0 or lies within a factor of two of what it was.
    """
    if not in_training(x):
        return rounded(x)
    rows = rounded(x.detach())
    return x + (rows - x).detach()


class BlockScaledLinear(QuantisedLinear):
    """Weight by blocks of 128 x 128, activations by groups of 128: DeepSeek-V3's layer and names.

    Buffers: weight [N, K], fp8; weight_scale_inv [ceil(N / 128), K / 128], fp32, which despite its
    name is the factor that dequantises.
    """

    weight_scale_inv: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        N, K = linear.weight.shape
        padded = F.pad(linear.weight.detach().float(), (0, 0, 0, -N % BLOCK))
        blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK)).transpose(1, 2)
        q, scale = self.quantise(blocks.flatten(-2))
        q = q.unflatten(-1, (BLOCK, BLOCK)).transpose(1, 2).reshape(-1, K)[:N]
        self.register_buffer("weight", q.clone())  # not a part of the padded rows
        self.register_buffer("weight_scale_inv", scale.squeeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        """[*, K] to [*, N], in x's dtype; the gradient passes the quantisation of x unchanged."""
        rows = straight_through(x, self._rounded)
        spread = self.weight_scale_inv.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        columns = (self.rows().float() * spread[: self.out_features]).to(x.dtype)
        return F.linear(rows, columns, self.bias)

    def _rounded(self, x: Tensor) -> Tensor:
        groups = x.float().unflatten(-1, (self.in_features // BLOCK, BLOCK))
        q, scale = self.quantise(groups)
        return (q.float() * scale).flatten(-2).to(x.dtype)


class RowScaledLinear(QuantisedLinear):
    """Weight by output feature, activations by token.

    Buffers: weight [N, K], fp8 or int8; weight_scale [N, 1], fp32.
    """

    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        q, scale = self.quantise(linear.weight.detach().float())
        self.register_buffer("weight", q)
        self.register_buffer("weight_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[*, K] to [*, N], in x's dtype; the gradient passes the quantisation of x unchanged."""
        rows = straight_through(x, self._rounded)
        return F.linear(rows, (self.rows().float() * self.weight_scale).to(x.dtype), self.bias)

    def _rounded(self, x: Tensor) -> Tensor:
        q, scale = self.quantise(x.float())
        return (q.float() * scale).to(x.dtype)


class WeightOnlyLinear(RowScaledLinear):
    """Weight by output feature, activations as they are. Buffers as in `RowScaledLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[*, K] to [*, N], in x's dtype."""
        return F.linear(x, (self.weight.float() * self.weight_scale).to(x.dtype), self.bias)


class GroupScaledLinear(QuantisedLinear):
    """Weight in int4 by groups of 128 along K, activations as they are.

    Buffers: weight [N, K / 2], uint8, two's complement nibbles, the even element in the low one;
    weight_scale [N, K / 128], fp32.
    """

    weight_scale: Tensor
    element = "int4"

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        self.limit = INT4_MAX
        groups = linear.weight.detach().float().unflatten(-1, (-1, BLOCK))
        q, scale = self.quantise(groups)
        codes = q.flatten(-2).to(torch.uint8) & 15
        self.register_buffer("weight", codes[:, ::2] | (codes[:, 1::2] << 4))
        self.register_buffer("weight_scale", scale.squeeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        """[*, K] to [*, N], in x's dtype."""
        pairs = self.weight.view(torch.int8)
        codes = torch.stack(((pairs << 4) >> 4, pairs >> 4), -1).flatten(-2)
        groups = codes.float().unflatten(-1, (self.in_features // BLOCK, BLOCK))
        columns = (groups * self.weight_scale[..., None]).flatten(-2)
        return F.linear(x, columns.to(x.dtype), self.bias)


class MxLinear(QuantisedLinear):
    """Weight and activations in MXFP4, the format of `lowerings/mxfp4.py`, by groups of 32 along K.

    Buffers: weight [N, K / 2], uint8, two elements a byte; weight_scale [N, K / 32], uint8, powers
    of two. PyTorch has no words for the format's rounding, so the layer calls this package's
    operators, which compute it anywhere and have kernels for gfx950.
    """

    weight_scale: Tensor
    element = "mxfp4"

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        packed, scale = quant_mxfp4(linear.weight.detach())
        self.register_buffer("weight", packed)
        self.register_buffer("weight_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[*, K] to [*, N], in x's dtype; the gradient passes the quantisation of x unchanged."""
        ops = torch.ops.aiter_inductor
        if in_training(x):
            rows = straight_through(x, lambda rows: dequantised(*ops.quant_mxfp4(rows)).to(x.dtype))
            columns = dequantised(self.weight, self.weight_scale)
            return F.linear(rows, columns.to(x.dtype), self.bias)
        packed, scale = ops.quant_mxfp4(x)
        operands = packed, self.weight, scale, self.weight_scale
        out: Tensor = ops.gemm_mxfp4(*operands, self.bias, out_dtype=x.dtype)
        return out


_SCHEMES: dict[str, tuple[type[QuantisedLinear], bool]] = {
    "fp8_blockscale": (BlockScaledLinear, True),
    "fp8_rowwise": (RowScaledLinear, True),
    "fp8_weight_only": (WeightOnlyLinear, True),
    "int8": (RowScaledLinear, False),
    "int8_weight_only": (WeightOnlyLinear, False),
    "int4_weight_only": (GroupScaledLinear, False),
    "mxfp4": (MxLinear, False),
}
"""By name: the module, and whether it holds fp8."""
_TILED = ("fp8_blockscale", "fp8_rowwise")


def quantize_(
    model: nn.Module,
    scheme: str,
    filter: Callable[[str, nn.Linear], bool] | None = None,  # noqa: A002, as a keyword it reads well
    *,
    layout: str = "rows",
) -> nn.Module:
    """Replace the `nn.Linear`s inside `model` by quantised ones.

    Nothing is changed unless all that the filter selects can be. On chips whose fp8 is
    float8_e4m3fnuz weights there are stored so; on the CPU they are float8_e4m3fn.

    Args:
        model: any module that holds linears in bfloat16, float16 or float32, on any device.
        scheme: `fp8_blockscale`, `fp8_rowwise`, `int8`, `mxfp4` (activations are quantised too),
            `fp8_weight_only`, `int8_weight_only` or `int4_weight_only`.
        filter: `(name, linear) -> whether to convert it`; None converts all.
        layout: of the weights in memory. `16x16`, of `fp8_blockscale` and `fp8_rowwise`, stores
            them as the matrix cores of CDNA read them, which the graph then records; anything else
            puts them back into rows at each call.

    Returns:
        `model`.

    Raises:
        ValueError: for an unknown scheme or layout, a linear that cannot be converted, or none
            selected.
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"there is no scheme {scheme!r}; known are {', '.join(_SCHEMES)}")
    if layout != "rows" and (layout != "16x16" or scheme not in _TILED):
        known = f"rows, and 16x16 for {' and '.join(_TILED)}"
        raise ValueError(f"there is no layout {layout!r} of {scheme}; known are {known}")
    module, is_fp8 = _SCHEMES[scheme]
    linears = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if _is_linear(m)]
    chosen = [(n, m) for n, m in linears if filter is None or filter(n, m)]
    if not chosen:
        raise ValueError(
            f"none of the {len(linears)} linears of {type(model).__name__} is selected"
        )
    owners = _owners(model)
    for name, linear in chosen:
        if reason := _refusal(owners, name, linear, module) or _no_tiles(linear, layout):
            raise ValueError(f"{name or type(model).__name__} cannot be {scheme}: {reason}")
    made: dict[nn.Module, nn.Module] = {}
    for name, linear in chosen:
        if linear not in made:
            dtype = _fp8_of(linear.weight.device) if is_fp8 else torch.int8
            converted = module(linear, dtype).train(linear.training)
            if layout == "16x16":
                converted.store_in_tiles()
            made[linear] = converted
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[linear])
    return model


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is one itself: a subclass may compute something else."""
    return type(module) is nn.Linear


def _owners(model: nn.Module) -> dict[Tensor, dict[nn.Module, str]]:
    """The modules that hold each parameter, with their paths."""
    owners: dict[Tensor, dict[nn.Module, str]] = defaultdict(dict)
    for path, owner in model.named_modules():
        for parameter in owner.parameters(recurse=False):
            owners[parameter][owner] = path
    return owners


def _refusal(
    owners: Mapping[Tensor, Mapping[nn.Module, str]],
    name: str,
    linear: nn.Linear,
    module: type[QuantisedLinear],
) -> str | None:
    """Why a linear cannot be converted, or None."""
    if not name:
        return "it is the model itself, which cannot be replaced in place; wrap it in a module"
    if linear.weight.dtype not in ROW_DTYPES:
        return f"its weight is {short_name(linear.weight.dtype)}, not bfloat16, float16 or float32"
    if linear.weight.numel() == 0:
        return f"its weight is {list(linear.weight.shape)} and has no largest magnitude"
    steps: dict[type, int] = {BlockScaledLinear: BLOCK, GroupScaledLinear: BLOCK, MxLinear: GROUP}
    step = steps.get(module, 1)
    if linear.in_features % step:
        return f"in_features={linear.in_features} is not a multiple of {step}"
    for other, path in owners.get(linear.weight, {}).items():
        if other is not linear:
            return f"its weight is also {path}'s; leave it out with filter"
    return None


def _no_tiles(linear: nn.Linear, layout: str) -> str | None:
    """Why a weight cannot be laid out so, or None; AITER pairs two tiles along K."""
    N, K = linear.out_features, linear.in_features
    if layout == "16x16" and (N % TILE or K % (2 * TILE)):
        return f"its weight [{N}, {K}] is not made of pairs of tiles of {TILE} x {TILE}"
    return None


def _fp8_of(device: torch.device) -> torch.dtype:
    """The fp8 of the chip that holds the weight."""
    known = arch_of(device).fp8_dtypes
    return known[0] if known else torch.float8_e4m3fn
