"""Latent attention over pages: the reference against each sequence by itself, opcheck, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.mla_paged import mla_paged_decode
from aiter_inductor.lowerings.mla_paged_problem import MlaPagedProblem
from tests.lowerings.checks import assert_close, opcheck

FP32, BF16 = torch.float32, torch.bfloat16
SMALL = MlaPagedProblem(4, 6, 24, 8, 8, 5, FP32, FP32)


def test_reference_attends_to_the_rows_of_the_pages():
    (q, cache, tables, lengths, _), kwargs = SMALL.sample(seed=0, device="cpu")
    found = mla_paged_decode.reference(q, cache, tables, lengths, **kwargs)
    for i, length in enumerate(lengths.tolist()):
        places = [(int(tables[i, t // 8]), t % 8) for t in range(length)]
        rows = torch.stack([cache[place] for place in places] or [cache.new_zeros(32)])
        expected = (q[i] @ rows.T * kwargs["scale"]).softmax(-1) @ rows[:, :24]
        assert_close(found[i], expected if length else torch.zeros(6, 24))


def test_a_scale_counts_in_scores_and_sums():
    args, kwargs = replace(SMALL, scaled=True).sample(seed=1, device="cpu")
    expected = mla_paged_decode.reference(args[0], args[1] * args[4], *args[2:4], **kwargs)
    assert_close(mla_paged_decode.reference(*args, **kwargs), expected)


def test_opcheck():
    opcheck(mla_paged_decode, *SMALL.sample(seed=2, device="cpu"))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rank": 520}, "rank=520 is not a number up to 512"),
        ({"rope": 0}, "rope=0 is not a number up to 128"),
        ({"page_size": 1 << 17}, "page_size=131072 is not a number up to 65536"),
        ({"dtype": torch.float64}, "queries are float64"),
        ({"cache_dtype": BF16}, "queries are float32 and the cache bfloat16, neither the same"),
        ({"cache_dtype": torch.float8_e4m3fn}, "gfx942 has no instructions for float8_e4m3fn"),
    ],
)
def test_refusals_name_the_values(changed, sentence):
    reason = mla_paged_decode.select(replace(SMALL, **changed), Use(arch_named("gfx942"))).reason
    assert sentence in reason


def test_arguments_that_do_not_fit_are_refused():
    args, kwargs = SMALL.sample(seed=3, device="cpu")

    def reason(*given):
        problem = MlaPagedProblem.of(*given, **kwargs)
        return mla_paged_decode.select(problem, Use(arch_named("gfx942"))).reason

    assert "the cache has 4 dimensions, not 3" in reason(args[0], args[1][None], *args[2:])
    assert "seq_lens int64, not int32" in reason(*args[:3], args[3].long())
    assert "queries have 32 numbers and rows 31" in reason(args[0], args[1][..., :31], *args[2:])
