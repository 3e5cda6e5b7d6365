"""Masks understood from how they are built, and those that must be passed on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.patterns.raising.test_attention import S, arguments, heads
from tests.patterns.rewrite_check import check_rewrite


def rows_and_columns(T=S):
    return torch.arange(S)[:, None], torch.arange(T)[None, :]


def window(size):
    i, j = rows_and_columns()
    return (j > i - size) & (j <= i)


def packed(positions, *, window=None, others=None, step=1):
    """transformers' packed-sequence mask: tokens see their own sequence."""
    first = positions[:, :1] - 1
    others = positions if others is None else others
    sequence = (torch.diff(others, prepend=first, dim=-1) != step).cumsum(-1)
    b = torch.arange(positions.shape[0])[:, None, None, None]
    i, j = torch.arange(S)[None, None, :, None], torch.arange(S)[None, None, None, :]
    seen = (sequence[b, i] == sequence[b, j]) & (positions[b, j] <= positions[b, i])
    return seen if window is None else seen & (positions[b, j] > positions[b, i] - window)


def same_sequence():
    """As torch 2.11's Dynamo writes `==`."""
    sequence = torch.arange(S) - torch.arange(S)
    return sequence[:, None].__eq__(sequence)


UNDERSTOOD = {
    "tril": (lambda: torch.ones(S, S, dtype=torch.bool).tril(), "top_left", None),
    "not triu": (
        lambda: ~torch.triu(torch.ones(S, S, dtype=torch.bool), diagonal=1),
        "top_left",
        None,
    ),
    "le": (lambda: torch.le(*reversed(rows_and_columns())), "top_left", None),
    "gt, swapped": (lambda: torch.arange(S)[:, None] + 1 > torch.arange(S), "top_left", None),
    "comparison methods": (
        lambda: rows_and_columns()[1].__le__(rows_and_columns()[0]).__and__(same_sequence()),
        "top_left",
        None,
    ),
    "window": (lambda: window(3), "top_left", 3),
    "window as long as the sequence": (lambda: window(S), "top_left", None),
    "everything": (lambda: torch.ones(S, S, dtype=torch.bool), "none", None),
    "minus infinity": (
        lambda: torch.zeros(S, S).masked_fill(
            torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf")
        ),
        "top_left",
        None,
    ),
    "positions by default": (
        lambda: packed((torch.arange(S) + 0).unsqueeze(0).expand(2, -1)),
        "top_left",
        None,
    ),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_understood(case):
    build, causal, size = UNDERSTOOD[case]

    def run(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(), enable_gqa=True)

    found = arguments(check_rewrite(run, *heads(), expect={"attention": 1}))
    assert found["mask"] is None
    assert (found["causal"], found["window"]) == (causal, size)


@pytest.mark.parametrize(
    "T, shift, causal", [(9, 3, "bottom_right"), (9, 0, "top_left"), (4, 0, "top_left")]
)
def test_alignment(T, shift, causal):
    def run(q, k, v):
        i, j = rows_and_columns(T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i + shift, enable_gqa=True)

    found = arguments(check_rewrite(run, *heads(T=T), expect={"attention": 1}))
    assert (found["mask"], found["causal"]) == (None, causal)


def written(mask):
    mask[:, 0] = True
    mask[2] = torch.tensor([True, False] * 3)
    return mask


NOT_UNDERSTOOD = {
    "shifted": lambda p: torch.arange(S) <= torch.arange(S)[:, None] + 1,
    "keys hidden": lambda p: (torch.arange(S) <= torch.arange(S)[:, None]) & (p > 0),
    "written to": lambda p: written(torch.ones(S, S, dtype=torch.bool).tril()),
    "strided": lambda p: torch.arange(S) * 2 <= torch.arange(S)[:, None],
    "either": lambda p: (torch.arange(S) <= torch.arange(S)[:, None]) | (torch.arange(S) == 4),
    "not the lowest": lambda p: torch.where(torch.ones(S, S, dtype=torch.bool).tril(), 0.0, -1e4),
    "chunks": lambda p: (torch.arange(S) // 3) == (torch.arange(S)[:, None] // 3),
    "offset in a tensor": lambda p: torch.arange(S) <= torch.arange(S)[:, None] + p[0],
}


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_passed_on(case):
    def run(q, k, v, positions):
        mask = NOT_UNDERSTOOD[case](positions)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    positions = torch.tensor([0, 1, 2, 0, 1, 2])
    found = arguments(check_rewrite(run, *heads(), positions, expect={"attention": 1}))
    assert found["mask"] is not None
    assert found["causal"] == "none"


@pytest.mark.parametrize("window, understood", [(64, True), (20, False)])
def test_a_window_that_an_open_cache_has_not_filled(window, understood):
    """The last token of a cache whose rows before the window are gone, as transformers masks it."""

    def run(q, k, v):
        length = k.shape[2] - 1
        if length > 40:
            return q
        oldest = torch.sym_max(length - window + 1, 0)
        i, j = torch.arange(1)[:, None] + length, torch.arange(length + 1)[None, :] + oldest
        seen = (j <= i) & (j > i - window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    q, k, v = heads(T=12)
    for x in (k, v):
        torch._dynamo.mark_dynamic(x, 2)
    found = arguments(check_rewrite(run, q[:, :, :1], k, v, expect={"attention": 1}))
    assert (found["mask"] is None) == understood


def lowest_but(seen):
    return torch.where(seen, torch.zeros(()), torch.finfo(torch.float32).min)


@pytest.mark.parametrize("size", [None, 4])
def test_a_sum_that_hides_no_whole_row_is_understood(size):
    """More queries than keys, as where a cache's length is fixed and the sequence's is not."""

    def run(q, k, v):
        i, j = rows_and_columns(T=3)
        mask = lowest_but(j <= i if size is None else (j <= i) & (j > i - size))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    found = arguments(check_rewrite(run, *heads(T=3), expect={"attention": 1}))
    assert (found["mask"], found["causal"], found["window"]) == (None, "top_left", size)


@pytest.mark.parametrize("hides", ["ahead", "behind"])
def test_a_hidden_row_of_lowest_numbers_is_a_mean(hides):
    def run(q, k, v):
        i, j = rows_and_columns(T=3)
        seen = j <= i - 3 if hides == "ahead" else (j <= i) & (j > i - 3)
        mask = lowest_but(seen)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    found = arguments(check_rewrite(run, *heads(T=3), expect={"attention": 1}))
    assert found["mask"] is not None


def documents(positions, *, hide=lambda i, j: j <= i, number=None):
    """transformers' mask of packed sequences: tokens see the earlier ones of their own."""
    first = positions[:, :1] - 1
    numbers = (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)
    numbers = numbers if number is None else number(numbers)
    b = torch.arange(positions.shape[0])[:, None, None, None]
    i, j = torch.arange(S)[None, None, :, None], torch.arange(S)[None, None, None, :]
    return numbers[b, i].__eq__(numbers[b, j]) & hide(i, j)


def by_views(positions):
    """The same with the numbers spread by views, added to the scores."""
    numbers = (positions == 0).cumsum(dim=1)
    seen = numbers[:, None, :, None] == numbers[:, None, None, :]
    seen = seen & torch.ones(S, S, dtype=torch.bool).tril()
    return lowest_but(seen)[:, :, :, :]


PACKED_POSITIONS = torch.tensor([[0, 1, 0, 0, 1, 2], [3, 4, 5, 6, 0, 1]])


@pytest.mark.parametrize(
    "build, size",
    [
        (documents, None),
        (by_views, None),
        (packed, None),
        (lambda p: packed(p.amax(0, keepdim=True).expand(2, -1)), None),
        (lambda p: packed(p // 2), None),
        (lambda p: packed(p, window=2), 2),
        (lambda p: documents(p, hide=lambda i, j: (j <= i) & (j > i - 2)), 2),
        (lambda p: documents(p).expand(2, -1, S, S), None),
    ],
    ids=[
        "of transformers 5.17", "by views", "of transformers 5.23", "of one row", "short steps",
        "positions in a window", "in a window", "expanded",
    ],
)  # fmt: skip
@pytest.mark.parametrize("backward", [False, True])
def test_documents_need_no_mask(build, size, backward):
    def run(q, k, v, positions):
        mask = build(positions)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return F.scaled_dot_product_attention(out, k, v, attn_mask=mask, enable_gqa=True)

    given = [x.requires_grad_(backward) for x in heads()]
    expect = {"attention": 2}
    found = check_rewrite(run, *given, PACKED_POSITIONS, expect=expect, backward=backward)
    arguments_ = found.decisions[0].match.op.bind(*found.decisions[0].match.args, scale=1.0)
    assert arguments_["mask"] is None
    assert {d.match.kwargs["causal"] for d in found.decisions} == {"top_left"}
    assert {d.match.kwargs.get("window") for d in found.decisions} == {size}
    # One table of first keys serves both.
    assert found.graphs[0].count("torch.searchsorted") == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda p: documents(p, hide=lambda i, j: j <= S),
        lambda p: documents(p, number=lambda n: p),
        lambda p: documents(p, number=lambda n: (p != 1).int().cumsum(-1)),
        lambda p: documents(p, number=lambda n: n.flip(-1)),
        lambda p: documents(p) & documents(p, number=lambda n: (p == 0).cumsum(-1)),
        lambda p: documents(p).transpose(-1, -2),
        lambda p: ~documents(p),
        lambda p: documents(p)[1:],
        lambda p: packed(p, others=p + 1),
        lambda p: packed(p, step=2),
        lambda p: packed(p) & (p[:, None, :, None] > p[:, None, None, :]),
    ],
    ids=[
        "later tokens", "positions", "sums of numbers", "falling", "two counts", "transposed",
        "inverted", "another row's", "other positions", "steps of two", "not itself",
    ],
)  # fmt: skip
def test_what_may_be_no_documents_stays_a_mask(build):
    def run(q, k, v, positions):
        mask = build(positions)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    found = arguments(check_rewrite(run, *heads(), PACKED_POSITIONS, expect={"attention": 1}))
    assert found["mask"] is not None
    assert found["first_keys"] is None
