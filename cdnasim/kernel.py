"""Load a kernel from assembly text and code object, and execute it on the CPU."""

from __future__ import annotations

import ctypes
import os
import struct
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdnasim import arguments, asm_parse, native
from cdnasim.asm_parse import Assembly, Instruction
from cdnasim.elfload import CodeObject, CodeObjectError
from cdnasim.encode import Encoder
from cdnasim.findings import Check, Finding, FindingKind, Place, SimulationError
from cdnasim.guarded import GuardedMemory
from cdnasim.profile import Profile

ARCHITECTURES = ("gfx942", "gfx950")
LDS_LIMIT = {"gfx942": 64 << 10, "gfx950": 160 << 10}
MAX_WORK_ITEMS = 1024
HIDDEN_ARGUMENT_BYTES = 256
DISPATCH_PACKET_BYTES = 64

Axes = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """Record the first `limit` instructions of one wave of one workgroup."""

    workgroup: Axes = (0, 0, 0)
    wave: int = 0
    limit: int = 10_000


@dataclass(frozen=True, kw_only=True)
class TraceEntry:
    """One executed instruction: EXEC before it; SCC and its first destination register after it.

    `result` is [64] uint32: the lanes of a vector register, or a scalar register repeated.
    """

    place: Place
    exec_mask: int
    scc: int
    result: np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a launch did.

    Attributes:
        findings: defects, in the order of their first occurrence.
        instructions: wave-instructions executed.
        seconds: time of the simulation proper.
        trace: the requested trace, else empty.
    """

    kernel: Kernel
    findings: tuple[Finding, ...]
    instructions: int
    seconds: float
    counts: np.ndarray[Any, Any]
    trace: tuple[TraceEntry, ...]

    def profile(self) -> Profile:
        """Execution counts and estimated issue cycles per instruction."""
        return Profile(self.kernel.instructions, self.counts, self.kernel.arch)


class Kernel:
    """One kernel of a code object, ready to launch. Build it with `load`."""

    def __init__(self, assembly: Assembly, code: CodeObject, *, name: str, arch: str) -> None:
        self.name, self.arch, self.code = name, arch, code
        self.descriptor = code.kernels[name]
        self.metadata = code.metadata.get(name, {})
        self.assembly = assembly
        base = code.base + code.symbols[name].value if name in code.symbols else code.base
        self._code_base = base
        self._records = Encoder(assembly, native.operations(), self._symbol_offset).encode()
        core = native.library()
        self._program = core.cdnasim_prepare(self._records.ctypes.data, len(self._records))
        weakref.finalize(self, core.cdnasim_free_program, self._program)

    def _symbol_offset(self, symbol: str) -> int:
        if symbol not in self.code.symbols:
            raise ValueError(f"the code object has no symbol {symbol}")
        return self.code.base + self.code.symbols[symbol].value - self._code_base

    @property
    def instructions(self) -> list[Instruction]:
        """All instructions of the text, in order."""
        return self.assembly.instructions

    @property
    def unsupported(self) -> dict[str, str]:
        """Mnemonics in the text that cannot be executed → why. They matter only if reached."""
        core = native.library()
        reasons = {}
        for pc, instruction in enumerate(self.instructions):
            if reason := core.cdnasim_unsupported(self._program, pc):
                reasons[instruction.mnemonic] = reason.decode()
        return reasons

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_bytes: int = 0,
        strict: bool = True,
        memory: Sequence[Any] = (),
        poison: Sequence[Any] = (),
        checks: Check = Check.ALL,
        trace: TraceRequest | None = None,
        num_threads: int | None = None,
        max_instructions: int = 50_000_000,
    ) -> Run:
        """Execute the kernel over a grid and write its results into the tensors among `args`.

        Args:
            grid: workgroups per axis, 1 to 3 numbers.
            block: work-items per workgroup and axis, 1 to 3 numbers.
            args: one value per explicit argument, in order: a tensor (torch on the CPU, or numpy)
                or None for a pointer; int, float, bytes or a numpy scalar by value. Trailing
                pointers may be left out and are null.
            shared_bytes: dynamic LDS, on top of what the kernel declares.
            strict: raise if anything was found.
            memory: further tensors that the kernel reaches through pointers in memory. These and
                those in `args` are all that it may touch.
            poison: tensors to fill with NaN bytes first, so that elements left unwritten show.
            checks: which checks to make. Bounds are always checked.
            trace: record one wave.
            num_threads: workgroups run at once; by default one per processor.
            max_instructions: a wave that executes more is stuck.

        Raises:
            SimulationError: something was found, and `strict`.
            ValueError: a launch that the hardware would refuse, or arguments that do not match.
        """
        axes = arguments.Geometry(grid=three(grid, "grid"), block=three(block, "block"))
        lds_bytes = self.check_limits(axes, shared_bytes)
        tensors = [value for value in [*args, *memory, *poison] if arguments.is_tensor(value)]
        guarded = GuardedMemory(tensors)
        for tensor in poison:
            guarded.poison(tensor)
        kernarg = self.pack_arguments(args, axes, shared_bytes, guarded)
        request = self.launch_request(axes, lds_bytes, checks, trace, num_threads, max_instructions)
        run = self.execute(request, kernarg, guarded)
        guarded.copy_out()
        if strict and run.findings:
            raise SimulationError(self.name, run.findings)
        return run

    def check_limits(self, axes: arguments.Geometry, shared_bytes: int) -> int:
        """LDS bytes of a workgroup, after refusing what the hardware would refuse."""
        items = axes.block[0] * axes.block[1] * axes.block[2]
        limit = int(self.metadata.get(".max_flat_workgroup_size", MAX_WORK_ITEMS))
        if not 1 <= items <= limit:
            raise ValueError(f"a workgroup of {items} work-items, {self.name} allows 1 to {limit}")
        if min(axes.grid) < 0:
            raise ValueError(f"grid {axes.grid} has a negative size")
        lds_bytes = self.descriptor.lds_bytes + shared_bytes
        if lds_bytes > LDS_LIMIT[self.arch]:
            raise ValueError(f"{lds_bytes} bytes of LDS, {self.arch} has {LDS_LIMIT[self.arch]}")
        return lds_bytes

    def pack_arguments(
        self,
        args: Sequence[Any],
        axes: arguments.Geometry,
        shared_bytes: int,
        guarded: GuardedMemory,
    ) -> Any:
        """The kernarg segment as a ctypes buffer."""
        size = self.descriptor.kernarg_bytes + HIDDEN_ARGUMENT_BYTES
        declared = self.metadata.get(".args")
        if declared is None:
            raise ValueError(f"{self.name} has no .args metadata to pack {len(args)} arguments by")
        packed = arguments.pack(declared, args, size, axes, shared_bytes, guarded.locate)
        return ctypes.create_string_buffer(packed, size)

    def launch_request(
        self,
        axes: arguments.Geometry,
        lds_bytes: int,
        checks: Check,
        trace: TraceRequest | None,
        num_threads: int | None,
        max_instructions: int,
    ) -> native.Launch:
        """The native launch description, less the addresses that `execute` adds."""
        descriptor, user = self.descriptor, self.descriptor.user_sgprs
        three_ints = ctypes.c_int32 * 3
        if trace is None:
            trace = TraceRequest(limit=0)
        return native.Launch(
            entry=self.assembly.labels[self.name],
            grid=three_ints(*axes.grid),
            block=three_ints(*axes.block),
            lds_bytes=lds_bytes,
            scratch_bytes=descriptor.scratch_bytes,
            is_gfx950=self.arch == "gfx950",
            num_vgprs=min(descriptor.accum_offset if descriptor.agprs else descriptor.vgprs, 256),
            num_agprs=min(descriptor.agprs, 256),
            code_base=self._code_base,
            kernarg_sgpr=user.get("kernarg_segment_ptr", -1),
            dispatch_ptr_sgpr=user.get("dispatch_ptr", -1),
            user_sgprs=descriptor.num_user_sgprs,
            preload_sgpr=user.get("kernarg_preload", 0),
            preload_dwords=descriptor.preload_dwords,
            preload_offset=descriptor.preload_offset,
            group_id_enable=three_ints(*descriptor.group_id_enable),
            float_mode=descriptor.float_mode,
            num_threads=num_threads or os.cpu_count() or 1,
            checks=int(checks),
            max_instructions=max_instructions,
            trace_capacity=trace.limit,
            trace_group=three_ints(*trace.workgroup),
            trace_wave=trace.wave,
            num_instructions=len(self.instructions),
        )

    def execute(self, request: native.Launch, kernarg: Any, guarded: GuardedMemory) -> Run:
        """Run the prepared launch."""
        core = native.library()
        packet = dispatch_packet(request)
        begin, end = self.code.base, self.code.base + self.code.size
        at = ctypes.addressof(kernarg)
        request.kernarg, request.dispatch_packet = at, ctypes.addressof(packet)
        ranges = [(begin, end), (at, at + len(kernarg)), *guarded.ranges()]
        ranges.append((request.dispatch_packet, request.dispatch_packet + DISPATCH_PACKET_BYTES))
        table = np.array(sorted(ranges), np.uint64)
        request.num_ranges = len(table)
        start = time.perf_counter()
        outcome = core.cdnasim_run(self._program, ctypes.byref(request), table.ctypes.data)
        seconds = time.perf_counter() - start
        try:
            return self.collect(outcome, seconds)
        finally:
            core.cdnasim_free_outcome(outcome)

    def collect(self, outcome: int, seconds: float) -> Run:
        """Turn the native outcome into a Run."""
        core = native.library()
        raw = core.cdnasim_findings(outcome)
        count = len(self.instructions)
        counts = np.ctypeslib.as_array(core.cdnasim_counts(outcome), (count,)).copy()
        entries = core.cdnasim_trace(outcome)
        return Run(
            kernel=self,
            findings=tuple(self.finding(raw[i]) for i in range(core.cdnasim_num_findings(outcome))),
            instructions=core.cdnasim_instructions(outcome),
            seconds=seconds,
            counts=counts,
            trace=tuple(
                self.trace_entry(entries[i]) for i in range(core.cdnasim_num_trace(outcome))
            ),
        )

    def place(self, pc: int) -> Place:
        """Where instruction `pc` stands in the text."""
        instruction = self.instructions[pc]
        return Place(line=instruction.line, text=instruction.text, source=instruction.source)

    def finding(self, raw: native.RawFinding) -> Finding:
        """A native finding with its places."""
        return Finding(
            kind=FindingKind(raw.kind),
            message=raw.message.decode(),
            place=self.place(raw.pc),
            related=self.place(raw.other_pc) if raw.other_pc >= 0 else None,
            workgroup=tuple(raw.group),
            wave=raw.wave,
            lane=raw.lane,
            occurrences=raw.occurrences,
        )

    def trace_entry(self, raw: native.RawTraceEntry) -> TraceEntry:
        """A native trace entry with its place."""
        return TraceEntry(
            place=self.place(raw.pc),
            exec_mask=raw.exec,
            scc=raw.scc,
            result=np.array(raw.first, np.uint32),
        )


def three(values: Sequence[int], what: str) -> Axes:
    """Pad to three axes with ones."""
    numbers = [int(value) for value in values]
    if not 1 <= len(numbers) <= 3:
        raise ValueError(f"{what} {tuple(numbers)} has {len(numbers)} axes, 1 to 3 are possible")
    x, y, z = [*numbers, 1, 1][:3]
    return x, y, z


def dispatch_packet(request: native.Launch) -> Any:
    """The AQL packet that s_load of dispatch_ptr reads: workgroup and grid sizes."""
    block, grid = list(request.block), list(request.grid)
    items = [blocks * size for blocks, size in zip(grid, block, strict=True)]
    content = struct.pack(
        "<HHHHHHIIIII", 0, 3, *block, 0, *items, request.scratch_bytes, request.lds_bytes
    )
    return ctypes.create_string_buffer(content, DISPATCH_PACKET_BYTES)


def load(assembly: str, code_object: bytes, *, arch: str, name: str | None = None) -> Kernel:
    """A kernel from its assembly text and the code object assembled from that text.

    The text gives the instructions (findings name its lines), the code object the kernel
    descriptor, the argument layout and constant data.

    Args:
        assembly: AMDGCN assembly: Triton's `asm["amdgcn"]`, clang -S output, or hand-written.
        code_object: the linked ELF file.
        arch: gfx942 or gfx950.
        name: the kernel's symbol; may be omitted if the code object holds only one.

    Raises:
        AssemblyError: text that cannot be read, with its line.
        CodeObjectError: bytes that are not such a code object, or no such kernel in it.
        BuildError: the native core cannot be compiled.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch is {arch}, the simulator models {' and '.join(ARCHITECTURES)}")
    code = CodeObject(code_object)
    if name is None:
        if len(code.kernels) != 1:
            raise CodeObjectError(f"name one of the kernels {sorted(code.kernels)}")
        (name,) = code.kernels
    if name not in code.kernels:
        raise CodeObjectError(f"no kernel {name} among {sorted(code.kernels)}")
    parsed = asm_parse.parse(assembly)
    if name not in parsed.labels:
        raise CodeObjectError(
            f"the assembly text has no label {name}: it is not this kernel's text"
        )
    return Kernel(parsed, code, name=name, arch=arch)
