"""What each provider of the quantised linear layers takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from aiter_inductor.core.dtypes import FP8_DTYPES, QUANT_DTYPES, ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, fixed
from aiter_inductor.lowerings.gemm_problem import GemmProblem

FEW_ROWS = 128
FEW_INT4_ROWS, FEW_INT8_ROWS, FEW_FP8_ROWS = 64, 128, 256
"""Of products with a quantised weight: up to which it is not dequantised first."""
CPU_ROWS = ((2048 * 2048, 32), (1024 * 1024, 16), (512 * 512, 4))
"""Elements of a weight from which the CPU kernel pays, and for how many rows."""
SPLIT_ROWS = 64
LEAST_K = 32
BLOCK = 128
TMA_BYTES = 16


def dtypes_unsupported(problem: GemmProblem, use: Use) -> str | None:
    """What no provider takes: tensors that do not fit, and dtypes that no kernel reads."""
    if problem.mismatch:
        return problem.mismatch
    weight_only = problem.scaling.startswith("weight")
    if problem.dtype not in (ROW_DTYPES if weight_only else FP8_DTYPES):
        return _not_read("x", problem.dtype)
    packed = problem.scaling == "weight_group"
    if packed and problem.weight_dtype != torch.uint8:
        return f"weight is {short_name(problem.weight_dtype)}, not uint8 that holds two int4"
    if not packed and problem.weight_dtype not in (QUANT_DTYPES if weight_only else FP8_DTYPES):
        return _not_read("weight", problem.weight_dtype)
    if problem.out_dtype not in ROW_DTYPES:
        return f"no kernel writes {short_name(problem.out_dtype)}"
    if problem.bias_dtype is not None and problem.bias_dtype not in (*ROW_DTYPES, torch.float64):
        return _not_read("bias", problem.bias_dtype)
    return None


def int8_unsupported(problem: GemmProblem, use: Use) -> str | None:
    """What the products of int8 with int8 do not take."""
    if problem.mismatch:
        return problem.mismatch
    for name, dtype in (("x", problem.dtype), ("weight", problem.weight_dtype)):
        if dtype != torch.int8:
            return _not_read(name, dtype)
    if problem.out_dtype not in ROW_DTYPES:
        return f"no kernel writes {short_name(problem.out_dtype)}"
    return open_sizes(problem.N, problem.K)


def triton_unsupported(problem: GemmProblem, use: Use) -> str | None:
    """What the Triton kernels do not take, beside what no provider does."""
    if reason := dtypes_unsupported(problem, use):
        return reason
    converted = problem.scaling.startswith("weight")
    if reason := fp8_unsupported(problem.dtype, problem.weight_dtype, use, converted=converted):
        return reason
    sizes = {
        "block": (problem.group_size, problem.block_k),
        "weight_block": (problem.block_k,),
        "weight_group": (problem.group_size,),
    }
    return scales_too_fine(sizes.get(problem.scaling, ())) or open_sizes(problem.N, problem.K)


def cuda_unsupported(problem: GemmProblem, use: Use) -> str | None:
    """What the wgmma kernels do not take, beside what no provider does."""
    if reason := dtypes_unsupported(problem, use) or open_sizes(problem.N, problem.K):
        return reason
    if {problem.dtype, problem.weight_dtype} != {torch.float8_e4m3fn}:
        found = f"{short_name(problem.dtype)} and {short_name(problem.weight_dtype)}"
        return f"x and weight are {found}; wgmma is used on float8_e4m3fn"
    if reason := _other_blocks(problem):
        return reason
    if problem.K == 0 or problem.K % TMA_BYTES:
        return f"K={problem.K} is no multiple of {TMA_BYTES}, which TMA's rows must be"
    if problem.bias_dtype == torch.float64:
        return _not_read("bias", torch.float64)
    return None


def vendor_unsupported(problem: GemmProblem, use: Use) -> str | None:
    """What torch's scaled_mm does not take, beside what no provider does."""
    if reason := dtypes_unsupported(problem, use) or open_sizes(problem.N, problem.K):
        return reason
    wanted = use.arch.fp8_dtypes[0]
    if problem.dtype != wanted or problem.weight_dtype != wanted:
        found = f"{short_name(problem.dtype)} and {short_name(problem.weight_dtype)}"
        return f"x and weight are {found}; scaled_mm on {use.arch} takes {short_name(wanted)}"
    if problem.bias_dtype is not None:
        return "scaled_mm rounds before a bias could be added"
    if problem.out_dtype != torch.bfloat16:
        return f"scaled_mm is asked for bfloat16 only, not {short_name(problem.out_dtype)}"
    if reason := _other_blocks(problem):
        return reason
    least = BLOCK if problem.scaling == "block" else 16
    if problem.N % least or problem.K % least:
        return f"N={problem.N} and K={problem.K} are not both multiples of {least}"
    return None


