"""Which provider of a quantised linear layer takes what, and what happens without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Op, Use
from aiter_inductor.kernels.cpp import gemm as cpp_gemm
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_blockscale,
    gemm_fp8_per_tensor,
    gemm_fp8_rowwise,
    gemm_int8,
    gemm_w8a16,
)
from aiter_inductor.lowerings.gemm_int4 import gemm_w4a16
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from aiter_inductor.lowerings.gemm_providers import cuda_unsupported
from tests.kernels.cpp.test_gemm import assert_product, spread

CPU = Use(arch_named("cpu"))
HOPPER = Use(arch_named("sm_90"))
FP8 = torch.float8_e4m3fn
DEQUANTISED = "oneDNN on a dequantised weight is faster"
BLOCKS = GemmProblem(
    M=5,
    N=200,
    K=300,
    dtype=FP8,
    weight_dtype=FP8,
    out_dtype=torch.bfloat16,
    scaling="block",
    group_size=128,
    block_n=128,
    block_k=128,
)


def without(*providers: str) -> Callable[[str], str | None]:
    """Of a `Use` that leaves these out."""
    return lambda name: name if name in providers else None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"M": 33},
            f"cpp: M=33 is more than 32 at N=2048 and K=2048, where {DEQUANTISED}",
        ),
        (
            {"N": 256, "K": 256},
            f"cpp: M=5 is more than 0 at N=256 and K=256, where {DEQUANTISED}",
        ),
        (
            {"M": sympy.Symbol("s0")},
            "cpp: M=s0 is open, and many rows are faster on a dequantised weight",
        ),
        ({"dtype": torch.int8}, "cpp: x is int8, which no kernel of this op reads"),
        ({"out_dtype": torch.float64}, "cpp: no kernel writes float64"),
        (
            {"mismatch": "x has 3 elements a row and weight 4"},
            "cpp: x has 3 elements a row and weight 4",
        ),
        ({"bias_dtype": torch.int32}, "cpp: bias is int32, which no kernel of this op reads"),
    ],
    ids=["rows", "small", "open", "x", "out", "mismatch", "bias"],
)
def test_the_cpu_kernel_says_what_it_leaves(change: dict[str, object], reason: str) -> None:
    large = replace(BLOCKS, N=2048, K=2048)
    taken = gemm_fp8_blockscale.select(large, CPU).provider
    assert taken is gemm_fp8_blockscale.providers["cpp"]
    left = gemm_fp8_blockscale.select(replace(large, **change), CPU)  # type: ignore[arg-type]
    assert left.provider is None
    assert left.reason == reason


@pytest.mark.parametrize(
    ("arch", "change", "reason"),
    [
        (
            "gfx942",
            {"weight_dtype": torch.float8_e4m3fnuz},
            "triton: x is float8_e4m3fn, which gfx942 does not multiply",
        ),
        (
            "gfx950",
            {"block_k": 80},
            "triton: scales change every 80 elements of K, not of a tile's 32",
        ),
        (
            "gfx950",
            {"K": sympy.Symbol("s0")},
            "triton: K=s0 is open; tiles are chosen for a fixed weight",
        ),
    ],
    ids=["fp8", "scales", "open"],
)
def test_triton_says_what_it_leaves(arch: str, change: dict[str, object], reason: str) -> None:
    op, use = (
        gemm_fp8_blockscale,
        Use(arch_named(arch), disabled=without("vendor", "cuda")),
    )
    left = op.select(replace(BLOCKS, **change), use)  # type: ignore[arg-type]
    assert left.provider is None
    assert left.reason.endswith(reason)


@pytest.mark.parametrize("arch", ["gfx950", "sm_90"])
def test_triton_multiplies_blocks_with_any_number_of_rows(arch: str) -> None:
    use = Use(arch_named(arch), disabled=without("vendor", "cuda"))
    selection = gemm_fp8_blockscale.select(replace(BLOCKS, M=sympy.Symbol("s0")), use)
    assert selection.provider is gemm_fp8_blockscale.by_rows(("triton",))


WHOLE = replace(BLOCKS, M=4096, N=256, K=384)


def test_few_rows_are_not_the_librarys_on_hopper() -> None:
    use = Use(arch_named("sm_90"), disabled=without("cuda"))
    few = gemm_fp8_blockscale.select(replace(WHOLE, M=64), use)
    assert few.provider is gemm_fp8_blockscale.providers["triton"]
    reason = gemm_fp8_blockscale.providers["vendor"].cede(replace(WHOLE, M=64), use)
    assert reason == "M=64 is at most 64, where the Triton kernel measured faster"
    some = replace(WHOLE, M=64, scaling="tensor")
    assert gemm_fp8_per_tensor.select(some, use).provider is gemm_fp8_per_tensor.providers["vendor"]


def test_weights_in_eight_bits_are_for_few_rows_on_hopper() -> None:
    use = Use(arch_named("sm_90"))
    problem = replace(WHOLE, scaling="weight_row", dtype=torch.bfloat16)
    assert gemm_w8a16.select(replace(problem, M=64), use).provider
    left = gemm_w8a16.select(problem, use)
    assert (left.provider, left.declined) == (None, True)
    assert left.reason.endswith(
        "M=4096: 4096 rows of 4096 x 4096 take 268 us on sm_90 and Inductor's code 191"
    )
    some = replace(problem, M=256)
    assert gemm_w8a16.select(some, use).provider is gemm_w8a16.providers["triton"]
    left = gemm_w8a16.select(replace(some, weight_dtype=torch.int8), use)
    assert (left.provider, left.declined) == (None, True)
    assert left.reason.endswith(
        "M=256: 256 rows of 4096 x 4096 take 33.5 us on sm_90 and Inductor's code 29.1"
    )


@pytest.mark.parametrize("op", [gemm_w8a16, gemm_w4a16], ids=str)
def test_an_open_number_of_rows_is_chosen_for_when_called(op: Op) -> None:
    use, problem = Use(arch_named("sm_90")), replace(WHOLE, dtype=torch.bfloat16)
    kind = {"scaling": "weight_row"}
    if op is gemm_w4a16:
        kind = {"scaling": "weight_group", "weight_dtype": torch.uint8, "group_size": 128}
    problem = replace(problem, M=sympy.Symbol("s0"), **kind)
    assert op.select(problem, use).provider is op.providers["vendor"]
    assert op.select(replace(problem, M=64), use).provider is op.providers["triton"]
    reason = op.providers["vendor"].decline(replace(problem, M=64), use)
    assert reason is not None
    assert reason.startswith("M=64 is ")
    many = op.select(replace(problem, M=4096), use).provider
    assert many is (op.providers["vendor"] if op is gemm_w4a16 else None)
    forced = op.select(replace(problem, M=64), replace(use, force=True)).provider
    assert forced is op.providers["triton"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"N": 200}, "N=200 and K=384 are not both multiples of 128"),
        ({"block_k": 64}, "blocks of 1x128 and 128x64 are not 1x128 and 128x128"),
        ({"bias_dtype": torch.bfloat16}, "scaled_mm rounds before a bias could be added"),
        ({"out_dtype": torch.float16}, "scaled_mm is asked for bfloat16 only, not float16"),
        (
            {"weight_dtype": torch.float8_e4m3fnuz},
            (
                "x and weight are float8_e4m3fn and float8_e4m3fnuz; "
                "scaled_mm on sm_90 takes float8_e4m3fn"
            ),
        ),
    ],
    ids=["sizes", "blocks", "bias", "out", "fp8"],
)
def test_the_library_says_what_it_leaves(change: dict[str, object], reason: str) -> None:
    use = Use(arch_named("sm_90"), disabled=without("cuda"))
    vendor = gemm_fp8_blockscale.providers["vendor"]
    assert gemm_fp8_blockscale.select(WHOLE, use).provider is vendor
    assert vendor.refuse(replace(WHOLE, **change), use) == reason  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"K": 300}, "K=300 is no multiple of 16, which TMA's rows must be"),
        ({"K": sympy.Symbol("s0")}, "K=s0 is open; tiles are chosen for a fixed weight"),
        ({"block_n": 64}, "blocks of 1x128 and 64x128 are not 1x128 and 128x128"),
        ({"bias_dtype": torch.float64}, "bias is float64, which no kernel of this op reads"),
        (
            {"dtype": torch.float8_e4m3fnuz},
            "x and weight are float8_e4m3fnuz and float8_e4m3fn; wgmma is used on float8_e4m3fn",
        ),
    ],
    ids=["rows", "open", "blocks", "bias", "fp8"],
)
def test_the_wgmma_kernel_says_what_it_leaves(change: dict[str, object], reason: str) -> None:
    cuda = gemm_fp8_blockscale.providers["cuda"]
    problem = replace(WHOLE, **change)  # type: ignore[arg-type]
    assert gemm_fp8_blockscale.select(problem, HOPPER).provider is not cuda
    assert cuda_unsupported(problem, HOPPER) == reason


@pytest.mark.parametrize("change", [{}, {"M": sympy.Symbol("s0")}, {"N": 203, "K": 400}], ids=str)
def test_the_wgmma_kernel_comes_first_on_hopper(change: dict[str, object]) -> None:
    try:
        jit.find_compiler("sm_90", jit.default_settings())
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    problem = replace(WHOLE, **change)  # type: ignore[arg-type]
    selection = gemm_fp8_blockscale.select(problem, HOPPER)
    assert selection.provider is gemm_fp8_blockscale.providers["cuda"]


def test_the_library_has_no_blocks_on_amd() -> None:
    problem = replace(WHOLE, dtype=torch.float8_e4m3fnuz, weight_dtype=torch.float8_e4m3fnuz)
    selection = gemm_fp8_blockscale.select(problem, Use(arch_named("gfx942")))
    assert selection.provider is gemm_fp8_blockscale.providers["triton"]
    by_row = gemm_fp8_rowwise.select(replace(problem, scaling="row"), Use(arch_named("gfx942")))
    assert by_row.provider is gemm_fp8_rowwise.providers["vendor"]


def test_triton_multiplies_int8() -> None:
    whole = replace(BLOCKS, scaling="row", dtype=torch.int8, weight_dtype=torch.int8)
    use = Use(arch_named("gfx942"))
    assert gemm_int8.select(whole, use).provider is gemm_int8.providers["triton"]
    left = gemm_int8.select(replace(whole, weight_dtype=FP8), use)
    assert left.reason == "triton: weight is float8_e4m3fn, which no kernel of this op reads"


def test_the_operator_runs_the_cpu_kernel() -> None:
    args, kwargs = replace(BLOCKS, out_dtype=torch.float32).sample(seed=1, device="cpu")
    x, weight, x_scale, weight_scale, _ = args
    out = gemm_fp8_blockscale(*args, **kwargs, provider="cpp")
    exact = x.double() * spread(x_scale, (5, 300), 1, 128)
    assert_product(
        out, exact, weight.double() * spread(weight_scale, (200, 300), 128, 128), None, 1e-6
    )


def test_a_failed_build_is_a_warning_and_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise jit.CompileError("gemm.cpp:12: error: no such instruction")

    monkeypatch.setattr(cpp_gemm, "gemm_w8a16", broken)
    x, weight = torch.randn(3, 64), torch.randn(6, 64).to(FP8)
    scale = torch.rand(6)
    with pytest.warns(jit.JitWarning, match=r"gemm_w8a16 does not run in cpp: gemm.cpp:12: error"):
        found = gemm_w8a16.providers["cpp"].run(x, weight, scale)
    torch.testing.assert_close(found, gemm_w8a16.reference(x, weight, scale))


def test_compiled_graphs_call_it() -> None:
    args, kwargs = replace(BLOCKS, N=1024, K=1024).sample(seed=2, device="cpu")

    @torch.compile(fullgraph=True)
    def run(*args: torch.Tensor) -> torch.Tensor:
        return gemm_fp8_blockscale(*args, **kwargs) + 1

    expected = gemm_fp8_blockscale.reference(*args, **kwargs) + 1
    torch.testing.assert_close(run(*args[:4]), expected, rtol=2e-2, atol=2e-2)
