"""Every spelling of a rotary embedding is recognised, with the right arguments and numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from aiter_inductor.core.match import Match
from aiter_inductor.patterns.raising.rope import rotary_embedding
from tests.patterns.raising import rope_spellings as spelled
from tests.patterns.raising.rope_spellings import HEADS, SPELLINGS, TOKENS, D, Spelling
from tests.patterns.rewrite_check import Rewritten, check_rewrite

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODES = ("static", "mark_dynamic", "dynamic")
COMPLEX = ("as_complex", "as_complex_commuted")


class Heads(nn.Module):
    """A projection to heads in front of a rotation: sizes and strides as models have them."""

    def __init__(self, spelling: Spelling, dtype: torch.dtype, transposed: bool = True) -> None:
        super().__init__()
        self.spelling = spelling
        self.transposed = transposed
        self.proj = nn.Linear(8, HEADS * D, dtype=dtype)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.proj(hidden).view(*hidden.shape[:-1], HEADS, D)
        if self.transposed:
            return self.spelling.rotate(x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))
        return self.spelling.rotate(x, cos.unsqueeze(2), sin.unsqueeze(2))


def tables(width: int, dtype: torch.dtype, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(2, 1, TOKENS, width, generator=generator) * 2 - 1
    return angle[0].to(dtype), angle[1].to(dtype)


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(3, TOKENS, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    table_dtype = torch.float32 if name in COMPLEX else dtype
    return hidden, *tables(SPELLINGS[name].width, table_dtype)


def only_match(result: Rewritten) -> Match:
    (decision,) = result.decisions
    assert decision.provider is not None, decision.reason
    return decision.match


def refuses_strides(name: str) -> bool:
    """These concatenate or put the rotated half first, so x's strides are not the result's."""
    return name in ("neox_commuted", "pairs_in_fp32")


CASES = [
    (name, DTYPES[i % 3], MODES[i // 3 % 3])
    for i, name in enumerate(itertools.chain(SPELLINGS, SPELLINGS, SPELLINGS))
]


@pytest.mark.parametrize(("name", "dtype", "mode"), CASES)
def test_spelling_is_rotated_by_the_op(name, dtype, mode):
    spelling = SPELLINGS[name]
    hidden, cos, sin = inputs(name, dtype)
    if mode == "mark_dynamic":
        for tensor, axis in ((hidden, 0), (hidden, 1), (cos, 1), (sin, 1)):
            torch._dynamo.mark_dynamic(tensor, axis)
    model = Heads(spelling, dtype, transposed=not refuses_strides(name))
    result = check_rewrite(
        model, hidden, cos, sin, expect={"rope": 1}, dynamic=True if mode == "dynamic" else None
    )
    match = only_match(result)
    kwargs = {k: v for k, v in match.kwargs.items() if k != "out_dtype"}
    assert kwargs == spelling.kwargs
    assert match.argument("out_dtype") in (None, dtype)
    assert match.args[0].meta["example_value"].shape[-1] == D


@pytest.mark.parametrize("name", SPELLINGS)
def test_gradients_flow_through_the_op(name):
    spelling = SPELLINGS[name]
    hidden, cos, sin = inputs(name, torch.float32)
    model = Heads(spelling, torch.float32, transposed=not refuses_strides(name))
    result = check_rewrite(
        model, hidden.requires_grad_(), cos, sin, expect={"rope": 1}, backward=True
    )
    only_match(result)


@pytest.mark.parametrize("name", ["neox", "halves", "even_odd_to_halves", "every_two"])
def test_fp32_tables_and_cast_back(name):
    """OLMo2: cos and sin in fp32, the result rounded once to the model's dtype."""
    spelling = SPELLINGS[name]
    wrapped = Spelling(lambda x, cos, sin: spelling.rotate(x, cos, sin).to(x.dtype))
    hidden, *_ = inputs(name, torch.bfloat16)
    cos, sin = tables(spelling.width, torch.float32)
    result = check_rewrite(Heads(wrapped, torch.bfloat16), hidden, cos, sin, expect={"rope": 1})
    match = only_match(result)
    assert match.argument("out_dtype") == torch.bfloat16
    assert match.args[0].meta["example_value"].dtype == torch.bfloat16


def test_fp32_result_stays_fp32():
    hidden, *_ = inputs("neox", torch.bfloat16)
    cos, sin = tables(D, torch.float32)
    result = check_rewrite(
        Heads(SPELLINGS["neox"], torch.bfloat16), hidden, cos, sin, expect={"rope": 1}
    )
    assert only_match(result).argument("out_dtype") is None


