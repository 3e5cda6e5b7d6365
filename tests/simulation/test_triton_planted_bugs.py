"""Bugs planted in the machine code of a Triton kernel are caught in simulation."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import cdnasim
from aiter_inductor.kernels.triton.rows import RowConfig
from aiter_inductor.kernels.triton.simulated import Launched, simulating
from cdnasim import FindingKind
from tests.simulation.cases import FP8
from tests.simulation.executing import ARCHS, assert_right, host_function, poisoned

OP = "rms_norm_quant"
NUM_ROWS, N, EPS = 3, 2304, 1e-5  # a row is several waves, the last of them partly idle

WAIT = re.compile(r"\s*s_waitcnt ")
BARRIER = re.compile(r"\s*s_barrier")
TRACKED_BY_LGKMCNT = re.compile(r"\s*(ds|s_load)_")
LOAD = re.compile(r"\s*(global|buffer)_load_\w+ (?!.*offset)")
STORE = re.compile(r"\s*(global|buffer)_store_\w+ (?!.*offset)")


@dataclass(frozen=True)
class Simulated:
    """A launch that was right, and what it wrote."""

    launched: Launched
    args: tuple[torch.Tensor, torch.Tensor, float]
    out: tuple[torch.Tensor, torch.Tensor]

    def again(self, listing: str, arch: str) -> set[FindingKind]:
        """The same launch of other code: kinds of findings; `out` is what it wrote."""
        kernel = cdnasim.load(listing, cdnasim.assemble(listing, arch), arch=arch)
        launched = self.launched
        run = kernel.launch(
            launched.grid,
            (launched.threads,),
            launched.arguments,
            shared_bytes=launched.shared_bytes,
            poison=self.out,
            strict=False,
        )
        return {finding.kind for finding in run.findings}

    def is_right(self) -> bool:
        """Whether `out` is what the reference computes."""
        try:
            assert_right(OP, self.out, self.args, {"dtype": self.out[0].dtype})
        except AssertionError:
            return False
        return True


def simulated(arch: str, dtype: torch.dtype) -> Simulated:
    """One program that walks over all rows, so that each barrier has something to keep apart.

    Its lanes hold 8 elements each, so that every access to a row reaches the row's end.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator).bfloat16() for s in ((NUM_ROWS, N), (N,)))
    config = RowConfig(block=4096, rows=1, num_warps=16, programs=1)
    run: Any = host_function(OP, "triton")
    with poisoned(), simulating(arch) as launches:
        out = run(x, weight, EPS, dtype=dtype, config=config)
    (launched,) = launches
    return Simulated(launched, (x, weight, EPS), out)


def lines_of(listing: str, pattern: re.Pattern[str]) -> list[int]:
    found = [at for at, line in enumerate(listing.splitlines()) if pattern.match(line)]
    assert found, f"nothing in the listing matches {pattern.pattern}"
    return found


def is_idle(listing: str, at: int) -> bool:
    """Whether line `at` waits for LDS and scalar loads of which none has begun since the last wait.

    The compiler puts such a wait in front of every barrier.
    """
    before = listing.splitlines()[:at]
    last = max(i for i, line in enumerate(before) if "s_waitcnt lgkmcnt(0)" in line)
    return not any(map(TRACKED_BY_LGKMCNT.match, before[last:]))


def changed(listing: str, at: int, line: str) -> str:
    lines = listing.splitlines()
    return "\n".join([*lines[:at], line, *lines[at + 1 :], ""])


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_found_without_a_bug(arch):
    code = simulated(arch, FP8[arch])
    assert code.again(code.launched.listing, arch) == set()
    assert code.is_right()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("pattern", "kind"),
    [(WAIT, FindingKind.MISSING_WAIT), (BARRIER, FindingKind.LDS_RACE)],
    ids=["wait", "barrier"],
)
def test_each_missing_wait_and_barrier_is_found(arch, pattern, kind):
    """Right results are no excuse: waves that happen to run in step hide most of these bugs."""
    code = simulated(arch, FP8[arch])
    listing = code.launched.listing
    missed = [
        f"line {at + 1}: {listing.splitlines()[at].strip()}"
        for at in lines_of(listing, pattern)
        if kind not in code.again(changed(listing, at, ""), arch)
        if not (pattern is WAIT and is_idle(listing, at))
    ]
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pattern", [LOAD, STORE], ids=["load", "store"])
def test_each_index_that_is_off_by_one_is_found(arch, pattern):
    """One bfloat16 too far, in turn at every access that is not a constant distance from one."""
    code = simulated(arch, FP8[arch])
    listing = code.launched.listing
    for at in lines_of(listing, pattern):
        instruction = listing.splitlines()[at].split(";")[0].rstrip()
        kinds = code.again(changed(listing, at, f"{instruction} offset:2"), arch)
        assert FindingKind.OUT_OF_BOUNDS in kinds, instruction
        assert not code.is_right(), instruction


def test_code_of_the_other_chip_converts_to_the_other_flavour():
    """gfx950 has all instructions of gfx942, but its conversions round to e4m3fn."""
    code = simulated("gfx942", FP8["gfx942"])
    assert code.is_right()
    code.again(code.launched.listing.replace("gfx942", "gfx950"), "gfx950")
    assert not code.is_right()


@pytest.mark.parametrize("arch", ARCHS)
def test_flavour_swapped_by_the_host_is_wrong(arch):
    (other,) = set(FP8.values()) - {FP8[arch]}
    code = simulated(arch, other)
    assert code.is_right()
    q, scale = code.out
    assert not replace(code, out=(q.view(FP8[arch]), scale)).is_right()
