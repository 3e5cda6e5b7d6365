"""Race launch parameters of the rotary and gated activation kernels on the GPU at hand.

Each kernel is first compared with its reference; then every candidate, and Inductor's code for the
formula as models spell it, is timed at the shapes of the project's baselines. Small shapes run
from a CUDA graph over input sets that together exceed the L2 cache. Prints one line a candidate:
op, shape, candidate, µs, multiple of the floor; `*` marks the fastest.

    python benchmarks/race_rope_activation.py            # under 3 minutes on an H200
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton

from aiter_inductor.core.op import Op
from aiter_inductor.kernels.triton.activation import ActivationConfig
from aiter_inductor.kernels.triton.rope import RopeConfig
from aiter_inductor.lowerings.activation import (
    ACTIVATIONS,
    act_and_mul,
    act_and_mul_backward,
    act_and_mul_quant,
    act_and_mul_quant_static,
)
from aiter_inductor.lowerings.activation_problem import ActivationProblem
from aiter_inductor.lowerings.rope import qk_norm_rope, rope_qk
from aiter_inductor.lowerings.rope_problem import RopeProblem

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
ROTATED_BYTES = 160 << 20
SMALL_BYTES = 16 << 20

LLAMA = RopeProblem(
    batch=2,
    num_tokens=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rotary_dim=128,
    table_batch=1,
    table_width=128,
    dtype=BF16,
    kv_dtype=BF16,
    table_dtype=BF16,
    out_dtype=BF16,
)
DECODE = replace(LLAMA, batch=128, num_tokens=1, table_batch=128)
QWEN3 = {"weight_dtype": BF16, "round_before_weight": True}
DEEPSEEK = replace(
    LLAMA,
    batch=1,
    num_heads=128,
    num_kv_heads=1,
    head_dim=64,
    rotary_dim=64,
    table_width=32,
    interleaved_in=True,
)
COMPLEX = replace(DEEPSEEK, interleaved_out=True, table_dtype=F32)
ROPE_CONFIGS = [
    RopeConfig(*sizes)
    for sizes in (
        (4, 8, 4),
        (2, 8, 4),
        (8, 8, 4),
        (4, 8, 8),
        (1, 8, 1),
        (1, 8, 2),
        (2, 8, 2),
        (1, 32, 4),
        (4, 4, 4),
        (8, 4, 4),
    )
]


def activation_problem(num_rows: int, N: int, **fields: Any) -> ActivationProblem:
    """Rows of bf16 gate and up, separate and contiguous."""
    base = ActivationProblem("gate up", num_rows, N, BF16, residual_dtype=BF16, out_dtype=BF16)
    return replace(base, **fields)


@dataclass(frozen=True)
class Entry:
    """One op at one shape, with the launch parameters to race and the models' own spelling."""

    op: Op
    shape: str
    problem: Any
    configs: list[Any]
    formula: Callable[..., Any] | None = None


def neox(q: Any, k: Any, cos: Any, sin: Any, **_: Any) -> Any:
    """Llama's spelling."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    return rotate(q), rotate(k)


def interleaved(q: Any, k: Any, cos: Any, sin: Any, **_: Any) -> Any:
    """DeepSeek-V3's spelling."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return rotate(q), rotate(k)


def qk_norm(q: Any, k: Any, qw: Any, kw: Any, cos: Any, sin: Any, eps: float, **_: Any) -> Any:
    """Qwen3's spelling."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        f = x.float()
        return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    return neox(norm(q, qw), norm(k, kw), cos, sin)


def silu_and_mul(gate: Any, up: Any, **_: Any) -> Any:
    """Llama's spelling."""
    return F.silu(gate) * up


def silu_and_mul_quant(gate: Any, up: Any, *, group_size: int | None, **_: Any) -> Any:
    """The usual spelling of a dynamic fp8 quantisation."""
    y = F.silu(gate) * up
    groups = y.unflatten(-1, (-1, group_size or y.shape[-1])).float()
    scale = groups.abs().amax(-1, keepdim=True) / 448.0
    q = (groups / scale).clamp(-448.0, 448.0).to(FP8)
    return q.flatten(-2), scale.squeeze(-1)