def zero_width_pass(x, cos, sin):
    R = cos.shape[-1]
    return torch.cat([spelled.neox(x[..., :R], cos, sin), x[..., R:]], dim=-1)


def test_zero_width_pass_through_with_given_tables_leaves_the_copy():
    """The result is contiguous, and only half-width tables make the op's so."""
    hidden, cos, sin = inputs("neox", torch.float32)
    model = Heads(Spelling(zero_width_pass), torch.float32)
    result = check_rewrite(model, hidden, cos, sin, expect={"rope": 1})
    assert only_match(result).outputs[0].node.name == "add"


def test_zero_width_pass_through_takes_half_of_tables_that_repeat():
    """Phi-3: cos is of cat((freqs, freqs)), so its first half says it all."""

    def rotate(x, freqs, _):
        angle = torch.cat((freqs, freqs), dim=-1)
        return zero_width_pass(x, angle.cos() * 1.25, angle.sin() * 1.25)

    hidden, freqs, sin = inputs("halves", torch.float32)
    result = check_rewrite(
        Heads(Spelling(rotate), torch.float32), hidden, freqs, sin, expect={"rope": 1}
    )
    match = only_match(result)
    assert match.outputs[0].node.name == "cat_2"
    assert match.args[1].function is torch.narrow
    assert match.args[1].args[1:] == (-1, 0, D // 2)


def test_rotated_part_of_a_wider_head_keeps_its_own_view():
    """DeepSeek: q is split into a part without and a part with positions."""

    def rotate(x, cos, sin):
        nope, pe = torch.split(x, [4, 12], dim=-1)
        return torch.cat((nope, spelled.neox(pe, cos, sin)), dim=-1)

    hidden, *_ = inputs("neox", torch.float32)
    cos, sin = tables(12, torch.float32)
    result = check_rewrite(
        Heads(Spelling(rotate), torch.float32), hidden, cos, sin, expect={"rope": 1}
    )
    match = only_match(result)
    assert match.args[0].name == "pe"
    assert match.outputs[0].node.name == "add"


def test_tables_packed_in_one_tensor():
    def rotate(x, packed, _):
        cos, sin = packed.chunk(2, dim=-1)
        return spelled.halves(x, cos, sin)

    hidden, packed, sin = inputs("neox", torch.float32)
    result = check_rewrite(
        Heads(Spelling(rotate), torch.float32), hidden, packed, sin, expect={"rope": 1}
    )
    assert [node.name for node in only_match(result).args[1:]] == ["cos", "sin"]


def test_full_tables_taken_by_halves():
    """Only the first half of each table is read, and a view of it is what the op gets."""

    def rotate(x, cos, sin):
        a, b = x.chunk(2, -1)
        cos, sin = cos[..., : D // 2], sin[..., : D // 2]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    hidden, cos, sin = inputs("neox", torch.float32)
    result = check_rewrite(
        Heads(Spelling(rotate), torch.float32), hidden, cos, sin, expect={"rope": 1}
    )
    assert only_match(result).args[1].meta["example_value"].shape[-1] == D // 2


def test_two_tensors_are_two_sites():
    def both(q, k, cos, sin):
        return spelled.neox(q, cos, sin), spelled.neox(k, cos, sin)

    q, k = torch.randn(2, 1, 4, TOKENS, D).unbind()
    cos, sin = tables(D, torch.float32)
    result = check_rewrite(both, q, k, cos, sin, expect={"rope": 2})
    assert result.count() == {"rope": 2}


def test_rotating_twice_is_two_sites():
    def twice(x, cos, sin):
        return spelled.neox(spelled.halves(x, cos[..., :8], sin[..., :8]), cos, sin)

    x = torch.randn(1, 4, TOKENS, D)
    cos, sin = tables(D, torch.float32)
    check_rewrite(twice, x, cos, sin, expect={"rope": 2})


def test_grows_no_further_than_the_rotation():
    def program(x, cos, sin):
        return (spelled.neox(x, cos, sin) + 1).flatten(-2)

    x = torch.randn(1, 4, TOKENS, D)
    result = check_rewrite(program, x, *tables(D, torch.float32), expect={"rope": 1})
    assert only_match(result).outputs[0].node.name == "add"


def test_not_laid_out_as_the_op_would_is_left_with_the_strides():
    x = torch.randn(2, TOKENS, HEADS, D).transpose(1, 2)
    cos, sin = tables(D, torch.float32)
    result = check_rewrite(spelled.neox_commuted, x, cos, sin, expect={"rope": 1}, inserted=0)
    assert "strides [160, 80, 16, 1] but rope would give" in result.reasons()[0]


def test_anchors_are_the_kinds_that_add_products():
    assert rotary_embedding.anchors == {"add", "sub", "view_as_real"}
