"""Assemble and link AMDGCN text with the assembler inside the triton wheel, where installed."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

from cdnasim.asm_parse import AssemblyError

_stderr_lock = threading.Lock()


def assemble(text: str, arch: str) -> bytes:
    """The linked code object of `text`, an assembly file for `arch` (gfx942 or gfx950).

    The triton wheel's assembler prints its diagnostics on the process's standard error and
    returns no bytes; they are caught here.

    Raises:
        AssemblyError: the text does not assemble or link; the message holds the diagnostics.
        ImportError: triton is not installed.
    """
    from triton._C.libtriton import amd, llvm

    llvm.init_targets()
    with tempfile.TemporaryDirectory() as work, _stderr_lock:
        log = Path(work) / "stderr"
        saved = os.dup(2)
        with log.open("wb") as sink:
            os.dup2(sink.fileno(), 2)
        try:
            relocatable = amd.assemble_amdgcn(text, arch, "")
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        if not relocatable:
            raise AssemblyError(
                f"{arch}: {log.read_text().strip() or 'the assembler returned no bytes'}"
            )
        source, linked = Path(work) / "kernel.o", Path(work) / "kernel.co"
        source.write_bytes(relocatable)
        try:
            amd.link_hsaco(str(source), str(linked))
        except RuntimeError as error:
            raise AssemblyError(f"{arch}: linking failed: {error}") from error
        return linked.read_bytes()
