"""Tiny kernels around single instructions: eight input registers in, up to eight out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import cdnasim

Words = np.ndarray[Any, np.dtype[np.uint32]]
LANES = 64
NUM_INPUTS = 8
LDS_BYTES = 8192
SETTLE = "s_nop 15\ns_nop 7"  # longer than any wait state that an instruction can need

KERNEL = """
\t.amdgcn_target "amdgcn-amd-amdhsa--{arch}"
\t.text
\t.globl probe
\t.p2align 8
\t.type probe,@function
probe:
{body}
\ts_endpgm
\t.size probe, .-probe
\t.rodata
\t.p2align 6
\t.amdhsa_kernel probe
\t\t.amdhsa_group_segment_fixed_size {lds}
\t\t.amdhsa_private_segment_fixed_size {scratch}
\t\t.amdhsa_user_sgpr_kernarg_segment_ptr 1
\t\t.amdhsa_system_sgpr_workgroup_id_x 1
\t\t.amdhsa_next_free_vgpr 512
\t\t.amdhsa_next_free_sgpr 96
\t\t.amdhsa_accum_offset 256
\t\t.amdhsa_float_denorm_mode_32 3
\t\t.amdhsa_float_denorm_mode_16_64 3
\t.end_amdhsa_kernel
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .name: probe
    .symbol: probe.kd
    .kernarg_segment_size: 24
    .kernarg_segment_align: 8
    .group_segment_fixed_size: {lds}
    .private_segment_fixed_size: {scratch}
    .wavefront_size: 64
    .sgpr_count: 96
    .vgpr_count: 512
    .agpr_count: 256
    .sgpr_spill_count: 0
    .vgpr_spill_count: 0
    .max_flat_workgroup_size: 256
    .args:
      - {{.address_space: global, .offset: 0, .size: 8, .value_kind: global_buffer}}
      - {{.address_space: global, .offset: 8, .size: 8, .value_kind: global_buffer}}
      - {{.address_space: global, .offset: 16, .size: 8, .value_kind: global_buffer}}
