"""Races of `benchmarks.race_kernels`: ops, shapes, launch parameters, the models' own spellings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton

from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core.op import Op
from aiter_inductor.kernels.triton.activation import ActivationConfig
from aiter_inductor.kernels.triton.norm_backward import backward_config
from aiter_inductor.kernels.triton.rope import RopeConfig
from aiter_inductor.kernels.triton.rows import RowConfig
from aiter_inductor.lowerings.activation_problem import ActivationProblem
from aiter_inductor.lowerings.rope_problem import RopeProblem
from aiter_inductor.lowerings.rows import RowProblem

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
INDUCTOR = "torch.compile"
OPS = load_ops()
SMS = (
    torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
)


@dataclass(frozen=True)
class Race:
    """One op at one shape.

    Attributes:
        name: of the op.
        shape: for a reader.
        problem: makes the inputs and counts the bytes.
        default: what the kernel runs without a config.
        configs: what it might run.
        formula: the models' own spelling; None for the op's reference.
    """

    name: str
    shape: str
    problem: Any
    default: Any
    configs: tuple[Any, ...]
    formula: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        """As a line of the table begins."""
        return f"{self.name} {self.shape}"

    @property
    def op(self) -> Op:
        """The op itself."""
        return OPS[self.name]

    def candidates(self) -> dict[str, Any]:
        """Configs by name, None for the default; none that equals it."""
        others = {named(c): c for c in self.configs if c != self.default}
        return {"default": None, **others}

    def runs(self, kwargs: dict[str, Any]) -> dict[str, Callable[..., Any]]:
        """What to time, by name, each called with the op's positional arguments."""
        kernel = functools.partial(self.op.providers["triton"].run, **kwargs)
        found: dict[str, Callable[..., Any]] = {
            name: functools.partial(kernel, config=config)
            for name, config in self.candidates().items()
        }
        for language in filter(self.op.providers.__contains__, ("hip", "cuda")):
            found[language] = functools.partial(self.op.providers[language].run, **kwargs)
        formula = self.formula or self.op.reference
        found[INDUCTOR] = torch.compile(lambda *args: formula(*args, **kwargs), dynamic=False)
        return found


def named(config: Any) -> str:
    """A config in a few characters."""
    letters = {"num_warps": "w", "programs": "p", "num_stages": "s", "block": "b", "rows": "r"}
    fields = {name: value for name, value in asdict(config).items() if value is not None}
    return " ".join(f"{letters.get(name, name + '=')}{value}" for name, value in fields.items())


def row_configs(N: int, few: bool) -> tuple[RowConfig, ...]:
    """Whole rows, chunked; where there are many of them, also persistent programs."""
    if few:
        sizes = [(b, w) for b in (8192, 4096, 2048) for w in (8, 16)] + [(1024, 8), (8192, 32)]
        found = [RowConfig(block, 1, warps) for block, warps in sizes]
    else:
        plain = [(1024, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16)]
        found = [RowConfig(block, 1, warps) for block, warps in plain]
        persistent = [(8192, 8, 4, 1), (8192, 16, 2, 1), (8192, 16, 1, 1)]
        persistent += [(4096, 8, 2, 2), (2048, 8, 2, 2)]
        found += [RowConfig(b, 1, w, per_sm * SMS, s) for b, w, per_sm, s in persistent]
    return tuple(config for config in found if config.block <= triton.next_power_of_2(N))


def group_configs(group_size: int) -> tuple[RowConfig, ...]:
    """Groups as rows of their own."""
    plain = [(16, 2), (16, 4), (8, 1), (32, 4), (32, 8), (64, 4), (64, 8)]
    persistent = [(16, 4, 16), (32, 4, 8), (32, 4, 16)]
    return (
        *(RowConfig(group_size, rows, warps) for rows, warps in plain),
        *(RowConfig(group_size, rows, warps, per_sm * SMS) for rows, warps, per_sm in persistent),
    )


def backward_configs(N: int) -> tuple[RowConfig, ...]:
    """Rows in one block, and the programs that share the weight's gradient."""
    block = triton.next_power_of_2(N)
    sizes = [(1, 4, 4), (1, 8, 1), (1, 8, 2), (1, 8, 4), (1, 16, 1), (1, 16, 2), (1, 16, 4)]
    sizes += [(2, 8, 2), (2, 16, 1), (2, 16, 2)]
    return tuple(RowConfig(block, rows, warps, p * SMS) for rows, warps, p in sizes)


def row_race(name: str, num_rows: int, N: int, group_size: int | None = None) -> Race:
    """An op over rows of bf16; the ops that quantise write fp8."""
    op = OPS[name]
    parameters = op.signature.parameters.values()
    taken = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    problem = RowProblem(
        " ".join(taken),
        num_rows,
        N,
        BF16,
        residual_dtype=BF16 if {"grad", "residual"} & set(taken) else None,
        weight_dtype=BF16 if "weight" in taken else None,
        bias_dtype=BF16 if "bias" in taken else None,
        out_dtype=FP8 if "dtype" in op.signature.parameters else BF16,
        group_size=group_size,
    )
    if name.endswith("_backward"):
        default, configs = backward_config(N), backward_configs(N)
        default = replace(default, programs=2 * SMS)
    elif name == "quant_per_group" and group_size:
        groups = num_rows * N // group_size
        default = RowConfig.default(group_size, 2, num_rows=groups)
        configs = group_configs(group_size)
    else:
        default = RowConfig.default(
            N,
            2,
            num_rows=num_rows,
            group_size=group_size or 1,
            reduces_alone=name.startswith(("rms_norm", "layer_norm")),
            centres=name.startswith("layer_norm"),
        )
        configs = row_configs(N, few=num_rows <= 256)
    group = f" g{group_size}" if group_size else ""
    return Race(name, f"{num_rows}x{N}{group}", problem, default, configs)


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
QWEN3 = {"weight_dtype": BF16, "round_before_weight": True}
WIDE_HEADS = [(4, 8, 4), (2, 8, 4), (8, 8, 4), (4, 8, 8), (1, 8, 1), (1, 8, 2), (2, 8, 2)]
WIDE_HEADS += [(1, 32, 4), (4, 4, 4), (8, 4, 4)]
NARROW_HEADS = [(8, 8, 4), (4, 8, 4), (16, 8, 4), (4, 8, 2), (2, 8, 1), (4, 16, 4), (8, 16, 4)]
NARROW_HEADS += [(2, 32, 4), (1, 64, 4), (1, 128, 8)]


