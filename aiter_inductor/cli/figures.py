"""`figures`: what the compilers made of every HIP and Triton kernel for AMD chips, as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiter_inductor.cli.bench import version_of
from aiter_inductor.cli.cases import FAMILIES, case_of, load_ops
from aiter_inductor.cli.family import Dims
from aiter_inductor.cli.prebuild import chips, host_functions
from aiter_inductor.core import jit
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.errors import UnknownOptionError
from aiter_inductor.core.op import Use

if TYPE_CHECKING:
    from cdnasim import StaticFigures

LANGUAGES = ("hip", "triton")
COLUMNS = (
    "op", "kernel", "by", "chip", "VGPR", "AGPR", "SGPR", "LDS", "scratch", "VGPR spills",
    "SGPR spills", "occupancy", "B/load", "B/store", "MFMA",
)  # fmt: skip
PREAMBLE = """# What the compilers made of each kernel

`python -m aiter_inductor figures --out docs/figures.md` writes this file; no GPU is needed. Every
op at the default sizes of `python -m aiter_inductor bench <op>`. Compilers: {compilers}.

VGPR: registers of a lane, AGPR included. LDS: bytes of a workgroup. Scratch: bytes of a lane.
Spills without scratch went to unused registers, vector ones to AGPR, scalar ones to VGPR lanes.
Occupancy: waves of a SIMD that registers and LDS allow, of at most 8. B/load, B/store: mean bytes
of a lane in a global access. MFMA: matrix instructions' share of the issue cycles of the loop that
has most of them.

"""


@dataclass(frozen=True)
class Measured:
    """One kernel of one op, for one chip.

    Attributes:
        op: what it computes.
        language: `hip` or `triton`.
        figures: what is known of its code.
    """

    op: str
    language: str
    figures: StaticFigures

    def cells(self) -> tuple[str, ...]:
        """As `COLUMNS` names them."""
        f = self.figures
        return (
            self.op,
            f"`{f.kernel}`",
            self.language,
            f.arch,
            *map(str, (f.vgprs, f.agprs, f.sgprs, f.lds_bytes, f.scratch_bytes)),
            *map(str, (f.vgpr_spills, f.sgpr_spills, f.occupancy)),
            *(f"{mean:.1f}" for mean in (f.bytes_per_load, f.bytes_per_store)),
            f"{f.mfma_share:.0%}" if f.mfma_share else "",
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ops, chips and file."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: every op with a kernel")
    parser.add_argument("--arch", default="gfx942,gfx950", help="chips, separated by commas")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: printed")


def run(arguments: argparse.Namespace) -> int:
    """Compile and write; returns 1 if a kernel spills registers to memory, else 0."""
    if unknown := [name for name in arguments.ops if name not in FAMILIES]:
        raise UnknownOptionError(unknown[0], FAMILIES)
    archs, found = chips(arguments.arch), []
    for op in arguments.ops or FAMILIES:
        print(op, file=sys.stderr, flush=True)
        found += [measured for arch in archs for measured in figures_of(op, arch)]
    text = PREAMBLE.format(compilers=compilers(archs)) + markdown(found)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")
    spilling = [measured for measured in found if measured.figures.scratch_bytes]
    for measured in spilling:
        print(f"spills to memory: {' '.join(measured.cells())}", file=sys.stderr)
    return int(bool(spilling))


def compilers(archs: Sequence[str]) -> str:
    """What compiled, with versions."""
    settings = jit.default_settings()
    clangs = {jit.find_compiler(arch, settings).identity for arch in archs}
    return f"Triton {version_of('triton')} and {', '.join(sorted(clangs))}"


def markdown(found: Sequence[Measured]) -> str:
    """A table, one line a kernel and chip."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(measured.cells() for measured in found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figures_of(op: str, arch: str, dims: Dims | None = None) -> Iterator[Measured]:
    """Every kernel that `op` launches on `arch`, in each language.

    Args:
        dims: sizes; None for those that `bench` takes.
    """
    chip = arch_named(arch)
    (fp8, *_) = chip.fp8_dtypes
    sizes = FAMILIES[op].dims if dims is None else dims
    args, kwargs = FAMILIES[op].example(sizes, fp8)
    for language in LANGUAGES:
        provider = load_ops()[op].providers.get(language)
        problem = case_of(op, sizes, fp8).problem
        if provider is None or not provider.serves(chip):
            continue
        if provider.refuse(problem, Use(chip)):
            continue
        of = {"hip": _of_hip, "triton": _of_triton}[language]
        for each in of(op, arch, args, kwargs):
            yield Measured(op, language, each)


def _of_hip(op: str, arch: str, args: Any, kwargs: Any) -> Iterator[StaticFigures]:
    from aiter_inductor.kernels.hip import loading
    from cdnasim import load, static_figures

    with loading.collecting_variants(arch) as variants:
        host_functions("hip")[op](*args, **kwargs)
    for variant in variants:
        artifact = jit.load(variant.module(), arch, jit.default_settings())
        name, listing = variant.signature().name, artifact.listing()
        if listing is None:
            raise jit.BuildError(f"{artifact.path.name} was built without a listing")
        yield static_figures(load(listing, artifact.read(), arch=arch, name=name))


def _of_triton(op: str, arch: str, args: Any, kwargs: Any) -> Iterator[StaticFigures]:
    from aiter_inductor.kernels.triton.simulated import compiling
    from cdnasim import load, static_figures

    provider = load_ops()[op].providers["triton"]
    with compiling(arch) as compiled:
        provider.run(*args, **kwargs)
    known = {each.binary: each for each in compiled}
    for each in known.values():
        kernel = load(each.listing, each.binary, arch=arch, name=each.name)
        yield static_figures(kernel, shared_bytes=each.shared_bytes, work_items=each.threads)
