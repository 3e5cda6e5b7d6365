"""Compile the test kernels, each once, and run them in the simulator."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import cdnasim

ARCHS = ("gfx942", "gfx950")
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
FP8_NAME = {"gfx942": "fp8e4b8", "gfx950": "fp8e4nv"}


@cache
def compile_triton(
    name: str,
    arch: str,
    signature: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    aligned: bool,
    num_warps: int,
) -> tuple[cdnasim.Kernel, int, int]:
    """Kernel, dynamic LDS bytes and work-items of a kernel in triton_kernels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.cdnasim import triton_kernels

    facts: dict[tuple[int], list[list[Any]]] = {}
    for i, (_, kind) in enumerate(signature):
        if aligned and kind != "fp32":
            facts[(i,)] = [["tt.divisibility", 16]] + (
                [["tt.pointer_range", 32]] if kind[0] == "*" else []
            )
    source = ASTSource(
        getattr(triton_kernels, name),
        {**dict(signature), **{key: "constexpr" for key, _ in constants}},
        dict(constants),
        facts,
    )
    built = triton.compile(
        source, target=GPUTarget("hip", arch, 64), options={"num_warps": num_warps}
    )
    kernel = cdnasim.load(
        built.asm["amdgcn"], built.asm["hsaco"], arch=arch, name=built.metadata.name
    )
    return kernel, built.metadata.shared, 64 * num_warps


def run_triton(
    name: str,
    arch: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    grid: Sequence[int],
    args: Sequence[Any],
    outputs: Sequence[torch.Tensor],
    *,
    aligned: bool = True,
    num_warps: int = 4,
) -> cdnasim.Run:
    kernel, shared, items = compile_triton(
        name, arch, tuple(signature.items()), tuple(constants.items()), aligned, num_warps
    )
    assert kernel.unsupported == {}
    return kernel.launch(grid, (items,), args, shared_bytes=shared, poison=outputs)


@cache
def compile_hip(arch: str, name: str) -> cdnasim.Kernel:
    """A kernel of row_quant.hip, through the ziglang wheel's clang."""
    source = Path(__file__).with_name("row_quant.hip")
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "kernel.s"
        command = [
            sys.executable,
            "-m",
            "ziglang",
            "clang",
            "-x",
            "hip",
            "-std=c++17",
            "--cuda-device-only",
            f"--offload-arch={arch}",
            "-nogpuinc",
            "-nogpulib",
            "-O3",
            "-g1",
            "-S",
            str(source),
            "-o",
            str(text),
        ]
        subprocess.run(command, check=True, capture_output=True)
        assembly = text.read_text()
    return cdnasim.load(assembly, cdnasim.assemble(assembly, arch), arch=arch, name=name)