def rope_race(
    name: str, problem: RopeProblem, formula: Callable[..., Any] | None, note: str = ""
) -> Race:
    """Rotation of q and k."""
    p = problem
    shape = f"{p.batch}x{p.num_tokens} h{p.num_heads}/{p.num_kv_heads} d{p.head_dim}{note}"
    normed = name == "qk_norm_rope"
    default = RopeConfig.default(problem.num_heads, problem.head_dim, normed=normed)
    sizes = WIDE_HEADS if problem.head_dim >= 128 else NARROW_HEADS
    return Race(name, shape, problem, default, tuple(RopeConfig(*s) for s in sizes), formula)


ROWS_OF_ACTIVATION = [(1024, 2, 4), (1024, 1, 4), (2048, 1, 4), (1024, 4, 4), (1024, 1, 2)]
ROWS_OF_ACTIVATION += [(2048, 2, 8), (1024, 2, 8), (2048, 1, 8), (2048, 4, 8)]
GROUPS = [(16, 4), (8, 2), (32, 4), (32, 8), (8, 4), (64, 8), (4, 1), (16, 8), (16, 2)]
TOKENS = [(2048, 4), (1024, 4), (2048, 8), (4096, 8), (2048, 16), (4096, 16), (8192, 16)]
TOKENS += [(4096, 32), (8192, 32), (32768, 16)]


def activation_race(num_rows: int, N: int, scales: str = "") -> Race:
    """A gated SiLU in bf16; `scales` is empty, `token`, or `g` and a group size."""
    problem = ActivationProblem("gate up", num_rows, N, BF16, residual_dtype=BF16, out_dtype=BF16)
    if not scales:
        sizes, shared = ROWS_OF_ACTIVATION, None
        name, formula = "act_and_mul", silu_and_mul
    else:
        group = None if scales == "token" else int(scales[1:])
        problem = replace(problem, out_dtype=FP8, group_size=group)
        shared = group or N
        sizes = [(group, *g) for g in GROUPS] if group else [(span, 1, w) for span, w in TOKENS]
        name, formula = "act_and_mul_quant", silu_and_mul_quant
    default = ActivationConfig.default(N, shared)
    configs = tuple(ActivationConfig(*s) for s in sizes)
    return Race(name, f"{num_rows}x{N} {scales}".rstrip(), problem, default, configs, formula)


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


def large_races() -> Iterator[Race]:
    """What takes 20 µs and more."""
    for name, num_rows, N, group in (
        ("rms_norm", 4096, 7168, None),
        ("rms_norm", 8192, 4096, None),
        ("add_rms_norm", 4096, 7168, None),
        ("add_rms_norm", 8192, 4096, None),
        ("rms_norm_quant", 4096, 7168, None),
        ("rms_norm_quant", 16384, 8192, None),
        ("add_rms_norm_quant", 4096, 7168, 128),
        ("add_rms_norm_quant", 16384, 8192, 128),
        ("layer_norm", 4096, 7168, None),
        ("layer_norm_quant", 4096, 7168, None),
        ("quant_per_group", 4096, 7168, 128),
        ("quant_per_token", 4096, 7168, None),
        ("rms_norm_backward", 4096, 4096, None),
        ("add_rms_norm_backward", 4096, 4096, None),
        ("layer_norm_backward", 4096, 4096, None),
    ):
        yield row_race(name, num_rows, N, group)
    yield rope_race("rope_qk", LLAMA, neox)
    yield rope_race("rope_qk", DEEPSEEK, interleaved)
    yield rope_race("qk_norm_rope", replace(LLAMA, **QWEN3), qk_norm)
    yield rope_race("rope_qk", replace(LLAMA, transposed=True), None, " backward")
    yield activation_race(4096, 18432, "g128")
    yield activation_race(4096, 18432, "token")
    yield activation_race(4096, 14336)


def small_races() -> Iterator[Race]:
    """What a decoding step asks for."""
    yield row_race("rms_norm", 1, 4096)
    for name in ("rms_norm", "add_rms_norm", "rms_norm_quant", "layer_norm", "layer_norm_quant"):
        yield row_race(name, 64, 7168)
    yield row_race("add_rms_norm_quant", 64, 7168, 128)
    yield row_race("quant_per_token", 64, 7168)
    yield row_race("quant_per_group", 64, 7168, 128)
    yield rope_race("rope_qk", DECODE, neox)
    yield rope_race("qk_norm_rope", replace(DECODE, **QWEN3), qk_norm)
    for N in (14336, 18432):
        for scales in ("g128", "token", ""):
            yield activation_race(64, N, scales)


def all_races() -> dict[str, Race]:
    """Every race by its label, the large ones first."""
    return {race.label: race for race in (*large_races(), *small_races())}
