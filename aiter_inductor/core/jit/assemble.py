"""AMDGCN assembly text to a code object, with the assembler and linker of the triton wheel.

Runs as a program too (`python assemble.py in.s out.co --arch gfx942`): builds start it by its path,
so that nothing but Triton is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class AssemblerError(Exception):
    """Assembly that LLVM refused; the message holds its lines."""


def assemble(text: str, arch: str) -> bytes:
    """Assemble and link `text` for `arch`.

    Raises:
        AssemblerError: with LLVM's diagnostics, each naming its line.
    """
    from triton._C.libtriton import amd, llvm

    llvm.init_targets()
    with tempfile.TemporaryDirectory() as directory:
        unlinked, linked = Path(directory, "kernel.o"), Path(directory, "kernel.co")
        with _captured_stderr(Path(directory, "stderr")) as said:
            unlinked.write_bytes(amd.assemble_amdgcn(text, arch, ""))
        if not unlinked.stat().st_size:
            raise AssemblerError(
                _with_line_numbers(said(), text)
                or f"the assembler gave no object for {arch} and no reason"
            )
        try:
            with _captured_stderr(Path(directory, "stderr")) as said:
                amd.link_hsaco(str(unlinked), str(linked))
        except RuntimeError as error:
            raise AssemblerError(f"linking for {arch} failed: {said() or error}") from error
        return linked.read_bytes()


@contextmanager
def _captured_stderr(file: Path) -> Iterator[Callable[[], str]]:
    """Send file descriptor 2 into `file`; yields what reads it back.

    Triton's assembler reports an error by returning no bytes and by writing to that descriptor.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with file.open("wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield lambda: file.read_text(errors="replace").strip()
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _with_line_numbers(diagnostics: str, text: str) -> str:
    """Number each diagnostic by the line that it quotes, which is all that Triton passes on."""
    numbers: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        numbers.setdefault(line, number)
    lines = diagnostics.splitlines()
    for index, line in enumerate(lines):
        quoted = lines[index + 1] if index + 1 < len(lines) else ""
        if line.startswith("error:") and quoted in numbers:
            lines[index] = f"line {numbers[quoted]}: {line}"
    return "\n".join(lines)


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
