"""Triton kernels against their references on the accelerator, at sizes too long to interpret."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core.op import Op
from aiter_inductor.lowerings.activation_problem import ActivationProblem
from aiter_inductor.lowerings.rope_cache_problem import RopeCacheProblem
from aiter_inductor.lowerings.rope_problem import RopeProblem
from aiter_inductor.lowerings.rows import RowProblem
from tests.lowerings.checks import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")

OPS = load_ops()
ROWS = ((1, 64), (7, 128), (33, 1000), (64, 7168), (300, 4096), (5, 12288), (3, 65536))
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
ROW_FAMILIES = ("norm", "norm_quant", "quant")
PACKED = "quant_int4_per_group"  # compared by value, an element may lie one step beside


def positional(op: Op) -> list[str]:
    parameters = op.signature.parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]


def row_ops() -> list[str]:
    kernels = [op for op in OPS.values() if "triton" in op.providers and op.name != PACKED]
    families = {op.name: op.reference.__module__.rpartition(".")[2] for op in kernels}
    return [name for name, family in families.items() if family in ROW_FAMILIES]


def compare(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    actual = op.providers["triton"].run(*args, **kwargs)
    assert_close(actual, op.reference(*args, **kwargs), what=op.name)


@pytest.mark.parametrize("out_dtype", [FP8, torch.int8])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("name", row_ops())
def test_rows(name, shape, group_size, out_dtype):
    op, taken = OPS[name], set(positional(OPS[name]))
    keywords = op.signature.parameters
    if "dtype" not in keywords and (group_size or out_dtype != FP8):
        pytest.skip("quantises nothing")
    if (name == "quant_per_group") != (group_size is not None) and "group_size" not in keywords:
        pytest.skip("has no groups")
    if name == "quant_per_group" and group_size is None:
        pytest.skip("has groups only")
    if shape[1] % (group_size or 1) or ("grad" in taken and shape[1] > 16384):
        pytest.skip("refused")
    problem = RowProblem(
        " ".join(positional(op)),
        *shape,
        BF16,
        residual_dtype=BF16 if {"grad", "residual"} & taken else None,
        weight_dtype=BF16 if "weight" in taken else None,
        bias_dtype=BF16 if "bias" in taken else None,
        out_dtype=out_dtype if "dtype" in keywords else BF16,
        group_size=group_size,
    )
    compare(op, *problem.sample(seed=1, device="cuda"))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("shape", [(37, 18432), (5, 1000), (0, 256), (3, 32768)], ids=str)
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("out_dtype", [BF16, FP8, torch.int8])
def test_activations(activation, shape, group_size, out_dtype):
    plain = out_dtype == BF16
    if plain and group_size:
        pytest.skip("has no groups")
    problem = ActivationProblem(
        "gate up",
        *shape,
        BF16,
        residual_dtype=BF16,
        out_dtype=out_dtype,
        group_size=group_size,
        activation=activation,
    )
    name = "act_and_mul" if plain else "act_and_mul_quant"
    compare(OPS[name], *problem.sample(seed=1, device="cuda"))


@pytest.mark.parametrize("interleaved_in", [False, True])
@pytest.mark.parametrize("interleaved_out", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "table_width"),
    [(128, 128, 128), (128, 128, 64), (96, 96, 48), (80, 64, 32)],
)
@pytest.mark.parametrize("name", ["rope_qk", "qk_norm_rope"])
def test_rotations(name, head_dim, rotary_dim, table_width, interleaved_in, interleaved_out):
    problem = RopeProblem(
        batch=3,
        num_tokens=37,
        num_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        table_batch=3,
        table_width=table_width,
        dtype=BF16,
        kv_dtype=BF16,
        table_dtype=BF16,
        out_dtype=BF16,
        weight_dtype=BF16 if name == "qk_norm_rope" else None,
        interleaved_in=interleaved_in,
        interleaved_out=interleaved_out,
    )
    compare(OPS[name], *problem.sample(seed=1, device="cuda"))


@pytest.mark.parametrize("weight_dtype", [None, BF16])
@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1), (64, 1), (3, 37)])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "table_width"), [(128, 128, 128), (128, 128, 64), (80, 64, 32)]
)
def test_rotations_into_a_cache(head_dim, rotary_dim, table_width, batch, num_tokens, weight_dtype):
    problem = RopeCacheProblem(
        *(batch, num_tokens, 32, 8, head_dim, rotary_dim, 1, table_width, BF16, BF16, BF16, BF16),
        weight_dtype=weight_dtype,
        num_slots=300,
        v_head_dim=96,
    )
    op = OPS["rope_cache_write"]
    args, kwargs = problem.sample(seed=1, device="cuda")
    found = op.outcome(op.providers["triton"].run, args, kwargs)
    assert_close(found, op.outcome(op.reference, args, kwargs), what=op.name)
