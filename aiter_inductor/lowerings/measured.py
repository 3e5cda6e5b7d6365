"""Where Inductor's own code is preferred to a kernel, and on what measurement.

Figures are microseconds on one H200 unless an H100 is named, replayed in a CUDA graph, the Triton
kernel against Inductor's code in one run; docs/benchmarks.md lists newer ones with their commands.
Other chips have no measurements yet, so nothing is declined there.
"""

from __future__ import annotations

from typing import Any

from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, fixed


def decline_rms_norm(problem: Any, use: Use) -> str | None:
    """64x7168 takes 3.10 against 3.96, 8192x4096 35.5 against 39.5, 4096x7168 32.6 against 30.2."""
    if reason := _in_one_kernel(use):
        return reason
    if not _is_hopper(use) or _at_most(problem.num_rows, 64):
        return _in_training(use)
    if _at_most(problem.N, 4096):
        return _in_training(use)
    return f"N={problem.N}: 4096x7168 takes 32.6 us on sm_90 and Inductor's code 30.2"


def decline_layer_norm(problem: Any, use: Use) -> str | None:
    """64x7168 takes 3.43 against 4.50, 4096x7168 45.5 against 35.1."""
    if reason := _in_one_kernel(use):
        return reason
    if not _is_hopper(use) or _at_most(problem.num_rows, 64):
        return _in_training(use)
    rows = problem.num_rows
    return f"num_rows={rows}: 4096x7168 takes 45.5 us on sm_90 and Inductor's code 35.1"


def decline_norm_in_hip(problem: Any, use: Use) -> str | None:
    """On an H100 RMSNorm of 4096x7168 takes 39.9 against 41.7.

    With a residual 80.3 against 81.7, of 8192x4096 91.4 against 93.2. LayerNorm of 64x7168 takes an
    H200 2.80 against 3.33, of 4096x7168 31.4 against 35.0, before launches overlapped.
    """
    return _in_one_kernel(use) or _in_training(use)


def decline_add_rms_norm(problem: Any, use: Use) -> str | None:
    """64x7168 takes 3.51 against 3.28, 4096x7168 62.4 against 61.4: Inductor fuses it as well."""
    if _is_hopper(use):
        return "4096x7168 takes 62.4 us on sm_90 and Inductor's code 61.4"
    return None


def decline_rotation(problem: Any, use: Use) -> str | None:
    """q and k of 32 and 8 heads: 128 tokens take 2.67 against 4.56, 2x4096 45.5 against 44.2.

    DeepSeek's change of layout, 1x4096, 128 and 1 heads of 64, takes 34.0 against 84.2.
    """
    if not _is_hopper(use):
        return None
    reorders = problem.interleaved_in != problem.interleaved_out
    if not reorders and (reason := _in_one_kernel(use)):
        return reason
    tokens = problem.batch * problem.num_tokens
    if reorders or _at_most(tokens, 128):
        return _in_training(use)
    return f"{tokens} tokens: 2x4096 take 45.5 us on sm_90 and Inductor's code 44.2"


def decline_rotation_in_hip(problem: Any, use: Use) -> str | None:
    """q and k of 32 and 8 heads, 2x4096 tokens, take an H100 57.4 against 60.9."""
    reorders = problem.interleaved_in != problem.interleaved_out
    if not reorders and (reason := _in_one_kernel(use)):
        return reason
    return _in_training(use)


def decline_rotation_into_cache(problem: Any, use: Use) -> str | None:
    """One token of Llama-3-8B's heads takes an H100 1.9 against 3.7, in one launch and in three.

    A launch of Triton costs the host more than those of Inductor together: a step of that model's
    shape, 4 layers, 8 sequences behind 1024 tokens, takes 1278 with it and 1294 without as replays
    of a CUDA graph, launch by launch 3042 and 2918.
    """
    if not _is_hopper(use) or use.replayed or problem.weight_dtype is not None:
        return None
    tokens = problem.batch * problem.num_tokens
    if not _at_most(tokens, 128):
        return None
    return (
        f"{tokens} tokens without CUDA graphs: a step of Llama-3-8B's shape takes 3042 us with it "
        "on sm_90 and 2918 without"
    )


