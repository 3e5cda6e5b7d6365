"""What training keeps from forward to backward must not grow because an op was raised.

The partitioner decides from the joint graph, so nothing has to run: Inductor is stopped once it has
split the graph, with the kernels of a chip that is not here in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from triton.backends.compiler import GPUTarget

import aiter_inductor
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Op, Provider, Selection, Use, accept
from tests.models import zoo

TARGET = "gfx942"


class Split(Exception):
    """Raised to stop where the graph is split."""


class Recorder(CustomPartitionerFn):
    """Inductor's own partitioner; remembers what the backward graph is given."""

    saved: dict[str, torch.Tensor]
    kernels: int

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **options)
        inputs = {node.name for node in forward.graph.find_nodes(op="placeholder")}
        given = [
            node
            for node in backward.graph.find_nodes(op="placeholder")
            if node.name not in inputs and not node.name.startswith("tangents")
        ]
        self.saved = {n.name: v for n in given if isinstance(v := n.meta["val"], torch.Tensor)}
        self.kernels = len([n for n in forward.graph.nodes if "triton_kernel" in str(n.target)])
        raise Split

    def uuid(self) -> None:
        """None: no cache may answer in its place."""

    def layouts(self) -> Counter[tuple[torch.dtype, torch.Size]]:
        return Counter((tensor.dtype, tensor.shape) for tensor in self.saved.values())

    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.saved.values())


class AbsentChip:
    """Triton's driver as far as reading a kernel's source for what it writes takes it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", TARGET, 64)


@pytest.fixture
def absent_chip() -> Iterator[None]:
    driver = triton.runtime.driver
    with mock.patch.object(type(driver), "active", AbsentChip()):
        yield


def with_triton(made: Op, problem: Any, use: Use) -> Selection:
    """Triton's kernel for `TARGET` wherever it can run."""
    if use.training and not made.differentiable:
        return Selection(None, "not differentiable")
    kernel = made.providers["triton"]
    reason = kernel.refuse(problem, Use(arch_named(TARGET), use.training))
    return Selection(None, reason) if reason else Selection(kernel, "it can")


def with_reference(made: Op, problem: Any, use: Use) -> Selection:
    """The reference, which Inductor compiles along with what is around it.

    That of attention writes every probability out, which no kernel does.
    """
    if made.name == "attention_with_lse":
        return Selection(None, "kept whole")
    if use.training and not made.differentiable:
        return Selection(None, "not differentiable")
    return Selection(
        Provider("reference", made.reference, None, accept, accept, traceable=True), "it always can"
    )


def split(model: torch.nn.Module, ids: torch.Tensor, backend: str) -> Recorder:
    torch._dynamo.reset()
    recorder = Recorder()
    compiled = torch.compile(
        model, backend=backend, options={"custom_partitioner_fn": recorder}, fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Split"):
        compiled(ids, labels=ids, use_cache=False)
    return recorder


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_no_more_is_saved(name: str, absent_chip: None) -> None:
    model, ids = zoo.build(name, dtype=torch.bfloat16).train(), zoo.token_ids(2, 64)
    plain = split(model, ids, "inductor")
    with mock.patch.object(Op, "select", with_reference):
        raised = split(model, ids, "aiter")
        assert aiter_inductor.report(model).count("rms_norm", "fused") > 0
    with mock.patch.object(Op, "select", with_triton):
        kernels = split(model, ids, "aiter")
    assert kernels.kernels > 5
    assert raised.layouts() == plain.layouts()
    # Kernels keep cos and sin, once for all layers; in return no norm keeps its reciprocal root.
    # Bytes: llama 501780 against 500244, gemma3 616468 against 623124, qwen3 735252 and 735764.
    tables_bytes = 2 * ids.shape[1] * model.config.head_dim * torch.bfloat16.itemsize
    assert kernels.size_bytes() <= plain.size_bytes() + tables_bytes
