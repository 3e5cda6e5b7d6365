"""Execution counts per instruction, with an estimate of the cycles each takes to issue.

The estimate is the time that an instruction occupies its own unit for one wave on one compute
unit, in cycles, with no stalls: waits, bank conflicts and cache misses are not in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdnasim import native
from cdnasim.asm_parse import Instruction

# Bits of Op::flags in native/registry.hpp.
VALU, SALU, SMEM, VMEM, LDS, MFMA, TRANS = (1 << bit for bit in range(7))
DGEMM = 1 << 9

# A SIMD has 16 lanes: a wave of 64 takes 4 cycles, the quarter-rate unit 16.
VECTOR_CYCLES, TRANSCENDENTAL_CYCLES, SCALAR_CYCLES, PASS_CYCLES = 4, 16, 4, 4
QUARTER_RATE = ("v_mul_lo_u32", "v_mul_hi_u32", "v_mul_hi_i32", "v_mad_u64_u32", "v_mad_i64_i32")
LDS_BYTES_PER_CYCLE = 128
VMEM_BYTES_PER_CYCLE = 64
LANES = 64


def unit(flags: int) -> str:
    """The unit that executes an operation: matrix, vector, scalar, lds, memory or control."""
    for bit, name in (
        (MFMA, "matrix"),
        (VMEM, "memory"),
        (SMEM, "scalar"),
        (LDS, "lds"),
        (VALU, "vector"),
        (SALU, "scalar"),
    ):
        if flags & bit:
            return name
    return "control"


def small_operands(instruction: Instruction) -> bool:
    """Both operands of an f8f6f4 product are fp6 or fp4, which halves its passes."""
    formats = [int(instruction.modifiers.get(key, "0")) for key in ("cbsz", "blgp")]
    return "f8f6f4" in instruction.mnemonic and min(formats) > 1


def issue_cycles(instruction: Instruction) -> int:
    """Estimated cycles that one wave's execution occupies the unit; 0 for unknown operations."""
    number = native.operations().get(instruction.mnemonic)
    if number is None:
        return 0
    core = native.library()
    flags = core.cdnasim_op_flags(number)
    if flags & MFMA:
        passes = core.cdnasim_op_passes(number)
        return int(passes) * PASS_CYCLES // (2 if small_operands(instruction) else 1)
    if flags & (VMEM | LDS):
        rate = VMEM_BYTES_PER_CYCLE if flags & VMEM else LDS_BYTES_PER_CYCLE
        moved = LANES * core.cdnasim_op_access_bytes(number)
        pairs = 2 if instruction.mnemonic.startswith(("ds_read2", "ds_write2")) else 1
        return max(VECTOR_CYCLES, int(moved) * pairs // rate)
    if flags & VALU:
        slow = (
            flags & TRANS or instruction.mnemonic in QUARTER_RATE or "f64" in instruction.mnemonic
        )
        return TRANSCENDENTAL_CYCLES if slow else VECTOR_CYCLES
    return SCALAR_CYCLES


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One instruction: executions over all waves, and executions times issue cycles."""

    instruction: Instruction
    count: int
    cycles: int
    unit: str


class Profile:
    """The profile of one run. Rows are in program order; unexecuted instructions have count 0."""

    def __init__(
        self, instructions: Sequence[Instruction], counts: np.ndarray[Any, Any], arch: str
    ) -> None:
        self.arch = arch
        core, numbers = native.library(), native.operations()
        self.rows = [
            ProfileRow(
                instruction=instruction,
                count=int(count),
                cycles=int(count) * issue_cycles(instruction),
                unit=unit(core.cdnasim_op_flags(numbers.get(instruction.mnemonic, 0))),
            )
            for instruction, count in zip(instructions, counts, strict=True)
        ]

    @property
    def cycles_by_unit(self) -> dict[str, int]:
        """Estimated cycles of each unit over all waves."""
        totals: dict[str, int] = defaultdict(int)
        for row in self.rows:
            totals[row.unit] += row.cycles
        return dict(totals)

    @property
    def count_by_mnemonic(self) -> dict[str, int]:
        """Executions of each mnemonic over all waves, most first."""
        totals: dict[str, int] = defaultdict(int)
        for row in self.rows:
            if row.count:
                totals[row.instruction.mnemonic] += row.count
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def hottest(self, limit: int = 20) -> list[ProfileRow]:
        """The rows with the most estimated cycles, most first."""
        return sorted(self.rows, key=lambda row: -row.cycles)[:limit]

    def table(self, limit: int = 20) -> str:
        """The hottest rows as text: line, count, cycles, unit, instruction."""
        lines = [f"{'line':>6} {'count':>10} {'cycles':>12} {'unit':<8} instruction"]
        for row in self.hottest(limit):
            at = row.instruction
            lines.append(f"{at.line:>6} {row.count:>10} {row.cycles:>12} {row.unit:<8} {at.text}")
        return "\n".join(lines)
