"""Which attention of one query the kernel that splits keys takes, and where it is declined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.attention_decode import one_query_unsupported, sdpa_decodes_faster
from tests.lowerings.test_attention_hopper import LLAMA

MI300X, HOPPER = (Use(arch_named(name)) for name in ("gfx942", "sm_90"))
STEP = replace(LLAMA, num_queries=1, causal="none")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"causal": "bottom_right", "window": 128, "sinks": True},
        {"softcap": 50.0, "dtype": torch.float16},
        {"mask": "bool", "mask_shape": (2, 1, 1, 4096)},
        {"mask": "float32", "mask_shape": (1, 1, 1, 1)},
    ],
    ids=str,
)
def test_taken(change):
    assert one_query_unsupported(replace(STEP, **change), MI300X) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_queries": 2}, "S=2 queries; the kernel has one a sequence"),
        ({"qk_dim": 257}, "qk_dim=257 is not a number from 1 to 256"),
        ({"dtype": torch.float32}, "q, k and v are float32; it multiplies bf16 and fp16"),
        ({"v_dim": 100}, "v_dim=100 is no multiple of the 8 in 16 bytes"),
        ({"first_keys": True}, "and the query names the first that it sees"),
        ({"causal": "top_left"}, "counted from the first key, one query sees no other"),
        ({"mask": "float64", "mask_shape": (1, 1, 1, 9)}, "the mask is float64, none of bool"),
        ({"mask": "bool", "mask_shape": (2, 32, 1, 9)}, "(2, 32, 1, 9) is not the same for all"),
        (
            {"mask": "bool", "mask_shape": (2, 1, 1, 9), "window": 5},
            "window=5 counts from the last key, which the mask may hide",
        ),
    ],
)
def test_refused(change, reason):
    assert reason in str(one_query_unsupported(replace(STEP, **change), MI300X))


def test_plain_keys_are_left_to_cudnn_on_hopper_only():
    assert "55 us on sm_90 and torch's cuDNN 52" in str(sdpa_decodes_faster(STEP, HOPPER))
    assert sdpa_decodes_faster(STEP, MI300X) is None
    for change in ({"sinks": True}, {"softcap": 50.0}, {"mask": "bool"}):
        assert sdpa_decodes_faster(replace(STEP, **change), HOPPER) is None
