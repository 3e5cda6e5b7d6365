"""What looks like a rotary embedding and is none, with the sentence that says why."""

from __future__ import annotations

import pytest
import torch

from tests.patterns.raising.rope_spellings import TOKENS, D, every_two, halves, neox
from tests.patterns.rewrite_check import check_rewrite

H = D // 2


def split(x):
    return x[..., :H], x[..., H:]


def halves_not_swapped(x, cos, sin):
    a, b = split(x)
    return x * cos + torch.cat((-a, b), -1) * sin


def no_sign(x, cos, sin):
    a, b = split(x)
    return x * cos + torch.cat((b, a), -1) * sin


def both_signs(x, cos, sin):
    a, b = split(x)
    return x * cos + torch.cat((-b, -a), -1) * sin


def sin_twice(x, cos, sin):
    return neox(x, sin, sin)


def wrong_bounds(x, cos, sin):
    return x * cos + torch.cat((-x[..., 7:], x[..., :7]), -1) * sin


def wrong_step(x, cos, sin):
    return x * cos + torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2) * sin


def rotates_another(x, cos, sin):
    a, b = split(x + 1)
    return x * cos + torch.cat((-b, a), -1) * sin


def one_half_of_another(x, cos, sin):
    _, b = split(x)
    a, _ = split(x * 2)
    return x * cos + torch.cat((-b, a), -1) * sin


def cos_of_two_tables(x, cos, sin):
    a, b = split(x)
    c, s, other = cos[..., :H], sin[..., :H], (cos[..., :H] + 1)
    return torch.cat((a * c - b * s, b * other + a * s), -1)


def sines_differ(x, cos, sin):
    a, b = split(x)
    c = cos[..., :H]
    return torch.cat((a * c - b * sin[..., :H], b * c + a * sin[..., H:]), -1)


def table_halves_swapped(x, cos, sin):
    a, b = split(x)
    return torch.cat((a * cos[..., H:] - b * sin[..., H:], b * cos[..., :H] + a * sin[..., :H]), -1)


def halves_exchanged_behind(x, cos, sin):
    a, b = split(x)
    c, s = cos[..., :H], sin[..., :H]
    return torch.cat((b * c + a * s, a * c - b * s), -1)


def both_subtracted(x, cos, sin):
    a, b = split(x)
    c, s = cos[..., :H], sin[..., :H]
    return torch.cat((a * c - b * s, b * c - a * s), -1)


def times_x_itself(x, cos, sin):
    a, b = split(x)
    return x * x + torch.cat((-b, a), -1) * sin


def conjugated(x, cos, sin):
    table = torch.complex(cos[..., :H], sin[..., :H]).conj()
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table).flatten(-2)


MISSES = {
    halves_not_swapped: "element 0 of add reads l_x_[0] twice",
    no_sign: "element 8 is +l_x_[8]·l_cos_[8] +l_x_[0]·l_sin_[8], "
    "where a rotation has l_x_[8]·cos - l_x_[0]·sin",
    both_signs: "element 8 is +l_x_[8]·l_cos_[8] -l_x_[0]·l_sin_[8], "
    "where a rotation has l_x_[8]·cos + l_x_[0]·sin",
    sin_twice: "cos and sin are both l_sin_",
    wrong_bounds: "element 0 is +l_x_[0]·l_cos_[0] -l_x_[7]·l_sin_[0], "
    "where a rotation has l_x_[0]·cos - l_x_[8]·sin",
    wrong_step: "element 0 of add reads l_x_[0] twice",
    rotates_another: "element 0 of add_1 has no factor from l_x_",
    one_half_of_another: "element 8 of add has no factor from l_x_",
    cos_of_two_tables: "cos is read as l_cos_[0], l_cos_[1], l_cos_[2], l_cos_[3], l_cos_[4], "
    "l_cos_[5], ..., which is no table's order",
    sines_differ: "cos is 8 wide but sin is 16",
    table_halves_swapped: "cos is read as l_cos_[8], l_cos_[9]",
    halves_exchanged_behind: "element 8 is +l_x_[0]·l_cos_[0] -l_x_[8]·l_sin_[0]",
    both_subtracted: "element 8 is +l_x_[8]·l_cos_[0] -l_x_[0]·l_sin_[0], "
    "where a rotation has l_x_[8]·cos + l_x_[0]·sin",
    times_x_itself: "element 0 of add has both factors from l_x_",
}


def sample():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, TOKENS, D, generator=generator)
    cos, sin = torch.rand(2, TOKENS, D, generator=generator)
    return x, cos, sin


@pytest.mark.parametrize("program", MISSES, ids=lambda program: program.__name__)
def test_near_miss_says_why(program):
    result = check_rewrite(program, *sample(), expect={}, inserted=0)
    reasons = [miss.reason for miss in result.misses if miss.pattern == "rope"]
    assert any(MISSES[program] in reason for reason in reasons), reasons


