"""A graph as recognisers see it: kinds instead of spellings, with facts from fake values.

Works on Dynamo's graph and on ATen graphs alike. Nothing here changes the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from aiter_inductor.core import kinds
from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.problem import Dim, dim

TRANSPARENT = frozenset({"contiguous", "clone"})
RESHAPES = frozenset({"reshape", "flatten", "unsqueeze", "squeeze"})
"""Views that keep all elements in their order."""
VIEWS = RESHAPES | {"transpose", "permute", "expand", "slice"}
PIECES = frozenset({"select", "getitem", "chunk", "split", "detach", "narrow", "unbind"})
"""Views of a part, and what takes one of several."""


def value(node: object) -> Any:
    """The fake value a node stands for: a tensor, a SymInt, a SymFloat, a tuple, or None."""
    if not isinstance(node, fx.Node):
        return node
    found = node.meta.get("val")
    return node.meta.get("example_value") if found is None else found


def tensor(node: object) -> torch.Tensor | None:
    """The fake tensor behind `node`, or None if it is no tensor."""
    found = value(node) if isinstance(node, fx.Node) else None
    return found if isinstance(found, torch.Tensor) else None


def kind(node: object) -> str | None:
    """What `node` computes, by the names of `kinds`; None for anything not in that table.

    `view(dtype)`, which keeps bits and not values, is a `bit_cast` and no reshape.
    """
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_function" and "out" in node.kwargs:
        return None
    found = kinds.kind_of(node.op, node.target)
    if found in ("add", "sub", "rsub") and node.kwargs.get("alpha", 1) != 1:
        return None
    if found == "div" and node.kwargs.get("rounding_mode") is not None:
        return None
    if found == "cast" and not _is_cast(node):
        return None
    return "bit_cast" if found == "reshape" and _changes_dtype(node) else found


def arg(node: fx.Node, name: str, default: Any = None) -> Any:
    """One argument of a node that has a kind, by name."""
    found = kind(node)
    if found is None:
        return default
    return kinds.named_arguments(found, node.args, node.kwargs).get(name, default)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """One argument of any call, by place or by name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def source(node: fx.Node) -> Any:
    """The first operand of a node that has a kind."""
    return arg(node, "input")


def operands(node: object, expected: str) -> tuple[Any, Any] | None:
    """Both operands of a binary node of kind `expected`, else None."""
    if not isinstance(node, fx.Node) or kind(node) != expected:
        return None
    left, right = arg(node, "input"), arg(node, "other")
    return None if left is None or right is None else (left, right)


def commuted(node: object, expected: str) -> Iterator[tuple[Any, Any]]:
    """Both orders of the operands of a commutative node; nothing if it is of another kind."""
    if pair := operands(node, expected):
        yield pair
        yield pair[1], pair[0]


def dtype(node: object) -> torch.dtype | None:
    """The dtype of a tensor node, else None."""
    found = tensor(node)
    return None if found is None else found.dtype


def dtype_name(node: object) -> str:
    """The dtype of a tensor node as sentences show it, `bfloat16`."""
    found = dtype(node)
    return "no tensor" if found is None else short_name(found)


def ndim(node: object) -> int:
    """Number of dimensions of a tensor node, -1 for anything else."""
    found = tensor(node)
    return -1 if found is None else found.dim()


def size(node: object, index: int) -> Dim:
    """One size of a tensor node, symbolic ones as sympy expressions; None where there is none."""
    found = tensor(node)
    if found is None or not -found.dim() <= index < found.dim():
        return None
    return dim(found.shape[index])


def sizes(node: object) -> tuple[Dim, ...] | None:
    """All sizes of a tensor node, without guards."""
    found = tensor(node)
    return None if found is None else tuple(dim(s) for s in found.shape)


def same_sizes(left: object, right: object) -> bool:
    """Whether two tensor nodes have provably equal shapes."""
    a, b = sizes(left), sizes(right)
    return a is not None and a == b


def is_last_dim(dims: object, of: object) -> bool:
    """Whether `dims` (an int, or a sequence of one) names the last dimension of tensor `of`."""
    if isinstance(dims, Sequence) and not isinstance(dims, str):
        dims = dims[0] if len(dims) == 1 else None
    return isinstance(dims, int) and dims in (-1, ndim(of) - 1)


def number(operand: object) -> float | None:
    """A Python number, however the graph holds it; None if `operand` is not one.

    With `dynamic=True` Dynamo hands over float attributes as SymFloats. Reading one specialises
    the graph on its value, exactly as the kernels need it.
    """
    if isinstance(operand, bool):
        return None
    if isinstance(operand, int | float):
        return float(operand)
    if isinstance(operand, fx.Node):
        found = value(operand)
        if isinstance(found, torch.SymFloat | float | int) and not isinstance(found, bool):
            return float(found)
        if isinstance(found, torch.Tensor) and operand.op == "call_function":
            return _filled_scalar(operand)
    return None


def skip(node: Any, through: frozenset[str]) -> Any:
    """`node`, or the first node before it whose kind is not in `through`."""
    while isinstance(node, fx.Node) and kind(node) in through:
        node = source(node)
    return node


def widens(cast: fx.Node) -> bool:
    """Whether a cast loses nothing: the same dtype, or fp32 and above from a narrower float."""
    before, after = dtype(source(cast)), dtype(cast)
    if before is None or after is None or not before.is_floating_point:
        return False
    return before == after or (before.itemsize < after.itemsize and after.itemsize >= 4)


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of `node`, or None if it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def module_path(node: fx.Node) -> str:
    """The module that `node` belongs to, `model.layers.0.input_layernorm`; empty at the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return clean_path(next(reversed(stack.values()))[0])


def clean_path(path: str) -> str:
    """`model.norm` for Dynamo's `L['self']._modules['model']._modules['norm']` and its kin."""
    path = path.replace("L['self']", "").replace("L['fn']", "").replace("._modules", "")
    path = path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return path.strip(".")


def _is_cast(node: fx.Node) -> bool:
    """`.to(...)` is a cast only if it keeps the device; `.type()` without argument is a query."""
    before, after = tensor(node.args[0]) if node.args else None, tensor(node)
    return before is not None and after is not None and before.device == after.device


def _changes_dtype(node: fx.Node) -> bool:
    before, after = dtype(node.args[0]) if node.args else None, dtype(node)
    return before is not None and after is not None and before != after


def _filled_scalar(node: fx.Node) -> float | None:
    """The number in `torch.tensor(3.0)` and its kin, if `node` is one of those."""
    name = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
    filled = node.target in (
        torch.tensor,
        torch.scalar_tensor,
        torch.ops.aten.scalar_tensor.default,
    )
    # Under dynamic=True Dynamo writes torch.tensor of a float attribute with torch._refs.
    if filled or name == "torch._refs.tensor":
        return number(node.args[0]) if node.args else None
    return None
