"""Bugs planted in the HIP kernels' machine code are caught in simulation."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.jit.assemble import assemble
from aiter_inductor.kernels.hip.norm import NormVariant
from aiter_inductor.kernels.hip.rows import Quantisation, RowLayout
from aiter_inductor.lowerings import norm_quant as norm_quant_ops

cdnasim = pytest.importorskip("cdnasim")

BF16, FN, FNUZ = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz
N = 1024 + 128  # two waves and a bit: LDS, a barrier, and lanes without elements
ROWS = 3


def variant(out_dtype: torch.dtype) -> NormVariant:
    return NormVariant(
        layer=False,
        dtype=BF16,
        weight_dtype=BF16,
        bias_dtype=BF16,
        has_residual=False,
        has_weight=True,
        has_bias=False,
        round_before_weight=False,
        round_norm=True,
        quantisation=Quantisation("token", out_dtype),
        layout=RowLayout(threads=192, lanes=192, vectors=1, vec=8),
    )


def run(listing: str, arch: str, out_dtype: torch.dtype, *, x_rows: int = ROWS) -> list:
    """q and scale as the code in `listing` computes them; raises what the checks find."""
    kernel = cdnasim.load(listing, assemble(listing, arch), arch=arch, name="norm_kernel")
    x, weight = inputs()
    out, scale = torch.empty(ROWS, N, dtype=out_dtype), torch.empty(ROWS, 1)
    strides = (N, 0, 0, 0, 0, 0, N, 0, 1, 0)
    arguments = [
        x[:x_rows].clone(),
        None,
        weight,
        None,
        None,
        out,
        scale,
        ROWS,
        1,
        N,
        1e-5,
        0.0,
        0.0,
    ]
    kernel.launch([ROWS], [192], [*arguments, *strides], poison=[out, scale])
    return [out, scale]


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(BF16) for shape in ((ROWS, N), (N,))]


def is_right(q: torch.Tensor, scale: torch.Tensor) -> bool:
    expected, _ = norm_quant_ops.rms_norm_quant.reference(*inputs(), 1e-5, dtype=q.dtype)
    return bool((q.float() != expected.float()).float().mean() <= 0.002)


@pytest.fixture(params=["gfx942", "gfx950"])
def arch(request) -> str:
    try:
        jit.find_compiler(request.param, jit.default_settings())
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    return str(request.param)


def listing_of(arch: str, out_dtype: torch.dtype) -> str:
    listing = jit.load(variant(out_dtype).module(), arch, jit.default_settings()).listing()
    assert listing is not None
    return listing


def without(pattern: str, *, which: int = 0) -> Callable[[str], str]:
    def plant(listing: str) -> str:
        found = list(re.finditer(pattern, listing, re.MULTILINE))[which]
        return listing[: found.start()] + listing[found.end() :]

    return plant


def test_nothing_is_found_without_a_bug(arch):
    assert is_right(*run(listing_of(arch, FNUZ), arch, FNUZ))


@pytest.mark.parametrize(
    ("plant", "finding"),
    [
        (without(r"^\s*s_barrier$"), "race|LDS"),
        (without(r"^\s*s_waitcnt vmcnt\(0\)$"), "wait"),
        (without(r"^\s*s_waitcnt lgkmcnt\(0\)$"), "wait"),
    ],
    ids=["barrier removed", "wait for loads removed", "wait for arguments removed"],
)
def test_planted_synchronisation_bug_is_found(arch, plant, finding):
    listing = listing_of(arch, FNUZ)
    with pytest.raises(cdnasim.SimulationError, match=finding):
        run(plant(listing), arch, FNUZ)


def test_row_index_off_by_one_is_found(arch):
    """A kernel told of rows that are not there reads behind its input."""
    with pytest.raises(cdnasim.SimulationError, match="bounds"):
        run(listing_of(arch, FNUZ), arch, FNUZ, x_rows=ROWS - 1)


def test_swapped_fp8_flavour_is_wrong(arch):
    native, other = (FNUZ, FN) if arch == "gfx942" else (FN, FNUZ)
    q, scale = run(listing_of(arch, native), arch, native)
    assert is_right(q, scale)
    assert not is_right(q.view(other), scale)