def cublas_is_faster(problem: GemmProblem, use: Use) -> str | None:
    """Few rows with one scale for all, where cuBLASLt's kernel goes before the wgmma kernel.

    Microseconds on one H200, the wgmma kernel's first; one scale for all: 64x4096x4096 9.8 and 7.8,
    or 8.3 with the best of all tiles; 4096x4096x4096 96.9 and 101.3. By rows 9.8 and 13.8, 98.9 and
    103.6. By blocks it is ahead at every shape of docs/benchmarks.md.
    """
    rows = fixed(problem.M)
    if problem.scaling != "tensor" or rows is None or rows > FEW_ROWS:
        return None
    return f"M={rows}: 64 rows of 4096 x 4096 take 8.3 us and cuBLASLt's kernel 7.8"


def triton_is_faster(problem: GemmProblem, use: Use) -> str | None:
    """Where Triton's own split of K beats cuBLAS: 64 x 4096 x 4096 on an H100, without a table.

    By blocks 13.1 µs against the library's 17.4, by rows 12.9 against 14.9; 64 x 28672 x 4096 49.7
    against 54.5 and 48.2 against 52.2. With one scale for all the library is ahead, 10.8 and 13.3.
    """
    rows = fixed(problem.M)
    if use.arch.name != "sm_90" or rows is None or rows > SPLIT_ROWS or problem.scaling == "tensor":
        return None
    return f"M={rows} is at most {SPLIT_ROWS}, where the Triton kernel measured faster"


def dequantising_unpaid(problem: GemmProblem, use: Use) -> str | None:
    """Where a weight is not to be dequantised first, which is what `vendor` does for many rows.

    In eight bits Inductor's code does the same in the same time: 4096 rows of 4096 x 4096 take
    189.5 us and 191.4 (H100). int4 it unpacks slowly, in about 35 of 209 us; 14.5 would do.
    """
    rows = fixed(problem.M)
    if rows is None:
        return None
    if problem.scaling != "weight_group":
        return f"M={rows} is known; there is nothing to choose when called"
    if rows <= FEW_INT4_ROWS:
        return f"M={rows} is at most {FEW_INT4_ROWS}, which do not pay for a dequantised weight"
    return None