amdhsa.target: amdgcn-amd-amdhsa--{arch}
amdhsa.version: [1, 2]
...
\t.end_amdgpu_metadata
"""

# v0 is 4 * lane, s[4:5] the inputs, s[6:7] the outputs, s[8:9] a scratch buffer of 16 KiB.
PROLOGUE = """
s_load_dwordx4 s[4:7], s[0:1], 0x0
s_load_dwordx2 s[8:9], s[0:1], 0x10
v_lshlrev_b32 v0, 2, v0
s_waitcnt lgkmcnt(0)
"""


@cache
def build(body: str, arch: str, lds: int = LDS_BYTES, scratch: int = 0) -> cdnasim.Kernel:
    """The kernel `probe` with this body; its arguments are three pointers."""
    text = KERNEL.format(arch=arch, body=body, lds=lds, scratch=scratch)
    return cdnasim.load(text, cdnasim.assemble(text, arch), arch=arch)


def around(body: str, num_outputs: int, num_inputs: int = NUM_INPUTS) -> str:
    """Load v10.. from the inputs, run `body`, store v20.. to the outputs."""
    loads = "\n".join(
        f"global_load_dword v{10 + i}, v0, s[4:5] offset:{256 * i}" for i in range(num_inputs)
    )
    stores = "\n".join(
        f"global_store_dword v0, v{20 + i}, s[6:7] offset:{256 * i}" for i in range(num_outputs)
    )
    return f"{PROLOGUE}{loads}\ns_waitcnt vmcnt(0)\n{body}\n{SETTLE}\n{stores}"


def execute(
    body: str,
    inputs: Words,
    num_outputs: int = 1,
    *,
    arch: str = "gfx950",
    memory: Words | None = None,
    scratch: int = 0,
) -> Words:
    """Outputs [num_outputs, 64] of `body`, with all checks on."""
    outputs = np.zeros((num_outputs, LANES), np.uint32)
    if memory is None:
        memory = np.zeros(4096, np.uint32)
    kernel = build(around(body, num_outputs, len(inputs)), arch, scratch=scratch)
    kernel.launch((1,), (LANES,), [np.ascontiguousarray(inputs, np.uint32), outputs, memory])
    return outputs


@dataclass(frozen=True)
class Case:
    """One instruction in a body, what it is given, and what the ISA document says it returns."""

    body: str
    expected: Callable[..., Any]
    kind: str = "u32"
    outputs: int = 1
    archs: Sequence[str] = ("gfx950",)


SPECIAL_F32 = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-40,
    -1e-40,
    3e38,
    0.5,
    2.5,
    -2.5,
    65504.0,
]


def words(kind: str, seed: int = 0) -> Words:
    """[8, 64] random register contents of a kind: u32, small, f32, finite, f16, f64."""
    rng = np.random.default_rng(seed)
    if kind == "u32":
        data = rng.integers(0, 1 << 32, (NUM_INPUTS, LANES), dtype=np.uint32)
        data[:, :8] = [0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x8000, 0xFFFF, 0x10000]
        return data
    if kind == "small":
        return rng.integers(0, 64, (NUM_INPUTS, LANES), dtype=np.uint32)
    if kind == "f32":
        floats = rng.standard_normal((NUM_INPUTS, LANES)).astype(np.float32) * 8
        for row in floats:
            row[: len(SPECIAL_F32)] = rng.permutation(np.array(SPECIAL_F32, np.float32))
        return floats.view(np.uint32)
    if kind == "finite":
        return (rng.standard_normal((NUM_INPUTS, LANES)).astype(np.float32) * 8).view(np.uint32)
    if kind == "f16":
        halves = (rng.standard_normal((NUM_INPUTS, LANES, 2)) * 4).astype(np.float16)
        return halves.view(np.uint32)[..., 0]
    if kind == "f64":
        doubles = rng.standard_normal((NUM_INPUTS // 2, LANES)) * 100
        return (
            np.stack([doubles.view(np.uint64) & 0xFFFFFFFF, doubles.view(np.uint64) >> 32], 1)
            .reshape(NUM_INPUTS, LANES)
            .astype(np.uint32)
        )
    raise ValueError(kind)


def run_case(case: Case, arch: str) -> None:
    """Execute and compare: bit for bit, except that any NaN equals any NaN in float results."""
    inputs = words(case.kind)
    got = execute(case.body, inputs, case.outputs, arch=arch)
    with np.errstate(all="ignore"):
        want = case.expected(*inputs)
    want = want if isinstance(want, tuple) else (want,)
    for row, value in zip(got, want, strict=True):
        value = np.asarray(value)
        if value.dtype == np.float32:
            actual = row.view(np.float32)
            same = (actual.view(np.uint32) == value.view(np.uint32)) | (
                np.isnan(actual) & np.isnan(value)
            )
        else:
            value = np.broadcast_to(value, row.shape).astype(np.uint64).astype(np.uint32)
            same = row == value
        lane = int(np.argmin(same))
        assert same.all(), (
            f"{case.body!r} lane {lane}: got {row[lane]:#x}, want {value[lane]!r}; inputs "
            f"{[hex(int(register[lane])) for register in inputs]}"
        )


def f32(word: Words) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(word, np.uint32).view(np.float32)


def i32(word: Words) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(word, np.uint32).view(np.int32)


def u64(low: Words, high: Words) -> np.ndarray[Any, Any]:
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def f64(low: Words, high: Words) -> np.ndarray[Any, Any]:
    return u64(low, high).view(np.float64)


def split(value: np.ndarray[Any, Any]) -> tuple[Words, Words]:
    """Low and high words of 64-bit values."""
    bits = np.ascontiguousarray(value).view(np.uint64)
    return (bits & 0xFFFFFFFF).astype(np.uint32), (bits >> np.uint64(32)).astype(np.uint32)


def half(word: Words, high: bool = False) -> np.ndarray[Any, Any]:
    """The low or high half as f16."""
    return ((word >> (16 if high else 0)) & 0xFFFF).astype(np.uint16).view(np.float16)


def bits16(value: np.ndarray[Any, Any]) -> Words:
    return np.asarray(value, np.float16).view(np.uint16).astype(np.uint32)
