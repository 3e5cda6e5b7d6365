"""A functional simulator of gfx942 and gfx950 machine code, with checks. See README.md."""

from __future__ import annotations

from cdnasim.asm_parse import AssemblyError, Instruction
from cdnasim.assembler import assemble
from cdnasim.elfload import CodeObjectError, KernelDescriptor
from cdnasim.figures import StaticFigures, static_figures
from cdnasim.findings import Check, Finding, FindingKind, Place, SimulationError
from cdnasim.kernel import Kernel, Run, TraceEntry, TraceRequest, load
from cdnasim.native import BuildError
from cdnasim.profile import Profile, ProfileRow

__all__ = [
    "AssemblyError",
    "BuildError",
    "Check",
    "CodeObjectError",
    "Finding",
    "FindingKind",
    "Instruction",
    "Kernel",
    "KernelDescriptor",
    "Place",
    "Profile",
    "ProfileRow",
    "Run",
    "SimulationError",
    "StaticFigures",
    "TraceEntry",
    "TraceRequest",
    "assemble",
    "load",
    "static_figures",
]
