"""Latent attention in graphs: transformers' models, other spellings, and near misses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import aiter_inductor.backend
from aiter_inductor.core.graph import tensor
from aiter_inductor.core.inductor import fake_mode_of
from aiter_inductor.core.plan import raise_matches
from aiter_inductor.patterns.raising.mla import latent_attention
from tests.patterns import rewrite_check
from tests.patterns.rewrite_check import check_rewrite

HEADS, NOPE, ROPE, V, RANK = 4, 16, 8, 16, 32
SCALE = 24**-0.5


class Latent(torch.nn.Module):
    """One decoding step's attention; subclasses change one line of it."""

    bias = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.kv_b_proj = torch.nn.Linear(RANK, HEADS * (NOPE + V), bias=self.bias)

    def forward(self, query, latent, k_rope, mask=None):
        keys, values = self.expand(latent, k_rope)
        return self.attend(query, keys, values, mask)

    def heads(self, latent):
        return self.kv_b_proj(latent).view(latent.shape[0], -1, HEADS, NOPE + V).transpose(1, 2)

    def shared(self, k_rope):
        return k_rope.expand(-1, HEADS, -1, -1)

    def split(self, heads):
        return torch.split(heads, [NOPE, V], dim=-1)

    def expand(self, latent, k_rope):
        k_nope, values = self.split(self.heads(latent))
        return self.join(k_nope, self.shared(k_rope)), values

    def join(self, k_nope, k_rope):
        keys = k_nope.new_empty(*k_nope.shape[:-1], NOPE + ROPE)
        keys[..., :NOPE].copy_(k_nope)
        keys[..., NOPE:].copy_(k_rope)
        return keys

    def attend(self, query, keys, values, mask):
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=SCALE)


class JoinedByCat(Latent):
    def join(self, k_nope, k_rope):
        return torch.cat((k_nope, k_rope), dim=-1)


class SplitBySlices(Latent):
    def split(self, heads):
        return heads[..., :NOPE], heads[..., NOPE:].contiguous()


class SplitByNarrow(Latent):
    def split(self, heads):
        return heads.narrow(-1, 0, NOPE), heads.narrow(3, NOPE, V)


class DefaultScale(Latent):
    def attend(self, query, keys, values, mask):
        return F.scaled_dot_product_attention(query, keys, values, mask)


class QueryJoined(Latent):
    def attend(self, query, keys, values, mask):
        joined = torch.cat((query[..., :NOPE].neg(), query[..., NOPE:].exp()), -1)
        return super().attend(joined, keys, values, mask)


def inputs(batch=2, q_len=1, kv_len=37, dtype=torch.float32, head=(1,)):
    torch.manual_seed(1)
    query = torch.randn(batch, HEADS, q_len, NOPE + ROPE, dtype=dtype)
    latent = torch.randn(batch, *head, kv_len, RANK, dtype=dtype)
    return query, latent, torch.randn(batch, 1, kv_len, ROPE, dtype=dtype)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.fixture
