"""The wrappers of Hopper's instructions: they compile everywhere, and multiply on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.launch import KernelSignature, pointer, tensor_map, tensor_map_of
from aiter_inductor.kernels import cuda
from aiter_inductor.kernels.cuda.loading import load_kernel
from tests.kernels.cuda.compiling import compiled

M, N, K = 64, 128, 64
KINDS = [(False, False), (False, True), (True, False), (True, True)]


@dataclass(frozen=True)
class Product:
    """instructions.cu with these operands."""

    a_in_registers: bool
    b_mn: bool

    def module(self) -> jit.Module:
        defines = (
            ("A_IN_REGISTERS", str(int(self.a_in_registers))),
            ("COLUMNS_OF_B", str(int(self.b_mn))),
        )
        headers = Path(str(cuda.__file__)).parent
        return jit.Module(
            "instructions",
            (Path(__file__).with_name("instructions.cu"),),
            include_dirs=(headers,),
            defines=defines,
        )

    def signature(self) -> KernelSignature:
        parameters = (tensor_map_of("a_map"), tensor_map_of("b_map"), pointer("out", torch.float32))
        return KernelSignature("product", parameters)


@pytest.mark.parametrize(("a_in_registers", "b_mn"), KINDS)
def test_wrappers_compile_without_spills(a_in_registers, b_mn, tmp_path):
    artifact = compiled(Product(a_in_registers, b_mn), tmp_path)
    assert "warning" not in artifact.log
    assert " 0 bytes spill stores" in artifact.log or "nvrtc" in artifact.compiler


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU with wgmma")
@pytest.mark.parametrize(("a_in_registers", "b_mn"), KINDS)
def test_products_are_those_of_float64(a_in_registers, b_mn):
    a = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    b = torch.randn((K, N) if b_mn else (N, K), device="cuda", dtype=torch.bfloat16)
    out = torch.full((M, N), float("nan"), device="cuda")
    kernel = load_kernel(Product(a_in_registers, b_mn), "sm_90", "cuda")
    maps = tensor_map(a, (M, 64)), tensor_map(b, (K if b_mn else N, 64))
    kernel.launch(1, 128, 32768 + 1024, *maps, out)
    exact = a.double() @ (b.double() if b_mn else b.double().T)
    assert torch.allclose(out.double(), exact, rtol=1e-4, atol=1e-4)