def decline_weight_only(problem: GemmProblem, use: Use) -> str | None:
    """Many rows, which pay for a dequantised copy of the weight; few do not.

    By 4096 x 4096 on an H100, in us, Triton's kernel first and Inductor's code second. fp8: 1 row
    9.7 and 29.3, 64 rows 13.1 and 28.5, 256 rows 24.8 and 34.9, 512 rows 49.7 and 40.5, 4096 rows
    268 and 191. int4: 11.1 and 48.4, 16.0 and 47.1, 37.7 and 54.4, 94.8 and 59.5, 479 and 209.
    int8 on an H200: 11.6 and 24.2, 14.2 and 23.1, 33.5 and 29.1; by 12288 x 4096 34.3 and 69.6
    at 64 rows, 99.3 and 75.5 at 256. Where their number is open, `vendor` goes before and chooses.
    """
    rows, is_int4 = fixed(problem.M), problem.scaling == "weight_group"
    is_int8 = problem.weight_dtype == torch.int8
    most = FEW_INT4_ROWS if is_int4 else FEW_INT8_ROWS if is_int8 else FEW_FP8_ROWS
    if use.arch.name != "sm_90" or rows is None or rows <= most:
        return None
    if is_int8:
        return f"M={rows}: 256 rows of 4096 x 4096 take 33.5 us on sm_90 and Inductor's code 29.1"
    times = (
        "479 us on sm_90 and Inductor's code 209"
        if is_int4
        else ("268 us on sm_90 and Inductor's code 191")
    )
    return f"M={rows}: 4096 rows of 4096 x 4096 take {times}"


def onednn_is_faster(problem: GemmProblem, use: Use) -> str | None:
    """Where the CPU's own product wins although it dequantises the whole weight first.

    Time over Inductor's code, compiled modules, two threads of an EPYC with AVX-512 bf16, x in
    bf16, fp8 weights with block scales:

        N = K     1 row   4 rows   16 rows   64 rows
          256      1.32     1.43      1.96      3.93
          512      0.76     0.92      1.36      2.18
         1024      0.43        -      0.94      1.64
         2048      0.34        -      0.62      1.24

    Scales by row measured the same. int8 widens with fewer instructions than fp8, so the weight
    must be four times as large: 1.01 and 0.68 for one row at 512 and 1024.
    """
    rows, size = fixed(problem.M), problem.N * problem.K
    if fixed(size) is None or rows is None:
        return f"M={problem.M} is open, and many rows are faster on a dequantised weight"
    if problem.weight_dtype == torch.int8:
        size //= 4
    most = next((most for least, most in CPU_ROWS if size >= least), 0)
    if rows <= most:
        return None
    shape = f"N={problem.N} and K={problem.K}"
    return (
        f"M={rows} is more than {most} at {shape}, where oneDNN on a dequantised weight is faster"
    )


def open_sizes(N: Dim, K: Dim) -> str | None:
    """Why no tiles can be chosen for a weight [N, K], or None."""
    for name, size in (("N", N), ("K", K)):
        if fixed(size) is None:
            return f"{name}={size} is open; tiles are chosen for a fixed weight"
    return None


def fp8_unsupported(
    x: torch.dtype, weight: torch.dtype, use: Use, *, converted: bool = False
) -> str | None:
    """Which fp8 the chip does not multiply, or None; `converted` weights meet x as floats."""
    known = use.arch.fp8_dtypes
    if converted or x == weight:
        # Two operands in e4m3fn are e4m3fnuz numbers of half the value.
        known += use.arch.emulated_fp8
    for name, dtype in (("x", x), ("weight", weight)):
        if dtype in FP8_DTYPES and dtype not in known:
            return f"{name} is {short_name(dtype)}, which {use.arch} does not multiply"
    return None


def scales_too_fine(sizes: Iterable[int]) -> str | None:
    """Why a tile's step along K would cross scales that change every so many elements, or None."""
    for size in sizes:
        if (size & -size) < LEAST_K:
            return f"scales change every {size} elements of K, not of a tile's {LEAST_K}"
    return None


def _other_blocks(problem: GemmProblem) -> str | None:
    """Why blocks are not DeepSeek's, or None."""
    blocks = (problem.group_size, problem.block_n, problem.block_k)
    if problem.scaling == "block" and blocks != (BLOCK, BLOCK, BLOCK):
        return f"blocks of 1x{blocks[0]} and {blocks[1]}x{blocks[2]} are not 1x128 and 128x128"
    return None


def _not_read(name: str, dtype: torch.dtype) -> str:
    return f"{name} is {short_name(dtype)}, which no kernel of this op reads"