def alone(monkeypatch):
    """Only latent attention is recognised, so that nothing else takes what it leaves."""
    for module in (aiter_inductor.backend, rewrite_check):
        monkeypatch.setattr(module, "RAISING", (latent_attention,))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "spelling", [Latent, JoinedByCat, SplitBySlices, SplitByNarrow, DefaultScale, QueryJoined]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings(spelling, dtype):
    check_rewrite(spelling().to(dtype), *inputs(dtype=dtype), expect={"mla_decode": 1})


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("head", [(), (1,)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_cache_shapes(head, dynamic):
    check_rewrite(Latent(), *inputs(head=head), expect={"mla_decode": 1}, dynamic=dynamic)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_are_honoured(kind):
    mask = torch.ones(2, 1, 3, 37, dtype=torch.bool)
    mask[0, :, :, :30] = False
    if kind == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e4)
    check_rewrite(Latent(), *inputs(q_len=3), mask, expect={"mla_decode": 1})


MADE = {  # queries, the mask of 37 keys, and what of it the op is to read: a mask, causal
    "one query of all": (1, lambda i, j: j <= i + 36, None, False),
    "first tokens": (3, lambda i, j: j <= i, None, True),
    "last tokens": (3, lambda i, j: j <= i + 34, torch.bool, False),
    "window": (1, lambda i, j: (j <= i + 36) & (j > i + 30), torch.bool, False),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", MADE)
def test_a_mask_is_read_only_if_it_says_more_than_the_op_can(case):
    q_len, seen, kind, causal = MADE[case]

    def run(*tensors):
        return latent(*tensors, seen(torch.arange(q_len)[:, None], torch.arange(37)))

    latent = Latent()
    (decision,) = check_rewrite(run, *inputs(q_len=q_len), expect={"mla_decode": 1}).decisions
    found = decision.match.op.bind(*decision.match.args, **decision.match.kwargs)
    mask = found["mask"]
    assert (mask if mask is None else tensor(mask).dtype, found["causal"]) == (kind, causal)


def miss(model, *args, **kwargs):
    """The one sentence that the recogniser has about a program it leaves."""
    sentences = []

    def capture(gm, example_inputs):
        with fake_mode_of(gm.graph):
            found = raise_matches(gm.graph, (latent_attention,))
        assert not found.matches.found
        sentences.extend(miss.reason for miss in found.misses)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=capture)(*args, **kwargs)
    (sentence,) = sentences
    return sentence


class Attending(Latent):
    """With other arguments for torch's attention."""

    def forward(self, query, latent, k_rope, **kwargs):
        keys, values = self.expand(latent, k_rope)
        return F.scaled_dot_product_attention(query, keys, values, **kwargs)


def test_prefill_keeps_the_programs_form():
    reason = miss(Attending(), *inputs(q_len=37), is_causal=True)
    assert reason == (
        "absorbing the weights into q_len=37 queries adds 81696 multiply-adds a head "
        "for 37 keys and saves 37888"
    )


def test_dropout():
    assert miss(Attending(), *inputs(), dropout_p=0.1) == "dropout_p is 0.1, not 0"


def test_bias():
    class Biased(Latent):
        bias = True

    assert miss(Biased(), *inputs()) == "linear adds a bias to keys and values"


def test_rotated_part_of_its_own_for_each_head():
    class Own(Latent):
        def shared(self, k_rope):
            return k_rope.repeat(1, HEADS, 1, 1)

    reason = "repeat, the rotated part of the keys, is not one head expanded to all"
    assert miss(Own(), *inputs()) == reason


def test_gradients():
    with torch.enable_grad():
        reason = miss(Latent(), *inputs())
    assert reason == "gradients flow through it and mla_decode has no backward"


class KeysReturned(Latent):
    def attend(self, query, keys, values, mask):
        return super().attend(query, keys, values, mask), keys


class SliceReadToo(Latent):
    def join(self, k_nope, k_rope):
        keys = k_nope.new_empty(*k_nope.shape[:-1], NOPE + ROPE)
        self.seen = keys[..., NOPE:]
        keys[..., :NOPE].copy_(k_nope)
        self.seen.copy_(k_rope)
        return keys

    def attend(self, query, keys, values, mask):
        return super().attend(query, keys, values, mask), self.seen + 1


class CopiedInto(Latent):
    def attend(self, query, keys, values, mask):
        keys.mul_(2)
        return super().attend(query, keys, values, mask)


class CopiedAfter(Latent):
    def attend(self, query, keys, values, mask):
        out = super().attend(query, keys, values, mask)
        keys[..., :NOPE].copy_(values)
        return out + super().attend(query, keys, values, mask)


class HalfFilled(Latent):
    def join(self, k_nope, k_rope):
        keys = torch.empty_like(torch.cat((k_nope, k_rope), -1)).fill_(1.0)
        keys[..., NOPE:].copy_(k_rope)
        return keys


class ValuesFromElsewhere(Latent):
    def expand(self, latent, k_rope):
        keys, _ = super().expand(latent, k_rope)
        _, values = self.split(self.heads(latent + 1))
        return keys, values


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "near",
    [KeysReturned, SliceReadToo, CopiedInto, CopiedAfter, HalfFilled, ValuesFromElsewhere],
)
def test_keys_that_are_seen_or_changed_stay(near):
    check_rewrite(near(), *inputs(), expect={}, inserted=0)


def test_a_projection_read_elsewhere_stays():
    class ProjectionReturned(Latent):
        def forward(self, query, latent, k_rope, mask=None):
            heads = self.heads(latent)
            k_nope, values = self.split(heads)
            keys = self.join(k_nope, self.shared(k_rope))
            return self.attend(query, keys, values, mask), heads.sum()

    reason = miss(ProjectionReturned(), *inputs())
    assert reason == "sum_1 reads the keys and values of all heads too (heads)"


@pytest.mark.usefixtures("alone")
def test_a_cache_written_in_between_stays():
    class WritesBetween(Latent):
        def forward(self, query, latent, k_rope, mask=None):
            latent = latent.clone()
            keys, values = self.expand(latent, k_rope)
            latent.mul_(2)
            return self.attend(query, keys, values, mask), latent

    result = check_rewrite(WritesBetween(), *inputs(), expect={"mla_decode": 1}, inserted=0)
    assert "mul_ writes to what it reads" in result.reasons()[-1]
