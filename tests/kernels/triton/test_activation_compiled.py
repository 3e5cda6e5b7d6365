"""Gated activation kernels compile for every chip without a spill, and with wide accesses.

Wide is 16 bytes, or 8 where a lane holds 8 quantised elements or 4 of a wide row, whose quantised
elements, 5 chunks of them, are stored by 4 bytes like the scale.
"""

from __future__ import annotations

import re

import pytest
import torch

from aiter_inductor.kernels.triton import activation
from tests.kernels.triton.compiled import TARGETS, compiled

DATA = {
    "cuda": re.compile(r"(?:ld|st)\.global\.(?:v\d\.)?b\d+"),
    "hip": re.compile(r"(?:global|buffer|flat)_(?:load|store)_\w+"),
}
WIDE = {"cuda": re.compile(r"v[24]\.b32$"), "hip": re.compile(r"dwordx[24]$")}
SCALAR = {"cuda": re.compile(r"global\.b32$"), "hip": re.compile(r"dword$")}


def calls(target):
    gate, up = torch.randn(2, 64, 18432).bfloat16()
    fp8 = torch.float8_e4m3fnuz if target == "gfx942" else torch.float8_e4m3fn
    silu = {"activation": "silu"}
    scale = torch.ones(1)
    return {
        "silu": lambda: activation.act_and_mul(gate, up, **silu),
        "gelu": lambda: activation.act_and_mul(gate, up, activation="gelu"),
        "gelu_tanh": lambda: activation.act_and_mul(gate, up, activation="gelu_tanh"),
        "swiglu": lambda: activation.act_and_mul(gate, up, activation="swiglu"),
        "group": lambda: activation.act_and_mul_quant(gate, up, **silu, dtype=fp8, group_size=128),
        "token": lambda: activation.act_and_mul_quant(gate, up, **silu, dtype=fp8),
        "int8": lambda: activation.act_and_mul_quant(gate, up, **silu, dtype=torch.int8),
        "static": lambda: activation.act_and_mul_quant_static(gate, up, scale, **silu, dtype=fp8),
        "backward": lambda: activation.act_and_mul_backward(gate, gate, up, **silu),
    }


@pytest.mark.parametrize("name", calls("sm_90"))
@pytest.mark.parametrize("target", TARGETS)
def test_accesses_are_wide(target, name):
    (kernel,) = compiled([activation], calls(target)[name], target)
    backend = TARGETS[target].backend
    text = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
    accesses = DATA[backend].findall(text)
    narrow = [a for a in accesses if not WIDE[backend].search(a)]
    assert len(accesses) > len(narrow)
    words = {"group": 1, "static": 1, "token": 1 + 5, "int8": 1 + 5}
    assert len(narrow) <= words.get(name, 0)
    assert all(SCALAR[backend].search(a) for a in narrow)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    assert spilled is None or spilled[1] == "0"
