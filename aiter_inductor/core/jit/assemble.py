"""AMDGCN assembly text to a code object, with the assembler and linker of the triton wheel.

Runs as a program too (`python assemble.py in.s out.co --arch gfx942`): builds start it by its path,
so that nothing but Triton is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path


class AssemblerError(Exception):
    """Assembly that LLVM refused; the message holds its lines."""


def assemble(text: str, arch: str) -> bytes:
    """Assemble and link `text` for `arch`.

    Triton's assembler reports an error by returning no bytes and by writing to file descriptor 2
    of the process, so that descriptor is captured meanwhile.

    Raises:
        AssemblerError: with the diagnostics, each naming its line.
    """
    from triton._C.libtriton import amd, llvm

    llvm.init_targets()
    with tempfile.TemporaryDirectory() as directory:
        diagnostics = Path(directory, "stderr")
        with diagnostics.open("wb") as sink:
            sys.stderr.flush()
            saved = os.dup(2)
            os.dup2(sink.fileno(), 2)
            try:
                relocatable = amd.assemble_amdgcn(text, arch, "")
            finally:
                os.dup2(saved, 2)
                os.close(saved)
        if not relocatable:
            lines = diagnostics.read_text(errors="replace").strip()
            raise AssemblerError(lines or f"the assembler gave no object for {arch} and no reason")
        unlinked, linked = Path(directory, "kernel.o"), Path(directory, "kernel.co")
        unlinked.write_bytes(relocatable)
        try:
            amd.link_hsaco(str(unlinked), str(linked))
        except RuntimeError as error:
            raise AssemblerError(f"linking for {arch} failed: {error}") from error
        return linked.read_bytes()


def main() -> int:
    """Command line: input, output and `--arch`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--arch", required=True)
    arguments = parser.parse_args()
    try:
        code_object = assemble(arguments.input.read_text(), arguments.arch)
    except AssemblerError as error:
        print(error, file=sys.stderr)
        return 1
    arguments.output.write_bytes(code_object)
    return 0


if __name__ == "__main__":
    # A program's directory leads sys.path, and the files beside this one are not top-level modules.
    del sys.path[0]
    sys.exit(main())
