"""Rotary ops: the references against models' own code, gradients, tracing and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.rope import qk_norm_rope, rope, rope_qk
from aiter_inductor.lowerings.rope_problem import RopeProblem
from tests.lowerings.checks import assert_close, assert_same_layout, opcheck

B, H, S, D = 2, 4, 5, 16
BF16 = torch.bfloat16
PROBLEM = RopeProblem(
    batch=B,
    num_tokens=S,
    num_heads=H,
    num_kv_heads=2,
    head_dim=D,
    rotary_dim=D,
    table_batch=1,
    table_width=D,
    dtype=BF16,
    kv_dtype=BF16,
    table_dtype=BF16,
    out_dtype=BF16,
)
INTERLEAVED = {"interleaved_in": True, "interleaved_out": True}


def heads(width=D, batch=B, tokens=S, dtype=BF16):
    return torch.randn(batch, tokens, H, width).to(dtype).transpose(1, 2)


def tables(width, dtype=BF16):
    angle = 6 * torch.rand(1, 1, S, width)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def llama(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def gpt_j(x, cos, sin):
    return x * cos + rotate_every_two(x) * sin


def gpt_oss(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def deepseek_v3(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def deepseek_v2(x, cos, sin):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(3).type_as(x)


def glm_partial(x, cos, sin):
    R = cos.shape[-1]
    return torch.cat((gpt_j(x[..., :R], cos, sin), x[..., R:]), -1)


FORMULAS = {
    "llama": (llama, D, BF16, {}),
    "olmo2": (lambda x, c, s: llama(x, c, s).to(x.dtype), D, torch.float32, {"out_dtype": BF16}),
    "fp32 tables": (llama, D, torch.float32, {}),
    "gpt_j": (gpt_j, D, BF16, INTERLEAVED),
    "gpt_oss": (gpt_oss, D // 2, BF16, {}),
    "deepseek_v3": (deepseek_v3, D // 2, BF16, {"interleaved_in": True}),
    "deepseek_v2": (deepseek_v2, D // 2, torch.float32, INTERLEAVED | {"out_dtype": BF16}),
    "glm": (glm_partial, D // 2, BF16, INTERLEAVED | {"rotary_dim": D // 2}),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut out of wider heads"])
@pytest.mark.parametrize("tokens", [S, 1])
def test_reference_is_the_models_formula(name, cut, tokens):
    formula, width, dtype, style = FORMULAS[name]
    x = heads(2 * D, tokens=tokens)[..., D:] if cut else heads(tokens=tokens)
    cos, sin = (t[:, :, :tokens] for t in tables(width, dtype))
    expected = formula(x, cos, sin)
    actual = rope.reference(x, cos, sin, **style)
    assert_close(actual, expected, loosen=2.0)  # models round three times, the reference once
    assert_same_layout(actual, expected)


@pytest.mark.parametrize("width", [D, D // 2])
@pytest.mark.parametrize("interleaved_in", [False, True])
@pytest.mark.parametrize("interleaved_out", [False, True])
def test_transposed_undoes_the_rotation(width, interleaved_in, interleaved_out):
    x = heads(dtype=torch.float64)
    angle = torch.rand(1, 1, S, D // 2, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    if width == D:
        cos, sin = (
            torch.stack((t, t), -1).flatten(-2) if interleaved_out else torch.cat((t, t), -1)
            for t in (cos, sin)
        )
    there = rope.reference(
        x, cos, sin, interleaved_in=interleaved_in, interleaved_out=interleaved_out
    )
    back = rope.reference(
        there,
        cos,
        sin,
        interleaved_in=interleaved_out,
        interleaved_out=interleaved_in,
        transposed=True,
    )
    torch.testing.assert_close(back, x)


STYLES = [
    {"interleaved_in": i, "interleaved_out": o, "rotary_dim": r}
    for i in (False, True)
    for o in (False, True)
    for r in (None, 8)
]


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_gradients(style, half):
    width = (style["rotary_dim"] or D) // (2 if half else 1)
    q, k = heads(dtype=torch.float64), heads(dtype=torch.float64)[:, :1]
    table = torch.rand(2, 1, 1, S, width, dtype=torch.float64).unbind()
    gradcheck_first(rope, 1, q, *table, style)
    gradcheck_first(rope_qk, 2, q, k, *table, style)


def gradcheck_first(op, count, *args_and_style):
    """Gradients by the first `count` arguments; tables get none."""
    *args, style = args_and_style
    fixed = args[count:]
    inputs = [x.detach().clone().requires_grad_() for x in args[:count]]
    assert torch.autograd.gradcheck(lambda *given: op(*given, *fixed, **style), inputs)


def test_gradient_of_one_output_and_of_fp32_tables():
    q, k = (heads().requires_grad_() for _ in range(2))
    cos, sin = tables(D, torch.float32)
    rope_qk(q, k, cos, sin, out_dtype=BF16)[0].sum().backward()
    expected = rope.reference(torch.ones_like(q), cos, sin, transposed=True, out_dtype=BF16)
    assert_close(q.grad, expected)
    assert q.grad.dtype == BF16
    assert not k.grad.any()


@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        replace(PROBLEM, interleaved_in=True, table_width=D // 2, num_tokens=1),
        replace(PROBLEM, rotary_dim=8, table_width=8, table_dtype=torch.float32),
        replace(PROBLEM, num_tokens=0),
    ],
    ids=["neox", "decode", "partial", "empty"],
)
def test_opcheck(problem):
    (q, k, cos, sin), style = problem.sample(seed=0, device="cpu")
    opcheck(rope, (q.requires_grad_(), cos, sin), style)
    opcheck(rope_qk, (q, k.requires_grad_(), cos, sin), style)
    weights = torch.ones(2, D).unbind()
    style.pop("transposed")
    opcheck(qk_norm_rope, (q.detach(), k.detach(), *weights, cos, sin, 1e-6), style)


@pytest.mark.parametrize("op", [rope_qk, qk_norm_rope], ids=str)
def test_provider_traces_with_symbolic_tokens(op):
    problem = PROBLEM if op is rope_qk else replace(PROBLEM, weight_dtype=BF16)
    args, style = problem.sample(seed=0, device="cpu")
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    rest = args[len(tensors) :]
    run = op.providers["triton"].run
    traced = make_fx(lambda *given: run(*given, *rest, **style), tracing_mode="symbolic")(*tensors)
    kernels = [n for n in traced.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(kernels) == 1
    free = {str(s) for g in traced.shape_env.guards for s in g.expr.free_symbols}
    q = next(n.meta["val"] for n in traced.graph.nodes if n.op == "placeholder")
    assert str(q.shape[2].node.expr) not in free, "the number of tokens got a guard"


REFUSALS = {
    "float64": (replace(PROBLEM, dtype=torch.float64), "x is float64"),
    "two dtypes": (replace(PROBLEM, kv_dtype=torch.float16), "q is bfloat16 but k is float16"),
    "wide": (replace(PROBLEM, head_dim=2048), "head_dim=2048 is outside 1 to 1024"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    problem, sentence = REFUSALS[name]
    assert sentence in rope_qk.select(problem, Use(arch_named("gfx950"))).reason


def test_refusals_of_tensors():
    q, k = heads(), heads()
    cos, sin = tables(D)
    cases = [
        ((q[..., ::2], k[..., ::2], *tables(8)), "the last stride of q is 2"),
        ((q[None], k[None], cos, sin), "q has 5 dimensions"),
        ((q, k[:1], cos, sin), "k has sizes (1, 4, 5) before head_dim but q has (2, 4, 5)"),
        ((q, k, cos, sin[..., :8]), "cos is bfloat16[1, 1, 5, 16] but sin is bfloat16[1, 1, 5, 8]"),
        ((q, k, *(t.expand(1, H, S, D) for t in (cos, sin))), "so heads do not share it"),
    ]
    for args, sentence in cases:
        selection = rope_qk.select(rope_qk.problem(*args), Use(arch_named("sm_90")))
        assert selection.provider is None
        assert sentence in selection.reason
    weights = torch.ones(D), torch.ones(2 * D)[::2]
    problem = qk_norm_rope.problem(q, k, *weights, cos, sin, 1e-6)
    reason = qk_norm_rope.select(problem, Use(arch_named("sm_90"))).reason
    assert "k_weight has stride 2" in reason


def test_unfit_widths_are_errors():
    with pytest.raises(ValueError, match="neither rotary_dim=16 nor half"):
        rope.reference(heads(), *tables(6))
    with pytest.raises(ValueError, match="rotary_dim=7 is not an even number"):
        rope.reference(heads(), *tables(7), rotary_dim=7)


def test_bytes_and_columns():
    heads_bytes = 2 * B * S * (H + 2) * D * 2
    assert PROBLEM.bytes_moved() == heads_bytes + 2 * S * D * 2
    again = RopeProblem.of_rope_qk(*PROBLEM.sample(seed=1, device="cpu")[0])
    assert again == PROBLEM
