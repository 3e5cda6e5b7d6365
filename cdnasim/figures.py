"""What a compiled kernel says without running: registers, LDS, spills, occupancy, loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cdnasim import native
from cdnasim.asm_parse import Instruction
from cdnasim.kernel import LDS_LIMIT, MAX_WORK_ITEMS, Kernel
from cdnasim.profile import LDS, VMEM, issue_cycles, unit

REGISTERS_PER_LANE = 512  # of a SIMD, vector and accumulation registers together
REGISTER_GRANULE = 8
MAX_WAVES_PER_SIMD = 8
SIMDS_PER_UNIT = 4
WAVE = 64
STORES = 1 << 11  # Op::flags in native/registry.hpp


@dataclass(frozen=True, kw_only=True)
class StaticFigures:
    """Figures of one kernel on one architecture.

    Attributes:
        vgprs: vector registers of a lane, accumulation registers included.
        agprs: of these, accumulation registers.
        sgprs: scalar registers of a wave.
        lds_bytes: of a workgroup, dynamic LDS included.
        scratch_bytes: of a lane.
        vgpr_spills, sgpr_spills: registers spilled to scratch.
        occupancy: waves per SIMD that registers and LDS allow, at most 8.
        bytes_per_load: mean bytes that a lane gets per global or buffer load instruction; 0
            without loads.
        bytes_per_store: the same for stores.
        inner_loop: first and last line of the innermost loop with the most matrix (else issue)
            cycles, or None without loops.
        mfma_share: matrix cycles over all issue cycles of that loop; 0 without one.
    """

    kernel: str
    arch: str
    vgprs: int
    agprs: int
    sgprs: int
    lds_bytes: int
    scratch_bytes: int
    vgpr_spills: int
    sgpr_spills: int
    occupancy: int
    bytes_per_load: float
    bytes_per_store: float
    inner_loop: tuple[int, int] | None
    mfma_share: float


def occupancy(*, vgprs: int, lds_bytes: int, work_items: int, arch: str) -> int:
    """Waves per SIMD: limited by the register file, by LDS, and by 8."""
    allocated = -(-max(vgprs, 1) // REGISTER_GRANULE) * REGISTER_GRANULE
    by_registers = min(MAX_WAVES_PER_SIMD, REGISTERS_PER_LANE // allocated)
    if not lds_bytes:
        return by_registers
    waves_per_group = -(-work_items // WAVE)
    groups = LDS_LIMIT[arch] // lds_bytes
    return min(by_registers, -(-groups * waves_per_group // SIMDS_PER_UNIT))


def own_range(kernel: Kernel) -> range:
    """Instruction numbers of the kernel itself, where the text holds several."""
    starts = sorted(
        kernel.assembly.labels[n] for n in kernel.code.kernels if n in kernel.assembly.labels
    )
    first = kernel.assembly.labels[kernel.name]
    later = [start for start in starts if start > first]
    return range(first, later[0] if later else len(kernel.instructions))


def loops(kernel: Kernel) -> list[range]:
    """The innermost loops: from the target of a backward branch to the branch."""
    within = own_range(kernel)
    found = []
    for pc in within:
        instruction = kernel.instructions[pc]
        if instruction.mnemonic.startswith(("s_branch", "s_cbranch")):
            target = kernel.assembly.labels[instruction.operands[0]]
            if within.start <= target <= pc:
                found.append(range(target, pc + 1))
    return [
        a
        for a in found
        if not any(b != a and a.start <= b.start and b.stop <= a.stop for b in found)
    ]


def cycles(instructions: Sequence[Instruction], only: str | None = None) -> int:
    """Estimated issue cycles, of all instructions or of one unit's."""
    core, numbers = native.library(), native.operations()

    def counts(instruction: Instruction) -> bool:
        number = numbers.get(instruction.mnemonic)
        return number is not None and only in (None, unit(core.cdnasim_op_flags(number)))

    return sum(issue_cycles(instruction) for instruction in instructions if counts(instruction))


def bytes_per_access(instructions: Sequence[Instruction], stores: bool) -> float:
    """Mean bytes per lane of the global and buffer loads, or stores."""
    core, numbers = native.library(), native.operations()
    sizes = []
    for instruction in instructions:
        number = numbers.get(instruction.mnemonic)
        if number is None or instruction.mnemonic.startswith("scratch_"):
            continue
        flags = core.cdnasim_op_flags(number)
        if flags & VMEM and not flags & LDS and bool(flags & STORES) == stores:
            sizes.append(core.cdnasim_op_access_bytes(number))
    return sum(sizes) / len(sizes) if sizes else 0.0


def static_figures(
    kernel: Kernel, *, shared_bytes: int = 0, work_items: int | None = None
) -> StaticFigures:
    """The figures of a loaded kernel.

    Args:
        shared_bytes: dynamic LDS that launches will ask for.
        work_items: of a workgroup; by default the most that the kernel declares.
    """
    body = [kernel.instructions[pc] for pc in own_range(kernel)]
    inner = [[kernel.instructions[pc] for pc in loop] for loop in loops(kernel)]
    hottest = max(inner, key=lambda loop: (cycles(loop, "matrix"), cycles(loop)), default=[])
    metadata, descriptor = kernel.metadata, kernel.descriptor
    vgprs = int(metadata.get(".vgpr_count", descriptor.vgprs))
    lds_bytes = descriptor.lds_bytes + shared_bytes
    items = work_items or int(metadata.get(".max_flat_workgroup_size", MAX_WORK_ITEMS))
    return StaticFigures(
        kernel=kernel.name,
        arch=kernel.arch,
        vgprs=vgprs,
        agprs=int(metadata.get(".agpr_count", descriptor.agprs)),
        sgprs=int(metadata.get(".sgpr_count", 0)),
        lds_bytes=lds_bytes,
        scratch_bytes=descriptor.scratch_bytes,
        vgpr_spills=int(metadata.get(".vgpr_spill_count", 0)),
        sgpr_spills=int(metadata.get(".sgpr_spill_count", 0)),
        occupancy=occupancy(vgprs=vgprs, lds_bytes=lds_bytes, work_items=items, arch=kernel.arch),
        bytes_per_load=bytes_per_access(body, stores=False),
        bytes_per_store=bytes_per_access(body, stores=True),
        inner_loop=(hottest[0].line, hottest[-1].line) if hottest else None,
        mfma_share=cycles(hottest, "matrix") / max(cycles(hottest), 1),
    )
