"""Where patterns ought to be, by the program's own names, independently of any recogniser.

A module whose class is called `...RMSNorm` computes an RMSNorm; a function called
`apply_rotary_...` rotates each tensor it returns; a cast to fp8 or int8 that a scale feeds
quantises; a linear whose weight comes from a parameter in fp8 or int8, or is one of torchao's,
multiplies quantised numbers; `scaled_dot_product_attention` attends, and so does a softmax of a
module called `...Attention...` whose result multiplies something. These are the sites that count as
missed when no recogniser claims them, so a new spelling shows up as a gap and not as silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

import torch
from torch import fx

from aiter_inductor.core.expected_quant import multiplies_quantised, quantisation_at
from aiter_inductor.core.graph import (
    TRANSPARENT,
    VIEWS,
    arg,
    clean_path,
    is_last_dim,
    kind,
    module_path,
    ndim,
    value,
)

_CLASSES = (
    ("rms_norm", re.compile(r"(RMSNorm|RmsNorm|L2Norm|T5LayerNorm)\w*$")),
    ("layer_norm", re.compile(r"LayerNorm(Fp32)?$")),
)
_FUNCTIONS = (("rope", re.compile(r"^_?apply_(\w+_)?(rotary|rope)")),)
_ATTENTION = re.compile(r"Attention|Attn")
_OF_PROBABILITIES = TRANSPARENT | VIEWS | {"cast", "dropout", "getitem"}
_PRODUCTS = frozenset({"matmul", "bmm", "einsum"})
_ALSO = {"layer_norm": "rms_norm", "attention": "mla_decode"}
"""What else a name may stand for: T5 and its kin call an RMSNorm `...LayerNorm`."""

_TORCH = str(PurePath(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@dataclass
class Region:
    """The nodes of one call of a module or function that is named after a pattern.

    Attributes:
        pattern: what the name promises; `quant` for any of the quantisations.
        module: path of the module.
        nodes: its nodes in graph order.
    """

    pattern: str
    module: str
    nodes: dict[fx.Node, None] = field(default_factory=dict)

    def covers(self, pattern: str) -> bool:
        """Whether a site of `pattern` is what the region promises."""
        named = pattern in (self.pattern, _ALSO.get(self.pattern))
        return named or pattern.startswith(f"{self.pattern}_")

    def number(self) -> int:
        """How many sites it should hold: one a module call, one a tensor a function returns."""
        if self.pattern != "rope":
            return 1
        return max(1, sum(map(self._leaves, self.nodes)))

    def _leaves(self, node: fx.Node) -> bool:
        is_tensor = isinstance(value(node), torch.Tensor)
        return is_tensor and any(user not in self.nodes for user in node.users)


def regions(graph: fx.Graph) -> list[Region]:
    """Every region of the graph, in the order of its first node."""
    found: dict[tuple[str, ...], Region] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        for pattern, key, module in _claims(node):
            found.setdefault((pattern, *key), Region(pattern, module)).nodes[node] = None
        if cast := quantisation_at(node):
            region = Region("quant", module_path(node), dict.fromkeys(cast))
            found["quant", node.name] = region
        if attends := attention_at(node):
            found["attention", node.name] = Region(
                "attention", module_path(node), dict.fromkeys(attends)
            )
        if multiplies_quantised(node):
            found["gemm", node.name] = Region("gemm", module_path(node), {node: None})
    return list(found.values())


def attention_at(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes from a softmax over keys to its product with the values, or sdpa; else none."""
    if kind(node) == "sdpa":
        return (node,)
    scored = kind(node) == "softmax" and ndim(node) > 2 and is_last_dim(arg(node, "dim"), node)
    if not scored or not any(_ATTENTION.search(name) for _, name in _classes(node)):
        return ()
    passed, pending = [node], list(node.users)
    while pending:
        user = pending.pop()
        if kind(user) in _PRODUCTS:
            return (*passed, user)
        if kind(user) in _OF_PROBABILITIES:
            passed.append(user)
            pending += user.users
    return ()


def source_line(node: fx.Node) -> str:
    """`modeling_llama.py:61` for the line of the program that made `node`; empty if unknown.

    Lines of torch itself, as of the module `torch.nn.RMSNorm`, are passed over for their caller.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    theirs = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    file, line, _ = (theirs or frames)[-1]
    return f"{PurePath(file).name}:{line}"


def _classes(node: fx.Node) -> Iterator[tuple[tuple[str, str], str]]:
    """`((key, path), class name)` of the modules that `node` was called in, the outermost first."""
    for key, (path, cls) in (node.meta.get("nn_module_stack") or {}).items():
        name = cls if isinstance(cls, str) else cls.__name__
        yield (str(key), str(path)), name.rsplit(".", 1)[-1]


def _claims(node: fx.Node) -> Iterator[tuple[str, tuple[str, ...], str]]:
    for (key, path), name in _classes(node):
        for pattern, expression in _CLASSES:
            if expression.search(name):
                yield pattern, (key, path), clean_path(path)
                break
    trace = node.meta.get("stack_trace") or ""
    if ", in " not in trace:
        return
    frames = _FRAME.findall(trace)
    for i, (_, _, function) in enumerate(frames):
        for pattern, expression in _FUNCTIONS:
            if expression.search(function):
                caller = frames[i - 1][1] if i else ""
                module = module_path(node)
                yield pattern, (module, function, caller), module
                return
