"""Kernels that say they wait for the one before them do so before all else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import aiter_inductor

KERNELS = Path(aiter_inductor.__file__).parent / "kernels"
HOSTS = [
    host
    for host in sorted((*KERNELS.glob("hip/*.py"), *KERNELS.glob("cuda/*.py")))
    if "waits=True" in host.read_text()
]
NAMED = re.compile(r'"(\w+\.(?:hip|cu))"')
SOURCES = sorted(
    {
        source
        for host in HOSTS
        for named in (host.parent / name for name in NAMED.findall(host.read_text()))
        for source in (named, host.with_suffix(".hip"), host.with_suffix(".cu"))
        if source.exists()
    }
)
BODY = re.compile(r"(?:SIMT_KERNEL\(|__global__ void)[^{;]*\{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
WAIT = re.compile(r"(?<!\w)begin\([^;]*\);|wait_for_kernel_ahead\(\);")
MEMORY = re.compile(r"load[_(]|store[_(]|(?<!pre)fetch(?!_map)|\w\[[^\]]*\] *=|\*\w+ *=")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_memory_is_touched_behind_the_wait(source):
    bodies = BODY.findall(source.read_text())
    assert bodies
    for body in bodies:
        wait = WAIT.search(body)
        assert wait, body[:200]
        before = body[: wait.start()]
        assert not MEMORY.search(before), before


def test_row_kernels_are_among_them():
    names = {source.name for source in SOURCES}
    assert {"norm.hip", "quant.hip", "activation.hip", "rope.hip", "norm_backward.cu"} <= names
    assert {"mla.cu", "mla_reduce.cu", "gemm_fp8_tiles.cu", "gemm_fp8_tokens.cu"} <= names