def product_rounded_before_the_sum(x, cos, sin):
    a, b = split(x)
    return (x * cos).bfloat16() + (torch.cat((-b, a), -1) * sin).bfloat16()


def scaled_product(x, cos, sin):
    a, b = split(x)
    return x * cos * 0.5 + torch.cat((-b, a), -1) * sin


def mixture(x, cos, sin):
    a, b = split(x)
    return a * cos[..., :H] + b * sin[..., :H]


def affine(x, cos, sin):
    return x * cos + x * sin


def shifted(x, cos, sin):
    return x * cos + torch.roll(x, 1, -1) * sin


def residual(x, cos, sin):
    return x * 2 + x[..., :1] * sin


@pytest.mark.parametrize(
    "program",
    [
        product_rounded_before_the_sum,
        scaled_product,
        mixture,
        affine,
        shifted,
        residual,
        conjugated,
    ],
    ids=lambda program: program.__name__,
)
def test_no_false_positive(program):
    check_rewrite(program, *sample(), expect={}, inserted=0)


@pytest.mark.parametrize("width", [3, 7, 15])
def test_odd_widths(width):
    def program(x, cos, sin):
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return x * cos + torch.cat((-b, a), -1) * sin

    x, cos, sin = (t[..., :width].contiguous() for t in sample())
    result = check_rewrite(program, x, cos, sin, expect={}, inserted=0)
    assert result.misses[0].reason == (
        f"{width} leading elements of add are sums of two products, not pairs"
    )


def test_open_head_size():
    result = check_rewrite(neox, *sample(), expect={}, inserted=0, dynamic=True)
    (miss,) = (miss for miss in result.misses if miss.pattern == "rope")
    assert miss.reason.startswith("head_dim s")
    assert miss.reason.endswith("of add is not known when compiling")


def test_trained_tables_keep_their_gradient():
    x, cos, sin = sample()
    result = check_rewrite(
        neox, x.requires_grad_(), cos.requires_grad_(), sin, expect={}, inserted=0, backward=True
    )
    assert "l_cos_ requires grad and rope has none for its tables" in result.reasons()


def test_result_of_another_size_than_x():
    """Tables for several batches at once: no tensor is as large as the result."""
    x, cos, sin = sample()
    cos, sin = (t.expand(2, 1, TOKENS, D).contiguous() for t in (cos, sin))
    result = check_rewrite(neox, x[:1], cos, sin, expect={}, inserted=0)
    assert "add mixes elements of l_x_, l_cos_, l_sin_" in result.reasons()[0]


def test_intermediate_that_is_returned():
    def program(x, cos, sin):
        a, b = split(x)
        rotated = torch.cat((-b, a), -1)
        return x * cos + rotated * sin, rotated

    result = check_rewrite(program, *sample(), expect={"rope": 1}, inserted=0)
    assert result.reasons() == ["intermediate rotated has 2 users, 1 of them outside (output)"]


def test_x_written_to_in_between():
    def program(x, cos, sin):
        x = x * 1.5
        scaled = x * cos
        x.mul_(2)
        a, b = split(x)
        return scaled + torch.cat((-b, a), -1) * sin

    result = check_rewrite(program, *sample(), expect={"rope": 1}, inserted=0)
    assert "mul_ writes to what it reads" in result.reasons()[0]


def test_widened_copy_written_to_before():
    def program(x, cos, sin):
        f = x.float()
        f.mul_(2)
        return neox(f, cos, sin).to(x.dtype)

    x, cos, sin = sample()
    result = check_rewrite(program, x.bfloat16(), cos, sin, expect={"rope": 1}, inserted=0)
    assert "mul_ writes to what it reads" in result.reasons()[0]


def test_passed_through_first_rotates_the_slice():
    """The op passes trailing elements only; what is rotated is still taken."""

    def program(x, cos, sin):
        return torch.cat((x[..., :4], neox(x[..., 4:], cos[..., 4:], sin[..., 4:])), -1)

    result = check_rewrite(program, *sample(), expect={"rope": 1})
    assert result.decisions[0].match.outputs[0].node.name == "add"


def test_passed_through_in_another_order():
    def program(x, cos, sin):
        return torch.cat(
            (every_two(x[..., :8], cos[..., :8], sin[..., :8]), x[..., 8:].flip(-1)), -1
        )

    result = check_rewrite(program, *sample(), expect={"rope": 1})
    assert "rotary_dim" not in result.decisions[0].match.kwargs


def test_detached_input_gets_no_gradient():
    def program(x, cos, sin):
        return halves(x.detach(), cos[..., :H], sin[..., :H]) * x

    x, cos, sin = sample()
    check_rewrite(program, x.requires_grad_(), cos, sin, expect={"rope": 1}, backward=True)
