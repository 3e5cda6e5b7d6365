"""Kernels that say they wait for the one before them do so before all else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import aiter_inductor

KERNELS = Path(aiter_inductor.__file__).parent / "kernels"
SOURCES = [
    source
    for host in sorted((*KERNELS.glob("hip/*.py"), *KERNELS.glob("cuda/*.py")))
    if "waits=True" in host.read_text()
    for source in (host.with_suffix(".hip"), host.with_suffix(".cu"))
    if source.exists()
]
BODY = re.compile(r"(?:SIMT_KERNEL\(|__global__ void)[^{;]*\{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
WAIT = "begin();"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_memory_is_touched_behind_the_wait(source):
    bodies = BODY.findall(source.read_text())
    assert bodies
    for body in bodies:
        before, wait, _ = body.partition(WAIT)
        assert wait, body[:200]
        assert not re.search(r"load|store|fetch|\w\[[^\]]*\] *=|\*\w+ *=", before), before


def test_row_kernels_are_among_them():
    names = {source.name for source in SOURCES}
    assert {"norm.hip", "quant.hip", "activation.hip", "rope.hip", "norm_backward.cu"} <= names