def decline_act_and_mul(problem: Any, use: Use) -> str | None:
    """64x18432 takes 4.02 against 3.77, 4096x14336 83.3 against 82.7: both move the same bytes.

    HIP in a CUDA graph takes an H100 3.02 against 3.71 for 64x14336 and 156.7 against 150.6 for
    4096x18432; launched one by one, a call costs the host 8 us more than Inductor's.
    """
    if _is_hopper(use):
        return "4096x14336 takes 83.3 us on sm_90 and Inductor's code 82.7"
    return None


def cede_rotation(problem: Any, use: Use) -> str | None:
    """Triton and HIP on an H100, 2x4096 tokens, q and k of 32 and 8 heads: 61.5 and 57.4.

    With the norm in front 59.4 and 57.3; DeepSeek's change of layout, 1x4096, 49.4 and 47.4. 128
    tokens of the former two, launched early, 3.24 and 2.14, 3.05 and 2.54.
    """
    if _is_hopper(use) and not use.training:
        return "2x4096 tokens take an H100 57.4 us and the Triton kernel 61.5"
    return None


def cede_activation(problem: Any, use: Use) -> str | None:
    """SiLU * up + fp8 of 64x18432 in Triton and HIP on an H100: per token 5.48 and 4.29.

    In groups of 128 4.62 and 3.39; of 64x14336 4.82 and 3.45, 4.19 and 3.02. 4096x18432 on an H200:
    per token 97.4 and 91.9, in groups 89.2 and 92.0.
    """
    if _is_hopper(use) and problem.group_size is None:
        return "4096x18432 per token take an H200 91.9 us and the Triton kernel 97.4"
    if _is_hopper(use) and _at_most(problem.num_rows, 64):
        return "64x18432 take an H100 4.29 us and the Triton kernel 5.48"
    return None


def cede_quant(problem: Any, use: Use) -> str | None:
    """64x7168 in Triton and HIP on an H100: by groups of 128 2.37 and 1.75, by rows 2.70 and 1.86.

    Before the fp8 product of 64x2176x7168, which HIP's kernel lets begin early, 12.5 and 11.4.
    4096x7168 on an H200: by groups 23.3 and 24.2, by rows 23.2 and 21.6.
    """
    if not _is_hopper(use):
        return None
    if problem.group_size is None:
        return "4096x7168 by rows take an H200 21.6 us and the Triton kernel 23.2"
    if _at_most(problem.num_rows, 64):
        return "64x7168 by groups take an H100 1.75 us and the Triton kernel 2.37"
    return None


def cede_norm(problem: Any, use: Use) -> str | None:
    """RMSNorm in HIP, Triton, Inductor: 64x7168 2.04, 3.22, 4.06 on an H100.

    8192x4096 takes an H200 34.0, 35.9, 39.5.
    """
    if _is_hopper(use) and not use.training:
        return "RMSNorm of 64x7168 takes an H100 2.04 us and the Triton kernel 3.22"
    return None


def cede_norm_quant(problem: Any, use: Use) -> str | None:
    """Triton and HIP on an H100, fp8: per token 4096x7168 32.8 and 32.0, 64x7168 3.47 and 2.17.

    LayerNorm and per token 4096x7168 35.7 and 34.5, 64x7168 3.94 and 2.33; a residual and groups of
    128 4096x7168 73.5 and 72.1, 64x7168 3.98 and 2.58.
    """
    if _is_hopper(use):
        return "RMSNorm + fp8 of 64x7168 takes an H100 2.17 us and the Triton kernel 3.47"
    return None


def _in_one_kernel(use: Use) -> str | None:
    """A step of decoding of Llama-3-8B's shape, 4 layers, 64x1: 79 launches instead of 72."""
    if _is_hopper(use) and use.neighbour:
        return f"Inductor computes it in one kernel with {use.neighbour}, which saves a launch"
    return None


def _is_hopper(use: Use) -> bool:
    return use.arch.name == "sm_90"


def _in_training(use: Use) -> str | None:
    if use.training and _is_hopper(use):
        return "no training step is known to be faster with it on sm_90"
    return None


def _at_most(size: Dim, most: int) -> bool:
    """Whether a size is known to be that small; an open one is taken to be large."""
    known = fixed(size)
    return known is not None and known <= most
