"""Rotary kernels compile for every chip with 16-byte accesses only, and without a spill."""

from __future__ import annotations

import re

import pytest
import torch

from aiter_inductor.kernels.triton import rope
from tests.kernels.triton.compiled import TARGETS, compiled

ANY = {
    "cuda": re.compile(r"(?:ld|st)\.global\.\S+"),
    "hip": re.compile(r"(?:global|buffer|flat|scratch)_(?:load|store)_\w+"),
}
WIDE = {"cuda": re.compile(r"\.v4\.b32$"), "hip": re.compile(r"dwordx4$")}
INTERLEAVED = {"interleaved_in": True, "interleaved_out": True}
STYLES = {
    "neox": (128, 128, torch.bfloat16, {}),
    "neox, not a power of two": (96, 96, torch.bfloat16, {}),
    "half width": (128, 64, torch.bfloat16, {}),
    "complex": (64, 32, torch.float32, INTERLEAVED | {"out_dtype": torch.bfloat16}),
    "deepseek": (64, 32, torch.bfloat16, {"interleaved_in": True}),
    "gpt_j": (256, 256, torch.bfloat16, INTERLEAVED),
}


def heads(count, width):
    return torch.randn(2, 48, count, width).bfloat16().transpose(1, 2)


def launch(style, norm):
    width, table_width, table_dtype, keywords = STYLES[style]
    tables = torch.rand(2, 1, 1, 48, table_width).to(table_dtype).unbind()
    q, k = heads(32, width), heads(8, width)
    if norm:
        weights = torch.ones(2, width).bfloat16().unbind()
        return rope.qk_norm_rope(q, k, *weights, *tables, 1e-6, **keywords)
    return rope.rope_qk(q, k, *tables, **keywords)


@pytest.mark.parametrize("norm", [False, True], ids=["rope_qk", "qk_norm_rope"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("target", TARGETS)
def test_accesses_are_wide(target, style, norm):
    (kernel,) = compiled([rope], lambda: launch(style, norm), target)
    backend = TARGETS[target].backend
    text = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
    accesses = ANY[backend].findall(text)
    narrow = sorted({a for a in accesses if not WIDE[backend].search(a)})
    if norm and (STYLES[style][3] or style == "neox, not a power of two"):
        # Every other weight, once a program and from cache; their vectors stay narrow.
        narrow = [a for a in narrow if "st.global" in a or "store" in a]
    assert accesses
    assert not narrow
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    assert spilled is None or spilled[1] == "0"


@pytest.mark.parametrize("style", ["neox", "complex", "gpt_j", "half width"])
@pytest.mark.parametrize("target", TARGETS)
def test_no_shared_memory_where_layouts_agree(target, style):
    (kernel,) = compiled([rope], lambda: launch(style, norm=False), target)
    assert kernel.metadata.shared == 0
