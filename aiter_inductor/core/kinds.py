"""One name for each computation, however a program spells it.

Dynamo's graph holds what the program wrote: `x * y`, `torch.mul`, `x.mul`, `aten.mul.Tensor`. This
table maps every such target to a *kind* and names its positional arguments, so that recognisers
read `graph.arg(node, "dim")` and never a spelling. Targets are looked up by identity; method calls
by their string.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

_UNARY = ("input",)
_BINARY = ("input", "other")

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "add": _BINARY,
    "sub": _BINARY,
    "rsub": _BINARY,
    "mul": _BINARY,
    "div": _BINARY,
    "pow": ("input", "exponent"),
    "maximum": _BINARY,
    "lt": _BINARY,
    "and": _BINARY,
    "xor": _BINARY,
    "lshift": _BINARY,
    "rshift": _BINARY,
    "minimum": _BINARY,
    "mean": ("input", "dim", "keepdim"),
    "sum": ("input", "dim", "keepdim"),
    "amax": ("input", "dim", "keepdim"),
    "amin": ("input", "dim", "keepdim"),
    "max": ("input", "dim", "keepdim"),
    "aminmax": ("input", "dim", "keepdim"),
    "std": ("input", "dim", "unbiased", "keepdim"),
    "var": ("input", "dim", "unbiased", "keepdim"),
    "var_mean": ("input", "dim", "unbiased", "keepdim"),
    "vector_norm": ("input", "ord", "dim", "keepdim"),
    "normalize": ("input", "p", "dim", "eps"),
    "clamp": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "clamp_max": ("input", "max"),
    "where": ("condition", "input", "other"),
    "softmax": ("input", "dim", "dtype"),
    "gelu": ("input", "approximate"),
    "topk": ("input", "k", "dim", "largest", "sorted"),
    "cat": ("tensors", "dim"),
    "stack": ("tensors", "dim"),
    "slice": ("input", "dim", "start", "end", "step"),
    "select": ("input", "dim", "index"),
    "narrow": ("input", "dim", "start", "length"),
    "getitem": ("input", "index"),
    "chunk": ("input", "chunks", "dim"),
    "split": ("input", "sizes", "dim"),
    "unbind": ("input", "dim"),
    "unsqueeze": ("input", "dim"),
    "squeeze": ("input", "dim"),
    "transpose": ("input", "dim0", "dim1"),
    "flatten": ("input", "start_dim", "end_dim"),
    "repeat_interleave": ("input", "repeats", "dim"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "polar": ("abs", "angle"),
    "linear": ("input", "weight", "bias"),
    "dropout": ("input", "p", "training"),
    "sdpa": (
        "input",
        "key",
        "value",
        "mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
    ),
    "copy_": _BINARY,
    "or": _BINARY,
    "matmul": _BINARY,
    "bmm": ("input", "mat2"),
    "int_mm": ("input", "mat2"),
    "int4pack_mm": ("input", "mat2", "group_size", "scale_and_zero"),
    "einsum": ("equation", "operands"),
    "addmm": ("input", "mat1", "mat2"),
    "scaled_mm": ("input", "mat2", "scale_a", "scale_b", "bias", "scale_result"),
    "scaled_mm_recipes": (
        "input",
        "mat2",
        "scale_a",
        "recipe_a",
        "swizzle_a",
        "scale_b",
        "recipe_b",
        "swizzle_b",
        "bias",
    ),
    "quantize_per_tensor": ("input", "scale", "zero_point", "quant_min", "quant_max", "dtype"),
    "fake_quantize": ("input", "scale", "zero_point"),
    "quantize_per_token": ("input", "scale", "zero_point", "quant_min", "quant_max", "dtype"),
}
"""Positional argument names, where they are more than `input`."""

_ALIASES = {
    "self": "input",
    "x": "input",
    "query": "input",
    "attn_mask": "mask",
    "src": "other",
    "axis": "dim",
    "split_size_or_sections": "sizes",
    "split_size": "sizes",
    "split_sizes": "sizes",
    "tensor": "input",
    "A": "input",
    "scales": "scale",
    "zero_points": "zero_point",
}

_METHODS: Mapping[str, str] = {
    **{name: name for name in (
        "add", "sub", "mul", "div", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal", "mean",
        "sum", "amax", "amin", "max", "abs", "clamp", "clamp_min", "clamp_max", "round", "maximum",
        "minimum", "exp", "sigmoid", "tanh", "std", "var", "slice", "select", "narrow", "chunk",
        "split", "unbind", "unsqueeze", "squeeze", "transpose", "flatten", "repeat_interleave",
        "softmax", "contiguous", "clone", "expand", "expand_as", "permute", "where", "item",
        "aminmax", "cos", "sin", "erf", "repeat", "copy_",
        "matmul", "bmm", "topk", "exp2",
    )},
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg",
    "clip": "clamp", "absolute": "abs", "swapaxes": "transpose", "t": "permute", "mT": "transpose",
    "view": "reshape", "reshape": "reshape", "view_as": "reshape", "reshape_as": "reshape",
    "unflatten": "reshape", "to": "cast", "type": "cast", "type_as": "cast", "float": "cast",
    "half": "cast", "bfloat16": "cast", "double": "cast", "detach": "detach", "norm": "vector_norm",
    "new_empty": "empty", "mm": "matmul", "addmm": "addmm", "lt": "lt", "less": "lt",
    "bitwise_and": "and", "bitwise_xor": "xor", "bitwise_left_shift": "lshift",
    "bitwise_right_shift": "rshift",
    "int": "cast", "long": "cast", "short": "cast", "char": "cast", "byte": "cast",
    "__or__": "or", "bitwise_or": "or", "__and__": "and", "__lshift__": "lshift",
}  # fmt: skip

_FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "add": ("operator.add", "torch.add", "aten.add.Tensor", "aten.add.Scalar"),
    "sub": ("operator.sub", "torch.sub", "torch.subtract", "aten.sub.Tensor", "aten.sub.Scalar"),
    "rsub": ("torch.rsub", "aten.rsub.Tensor", "aten.rsub.Scalar"),
    "mul": ("operator.mul", "torch.mul", "torch.multiply", "aten.mul.Tensor", "aten.mul.Scalar"),
    "div": ("operator.truediv", "torch.div", "torch.divide", "torch.true_divide",
            "aten.div.Tensor", "aten.div.Scalar"),
    "neg": ("operator.neg", "torch.neg", "torch.negative", "aten.neg.default"),
    "pow": ("operator.pow", "torch.pow", "aten.pow.Tensor_Scalar"),
    "square": ("torch.square", "aten.square.default"),
    "sqrt": ("torch.sqrt", "aten.sqrt.default"),
    "rsqrt": ("torch.rsqrt", "aten.rsqrt.default"),
    "reciprocal": ("torch.reciprocal", "aten.reciprocal.default"),
    "mean": ("torch.mean", "aten.mean.dim"),
    "sum": ("torch.sum", "aten.sum.dim_IntList"),
    "amax": ("torch.amax", "aten.amax.default"),
    "amin": ("torch.amin", "aten.amin.default"),
    "max": ("torch.max", "aten.max.dim", "aten.max.default"),
    "aminmax": ("torch.aminmax", "aten.aminmax.default"),
    "std": ("torch.std", "aten.std.correction", "aten.std.dim"),
    "var": ("torch.var", "aten.var.correction", "aten.var.dim"),
    "var_mean": ("torch.var_mean", "aten.var_mean.correction", "aten.var_mean.dim"),
    "vector_norm": ("torch.linalg.vector_norm", "torch.linalg.norm", "torch.norm",
                    "aten.linalg_vector_norm.default"),
    "normalize": ("F.normalize",),
    "abs": ("torch.abs", "torch.absolute", "aten.abs.default", "operator.abs"),
    "clamp": ("torch.clamp", "torch.clip", "aten.clamp.default", "aten.clip.default"),
    "clamp_min": ("torch.clamp_min", "aten.clamp_min.default"),
    "clamp_max": ("torch.clamp_max", "aten.clamp_max.default"),
    "maximum": ("torch.maximum", "aten.maximum.default"),
    "minimum": ("torch.minimum", "aten.minimum.default"),
    "round": ("torch.round", "aten.round.default", "torch._refs.round"),
    "where": ("torch.where", "aten.where.self"),
    "lt": ("operator.lt", "torch.lt", "torch.less", "aten.lt.Scalar"),
    "and": ("operator.and_", "torch.bitwise_and", "aten.bitwise_and.Scalar"),
    "xor": ("operator.xor", "torch.bitwise_xor", "aten.bitwise_xor.Scalar"),
    "lshift": ("operator.lshift", "torch.bitwise_left_shift",
               "aten.bitwise_left_shift.Tensor_Scalar", "aten.__lshift__.Scalar"),
    "rshift": ("operator.rshift", "torch.bitwise_right_shift",
               "aten.bitwise_right_shift.Tensor_Scalar", "aten.__rshift__.Scalar"),
    "exp": ("torch.exp", "aten.exp.default"),
    "exp2": ("torch.exp2", "torch.special.exp2", "aten.exp2.default"),
    "sigmoid": ("torch.sigmoid", "F.sigmoid", "aten.sigmoid.default", "torch.special.expit"),
    "cos": ("torch.cos", "aten.cos.default"),
    "sin": ("torch.sin", "aten.sin.default"),
    "erf": ("torch.erf", "torch.special.erf", "aten.erf.default"),
    "tanh": ("torch.tanh", "F.tanh", "aten.tanh.default"),
    "silu": ("F.silu", "aten.silu.default"),
    "gelu": ("F.gelu", "aten.gelu.default"),
    "topk": ("torch.topk", "aten.topk.default"),
    "softmax": ("torch.softmax", "F.softmax", "aten.softmax.int"),
    "cast": ("aten._to_copy.default", "aten.to.dtype", "aten.to.device", "aten.type_as.default",
             "prims.convert_element_type.default"),
    "cat": ("torch.cat", "torch.concat", "torch.concatenate", "aten.cat.default"),
    "stack": ("torch.stack", "aten.stack.default"),
    "slice": ("aten.slice.Tensor",),
    "select": ("torch.select", "aten.select.int"),
    "narrow": ("torch.narrow", "aten.narrow.default"),
    "getitem": ("operator.getitem",),
    "chunk": ("torch.chunk", "aten.chunk.default"),
    "split": ("torch.split", "torch.functional.split", "aten.split.Tensor",
              "aten.split_with_sizes.default"),
    "unbind": ("torch.unbind", "aten.unbind.int"),
    "unsqueeze": ("torch.unsqueeze", "aten.unsqueeze.default"),
    "squeeze": ("torch.squeeze", "aten.squeeze.dim", "aten.squeeze.default"),
    "transpose": ("torch.transpose", "torch.swapaxes", "aten.transpose.int"),
    "permute": ("torch.permute", "aten.permute.default", "torch.t", "aten.t.default"),
    "reshape": ("torch.reshape", "torch.unflatten", "aten.view.default", "aten.reshape.default",
                "aten._unsafe_view.default", "aten.unflatten.int"),
    "flatten": ("torch.flatten", "aten.flatten.using_ints"),
    "expand": ("aten.expand.default",),
    "contiguous": ("aten.contiguous.default",),
    "clone": ("torch.clone", "aten.clone.default"),
    "detach": ("torch.detach", "aten.detach.default", "aten.alias.default"),
    "repeat": ("torch.tile", "aten.repeat.default"),
    "repeat_interleave": ("torch.repeat_interleave", "aten.repeat_interleave.self_int"),
    "rms_norm": ("F.rms_norm", "torch.rms_norm", "aten.rms_norm.default"),
    "layer_norm": ("F.layer_norm", "torch.layer_norm", "aten.layer_norm.default"),
    "view_as_complex": ("torch.view_as_complex", "aten.view_as_complex.default"),
    "view_as_real": ("torch.view_as_real", "aten.view_as_real.default"),
    "polar": ("torch.polar", "aten.polar.default"),
    "linear": ("F.linear", "torch._C._nn.linear", "aten.linear.default"),
    "dropout": ("F.dropout", "torch.dropout", "aten.dropout.default"),
    "addmm": ("torch.addmm", "aten.addmm.default"),
    "scaled_mm": ("torch._scaled_mm", "aten._scaled_mm.default"),
    "scaled_mm_recipes": ("torch._scaled_mm_v2", "aten._scaled_mm_v2.default"),
    "sdpa": ("F.scaled_dot_product_attention", "aten.scaled_dot_product_attention.default"),
    "matmul": ("operator.matmul", "torch.matmul", "aten.matmul.default", "torch.mm",
               "aten.mm.default"),
    "bmm": ("torch.bmm", "aten.bmm.default"),
    "int_mm": ("torch._int_mm", "aten._int_mm.default"),
    "int4pack_mm": ("aten._weight_int4pack_mm.default",),
    "einsum": ("torch.einsum",),
    "copy_": ("aten.copy_.default",),
    "or": ("operator.or_", "torch.bitwise_or", "aten.bitwise_or.Tensor"),
    "fake_quantize": ("torch.fake_quantize_per_tensor_affine",
                      "torch.fake_quantize_per_channel_affine"),
    "empty": ("torch.empty", "torch.empty_like", "aten.empty.memory_format",
              "aten.new_empty.default", "aten.empty_like.default"),
}  # fmt: skip


CALLED = "called_operator"
"""The kind of every operator of this package, which a program may call by name."""

_LATE = {
    "quantized_decomposed::quantize_per_tensor": "quantize_per_tensor",
    "quantized_decomposed::quantize_per_token": "quantize_per_token",
    "quantized_decomposed::quantize_per_channel": "quantize_per_channel",
    "quantized_decomposed::quantize_per_channel_group": "quantize_per_channel_group",
    "torchao::quantize_affine": "quantize_affine",
    "aten::_weight_int4pack_mm": "int4pack_mm",
    "aten::fake_quantize_per_tensor_affine": "fake_quantize",
    "aten::fake_quantize_per_channel_affine": "fake_quantize",
}
"""Operators of libraries that may be imported after this table was first read, by full name."""


@lru_cache(maxsize=1)
def _by_target() -> Mapping[Callable[..., Any], str]:
    """Every function target of the table that this torch has, with its kind."""
    roots = {
        "operator": operator,
        "torch": torch,
        "F": F,
        "aten": torch.ops.aten,
        "prims": torch.ops.prims,
    }
    found: dict[Callable[..., Any], str] = {}
    for kind, names in _FUNCTIONS.items():
        for name in names:
            root, *path = name.split(".")
            target: Any = roots[root]
            for part in path:
                target = getattr(target, part, None)
                if isinstance(target, torch._ops.OpOverloadPacket):
                    found.setdefault(target, kind)
            if target is not None:
                found[target] = kind
    return found


def kind_of(op: str, target: Any) -> str | None:
    """The kind of a node with this `op` and `target`, or None if the table has none."""
    if op == "call_function":
        found = _by_target().get(target)
        if found is not None:
            return found
        name = _qualified_name(target)
        return CALLED if name.startswith("aiter_inductor::") else _LATE.get(name)
    if op == "call_method":
        return _METHODS.get(target)
    return None


def _qualified_name(target: Any) -> str:
    """`namespace::name` of an operator, without its overload; empty for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.name()).partition(".")[0]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    return ""


def named_arguments(kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of `ARGUMENTS`."""
    names = ARGUMENTS.get(kind, _UNARY)
    found = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        found[_ALIASES.get(name, name)] = value
    return found
