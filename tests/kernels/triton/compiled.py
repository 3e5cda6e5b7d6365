"""Compile, without a GPU, the kernels that a host function would launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8",
}
OPTIONS = ("num_warps", "num_stages")


@dataclass
class Recorder:
    """Stands in for `launchable`: keeps what would be launched."""

    launches: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, kernel: Any) -> Any:
        recorder = self

        class Grid:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def launch(*args: Any, **kwargs: Any) -> None:
                    named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
                    recorder.launches.append((kernel, named))

                return launch

        return Grid()


def compiled(
    modules: list[ModuleType], run: Callable[[], Any], target: str, *, floats: str = "fp32"
) -> list[triton.compiler.CompiledKernel]:
    """Each kernel that `run` launches through `modules`, compiled for `target`.

    Args:
        floats: how Python floats arrive: fp32 from Triton's launcher, fp64 from Inductor's.
    """
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "launchable", recorder)
        run()
    return [_compile(kernel, named, TARGETS[target], floats) for kernel, named in recorder.launches]


def _compile(kernel: Any, named: dict[str, Any], target: GPUTarget, floats: str) -> Any:
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    if target.warp_size == 64:
        options["num_warps"] = max(options["num_warps"] // 2, 1)
    signature, constants, attributes = {}, {}, {}
    declared = {p.name: p.is_constexpr for p in kernel.params}
    for position, name in enumerate(kernel.arg_names):
        value = named[name]
        if declared[name] or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = floats
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)