def entries() -> list[Entry]:
    """Everything that races."""
    tokens = [
        ActivationConfig(span, 1, warps) for span, warps in ((32768, 16), (32768, 8), (32768, 32))
    ]
    quant = [
        ActivationConfig(128, spans, warps)
        for spans, warps in ((16, 4), (8, 2), (32, 4), (32, 8), (8, 4), (64, 8), (4, 1))
    ]
    plain = [
        ActivationConfig(span, spans, warps)
        for span, spans, warps in ((1024, 2, 4), (1024, 1, 4), (2048, 1, 4), (1024, 4, 4))
    ]
    grouped = {"out_dtype": FP8, "group_size": 128}
    found = [
        Entry(rope_qk, "2x4096 h32/8 d128", LLAMA, ROPE_CONFIGS, neox),
        Entry(rope_qk, "128x1 h32/8 d128", DECODE, ROPE_CONFIGS, neox),
        Entry(rope_qk, "1x4096 h128/1 d64 in->half", DEEPSEEK, ROPE_CONFIGS[:3], interleaved),
        Entry(rope_qk, "1x4096 h128/1 d64 complex", COMPLEX, ROPE_CONFIGS[:2]),
        Entry(
            qk_norm_rope, "2x4096 h32/8 d128", replace(LLAMA, **QWEN3), ROPE_CONFIGS[:4], qk_norm
        ),
        Entry(
            qk_norm_rope, "128x1 h32/8 d128", replace(DECODE, **QWEN3), ROPE_CONFIGS[:7], qk_norm
        ),
    ]
    for rows in (4096, 64):
        problem = activation_problem(rows, 18432, **grouped)
        found.append(
            Entry(act_and_mul_quant, f"{rows}x18432 g128", problem, quant, silu_and_mul_quant)
        )
        problem = activation_problem(rows, 18432)
        found.append(Entry(act_and_mul, f"{rows}x18432", problem, plain, silu_and_mul))
        problem = activation_problem(rows, 18432, out_dtype=FP8)
        found.append(
            Entry(act_and_mul_quant, f"{rows}x18432 token", problem, tokens, silu_and_mul_quant)
        )
    problem = activation_problem(4096, 14336, arguments="grad gate up")
    found.append(Entry(act_and_mul_backward, "4096x14336", problem, plain))
    return found


def as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    """Results of an op, one or several."""
    return value if isinstance(value, tuple) else (value,)


def largest_error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest magnitude of its row; fp8 by its scale."""
    worst = 0.0
    ours, theirs = as_tuple(actual), as_tuple(expected)
    if len(ours) == 2 and ours[0].dtype in (FP8, torch.int8):
        ours, theirs = dequantised(*ours), dequantised(*theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        assert a.numel() == 0 or all(
            n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)
        ), (a.shape, a.stride(), b.stride())
        if a.numel():
            a, b = a.float(), b.float()
            peak = b.abs().amax(-1, keepdim=True).clamp_min(1e-9)
            worst = max(worst, ((a - b).abs() / peak).max().item())
    return worst


def dequantised(q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`q * scale` in float32, and the scale."""
    groups = q.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
    return groups.flatten(-2), scale


def check() -> None:
    """Every op and layout against its reference, on this GPU."""
    cases: list[tuple[Op, Any]] = []
    small = {"batch": 3, "num_tokens": 37, "table_batch": 3}
    for i in (False, True):
        for o in (False, True):
            for width, rotary, head in (
                (128, 128, 128),
                (64, 128, 128),
                (48, 96, 96),
                (32, 64, 80),
            ):
                style = {"interleaved_in": i, "interleaved_out": o, "transposed": i and width == 64}
                sizes = {"table_width": width, "rotary_dim": rotary, "head_dim": head}
                cases.append((rope_qk, replace(LLAMA, **small, **style, **sizes)))
    cases += [
        (rope_qk, replace(LLAMA, num_tokens=0)),
        (rope_qk, replace(DECODE, table_dtype=F32)),
        (qk_norm_rope, replace(LLAMA, **small, **QWEN3)),
        (qk_norm_rope, replace(LLAMA, **small, weight_dtype=BF16, weight_offset=1.0)),
    ]
    for activation in ACTIVATIONS:
        for rows, N in ((37, 18432), (5, 1000), (0, 256)):
            shape = activation_problem(rows, N, activation=activation)
            group = 128 if N % 128 == 0 else 8
            cases += [
                (act_and_mul, shape),
                (act_and_mul, replace(shape, last_strides=(2, 2))),
                (act_and_mul_backward, replace(shape, arguments="grad gate up")),
                (act_and_mul_quant, replace(shape, out_dtype=FP8, group_size=group)),
                (act_and_mul_quant, replace(shape, out_dtype=torch.int8)),
                (
                    act_and_mul_quant_static,
                    replace(shape, out_dtype=FP8, arguments="gate up scale"),
                ),
            ]
    worst: dict[str, float] = {}
    for op, problem in cases:
        args, kwargs = problem.sample(seed=1, device="cuda")
        error = largest_error(
            op.providers["triton"].run(*args, **kwargs), op.reference(*args, **kwargs)
        )
        limit = 0.08 if getattr(problem, "out_dtype", BF16) == FP8 else 2**-6
        assert error <= limit, f"{op.name} {problem}: error {error}"
        worst[op.name] = max(worst.get(op.name, 0.0), error)
    check_compiled()
    print(f"checked {len(cases)} cases;", " ".join(f"{n}={e:.1e}" for n, e in worst.items()))


