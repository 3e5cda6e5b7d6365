"""Compile with hiprtc or NVRTC, whose C interfaces differ in their prefix only.

Runs as a program (`python rtc.py in.hip out.co --library … --prefix hiprtc -- flags`), so that a
crash in the library ends the build and not the user's process.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path


def compile_source(source: Path, library: str, prefix: str, flags: list[str]) -> tuple[bytes, str]:
    """Compile one file.

    Returns:
        binary: a code object (hiprtc) or cubin (nvrtc); empty when the compilation failed.
        log: what the compiler said.
    """
    rtc = ctypes.CDLL(library)
    program = ctypes.c_void_p()
    text, name = source.read_bytes(), source.name.encode()
    _check(
        getattr(rtc, f"{prefix}CreateProgram")(ctypes.byref(program), text, name, 0, None, None),
        f"{prefix}CreateProgram",
    )
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    failed = getattr(rtc, f"{prefix}CompileProgram")(program, len(flags), options)
    log = _fetch(rtc, prefix, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
    if failed:
        return b"", log or f"{prefix}CompileProgram returned {failed} and no log"
    return _fetch(rtc, prefix, "CUBIN" if prefix == "nvrtc" else "Code", program), log


def _fetch(rtc: ctypes.CDLL, prefix: str, what: str, program: ctypes.c_void_p) -> bytes:
    size_bytes = ctypes.c_size_t()
    get_size = f"{prefix}Get{what}Size"
    _check(getattr(rtc, get_size)(program, ctypes.byref(size_bytes)), get_size)
    buffer = ctypes.create_string_buffer(size_bytes.value)
    _check(getattr(rtc, f"{prefix}Get{what}")(program, buffer), f"{prefix}Get{what}")
    return buffer.raw


def _check(status: int, what: str) -> None:
    if status:
        raise OSError(f"{what} returned {status}")


def main() -> int:
    """Command line: input, output, library and compiler flags; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--library", required=True)
    parser.add_argument("--prefix", choices=("hiprtc", "nvrtc"), required=True)
    split = sys.argv.index("--")
    arguments = parser.parse_args(sys.argv[1:split])
    flags = sys.argv[split + 1 :]
    binary, log = compile_source(arguments.input, arguments.library, arguments.prefix, flags)
    if log:
        print(log, file=sys.stderr)
    if not binary:
        return 1
    arguments.output.write_bytes(binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