def check_compiled() -> None:
    """The kernel as a node of an Inductor graph with symbolic sizes."""

    def model(q: Any, k: Any, cos: Any, sin: Any, gate: Any, up: Any) -> Any:
        rotated = torch.ops.aiter_inductor.rope_qk(q + 1, k, cos, sin)
        return *rotated, torch.ops.aiter_inductor.act_and_mul(gate * 2, up, activation="silu")

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in (37, 5, 1, 0, 64):
        args, _ = replace(LLAMA, num_tokens=tokens).sample(seed=2, device="cuda")
        (gate, up), _ = activation_problem(tokens * 3, 1024).sample(seed=2, device="cuda")
        expected = (
            *rope_qk.reference(args[0] + 1, *args[1:]),
            act_and_mul.reference(gate * 2, up, activation="silu"),
        )
        error = largest_error(compiled(*args, gate, up), expected)
        assert error <= 2**-6, f"compiled, {tokens} tokens: error {error}"


def copy_rate() -> float:
    """Bytes per µs of a device copy, read and written."""
    x = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (1e3 * median_ms(lambda: y.copy_(x)))


def median_ms(run: Callable[[], Any]) -> float:
    """Median time of a call, with the L2 cache flushed between calls."""
    return triton.testing.do_bench(run, warmup=15, rep=60, return_mode="median")


def graph_us(run: Callable[..., Any], sets: list[tuple[Any, ...]]) -> float:
    """µs a call, replayed from one CUDA graph over all input sets."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for args in sets[:2]:
            run(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph):
        for args in sets:
            kept.append(run(*args))  # outputs of their own, or they would stay in L2
    samples = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / len(sets))
    return statistics.median(samples[2:])


def race(entry: Entry, rate: float) -> None:
    """Time all candidates of one entry and print them."""
    size_bytes = entry.problem.bytes_moved()
    floor = size_bytes / rate
    small = size_bytes < SMALL_BYTES
    count = min(ROTATED_BYTES // size_bytes + 1, 200) if small else 1
    samples = [entry.problem.sample(seed=s, device="cuda") for s in range(count)]
    sets, kwargs = [args for args, _ in samples], samples[0][1]
    kernel = entry.op.providers["triton"].run
    runs: dict[str, Callable[..., Any]] = {"default": lambda *a: kernel(*a, **kwargs)}
    for config in entry.configs:
        name = str(config).split("(")[1][:-1]
        runs[name] = lambda *a, config=config: kernel(*a, **kwargs, config=config)
    if entry.formula is not None:
        compiled = torch.compile(entry.formula, dynamic=False)
        runs["torch.compile"] = lambda *a: compiled(*a, **kwargs)
    found: dict[str, float] = {}
    for name, run in runs.items():
        if small:
            found[name] = graph_us(run, sets)
        else:
            found[name] = 1e3 * median_ms(lambda run=run: run(*sets[0]))
    best = min(found, key=found.__getitem__)
    for name, us in sorted(found.items(), key=lambda item: item[1]):
        mark = "*" if name == best else " "
        line = f"{entry.op.name:18} {entry.shape:28} {name:42}"
        print(f"{line} {us:9.2f} µs {us / floor:6.2f}x floor {floor:7.2f} {mark}", flush=True)


def main() -> None:
    """Check, then race."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", help="substrings of op names; all by default")
    parser.add_argument("--skip-check", action="store_true")
    options = parser.parse_args()
    started = time.time()
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    if not options.skip_check:
        check()
    rate = copy_rate()
    print(f"copy {rate / 1e3:.0f} GB/s; {time.time() - started:.0f} s so far")
    for entry in entries():
        if not options.only or any(word in entry.op.name for word in options.only):
            race(entry, rate)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
