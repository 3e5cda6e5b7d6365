"""FP8 linears on Hopper: the product alone, the layer as compiled, and a model of four layers.

    python benchmarks/fp8_linears.py product   # each provider against torch's scaled_mm
    python benchmarks/fp8_linears.py layer     # quantise + product, against plain Inductor
    python benchmarks/fp8_linears.py model     # Qwen3-8B's shape: bf16, FP8, and FP8 under Inductor

Everything that is compared runs in one process, in alternating rounds; see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aiter_inductor
from aiter_inductor.cli.cases import load_ops
from aiter_inductor.cli.timing import Call, ceilings, measure, ratio, rotation
from aiter_inductor.core.arch import arch_of
from aiter_inductor.core.op import Use
from aiter_inductor.kernels.vendor.gemm import weight_scales
from aiter_inductor.lowerings.gemm_problem import GemmProblem

SHAPES = (
    (64, 2176, 7168),
    (64, 7168, 16384),
    (4096, 4096, 7168),
    (4096, 7168, 16384),
    (4096, 24576, 1536),
    (4096, 7168, 2048),
)
FP8 = torch.float8_e4m3fn
LIBRARY = "torch scaled_mm"
BACKENDS: dict[str, Any] = {"inductor": "inductor", "aiter": aiter_inductor.aiter}


def problem_of(M: int, N: int, K: int) -> GemmProblem:
    """A block-scaled product without bias, bf16 out."""
    return GemmProblem(
        M, N, K, FP8, FP8, torch.bfloat16, "block", group_size=128, block_n=128, block_k=128
    )


def library(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Call:
    """cuBLASLt's product, its scales laid out beforehand as it wants them."""
    of_x, of_weight = x_scale.t().contiguous().t(), weight_scales(weight_scale)
    return functools.partial(
        F.scaled_mm,
        x,
        weight.t(),
        scale_a=of_x,
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=of_weight,
        scale_recipe_b=F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def exact(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """The product in float64 from the same quantised operands."""
    of_weight = weight_scale.double().repeat_interleave(128, 0)[: weight.shape[0]]
    rows = x.double() * x_scale.double().repeat_interleave(128, 1)[:, : x.shape[1]]
    columns = weight.double() * of_weight.repeat_interleave(128, 1)[:, : x.shape[1]]
    return rows @ columns.t()


def relative_error(found: Any, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - wanted).norm() / wanted.norm())


def race_product(device: torch.device, rounds: int) -> None:
    """Every provider of the product beside the library's own call."""
    op, use = load_ops()["gemm_fp8_blockscale"], Use(arch_of(device), force=True)
    for shape in SHAPES:
        problem = problem_of(*shape)
        sets = rotation(float(problem.bytes_moved()), device)
        inputs = [problem.sample(seed=seed, device=str(device)) for seed in range(sets)]
        variants: dict[str, Sequence[Call]] = {LIBRARY: [library(*args[:4]) for args, _ in inputs]}
        for name, provider in op.providers.items():
            if provider.serves(use.arch) and provider.refusal(problem, use) is None:
                variants[name] = [functools.partial(provider.run, *a, **k) for a, k in inputs]
        wanted = exact(*inputs[0][0][:4])
        errors = {name: relative_error(calls[0](), wanted) for name, calls in variants.items()}
        print_rows(problem, variants, LIBRARY, device, rounds, errors)


class Layer(nn.Module):
    """One linear to be converted: `quantize_` replaces what a module holds."""

    def __init__(self, N: int, K: int, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] to [M, N]."""
        return self.linear(x)  # type: ignore[no-any-return]


def run_with(compiled: Any, layer: nn.Module, weights: nn.Module, x: Tensor) -> Any:
    """The compiled layer on another layer's weights: buffers are inputs, so nothing recompiles."""
    for name, buffer in weights.named_buffers():
        holder, _, last = name.rpartition(".")
        setattr(layer.get_submodule(holder), last, buffer)
    return compiled(x)


def race_layer(device: torch.device, rounds: int) -> None:
    """Quantise and multiply as compiled from the plain module, against plain Inductor."""
    for M, N, K in SHAPES:
        torch._dynamo.reset()
        problem = problem_of(M, N, K)
        sets = rotation(float(N * K + 2 * M * K), device)
        layers = [
            aiter_inductor.quantize_(Layer(N, K, device), "fp8_blockscale") for _ in range(sets)
        ]
        rows = [torch.randn(M, K, device=device, dtype=torch.bfloat16) for _ in range(sets)]
        variants: dict[str, Sequence[Call]] = {}
        for backend, compiler in BACKENDS.items():
            layer = aiter_inductor.quantize_(Layer(N, K, device), "fp8_blockscale")
            compiled = torch.compile(layer, backend=compiler, dynamic=False)
            variants[backend] = [
                functools.partial(run_with, compiled, layer, weights, x)
                for weights, x in zip(layers, rows, strict=True)
            ]
        wanted = layers[0](rows[0]).double()
        errors = {name: relative_error(calls[0](), wanted) for name, calls in variants.items()}
        print_rows(problem, variants, "inductor", device, rounds, errors)


def print_rows(
    problem: GemmProblem,
    variants: dict[str, Sequence[Call]],
    base: str,
    device: torch.device,
    rounds: int,
    errors: dict[str, float],
) -> None:
    """One line a variant: microseconds, rate, ratio to `base`, error."""
    with torch.no_grad():
        timings = measure(variants, device, graph=True, rounds=rounds)
    flops = float(problem.flops())
    # The matmul ceiling is bf16's; the tensor cores do twice as many products in fp8.
    floor_us = ceilings(device).floor_us(float(problem.bytes_moved()), flops / 2)
    print(f"{problem.M}x{problem.N}x{problem.K}, floor {floor_us:.1f} us")
    for name, timing in timings.items():
        print(
            f"  {name:16} {timing.median_us:8.2f} us  {flops / timing.median_us / 1e6:6.0f} TFLOP/s"
            f"  {ratio(timings[base], timing):5.2f} x {base}  +-{timing.spread:.1%}"
            f"  error {errors[name]:.1e}",
            flush=True,
        )


def qwen3(device: torch.device) -> nn.Module:
    """Four layers of Qwen3-8B's shape with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        num_hidden_layers=4,
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        use_cache=False,
    )
    with torch.device(device):
        model: nn.Module = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    return model


def race_model(device: torch.device, rounds: int) -> None:
    """The decoder without its head: prefill of 4096 tokens, and 64 rows of one."""
    bf16 = qwen3(device)
    fp8 = aiter_inductor.quantize_(
        qwen3(device), "fp8_blockscale", lambda name, _: "lm_head" not in name
    )
    for batch, tokens in ((1, 4096), (64, 1)):
        torch._dynamo.reset()
        ids = torch.randint(0, 1000, (batch, tokens), device=device)
        variants: dict[str, Sequence[Call]] = {
            "bf16 inductor": [_step(bf16, "inductor", ids)],
            "bf16 aiter": [_step(bf16, "aiter", ids)],
            "fp8 inductor": [_step(fp8, "inductor", ids)],
            "fp8 aiter": [_step(fp8, "aiter", ids)],
        }
        with torch.no_grad():
            timings = measure(variants, device, graph=True, rounds=rounds)
        print(f"Qwen3-8B shape, 4 layers, {batch}x{tokens} tokens")
        for name, timing in timings.items():
            against = ratio(timings["fp8 inductor"], timing)
            print(f"  {name:14} {timing.median_us / 1e3:8.3f} ms  {against:5.2f} x fp8 inductor")


def _step(model: nn.Module, backend: str, ids: Tensor) -> Callable[[], Any]:
    decoder: Any = model.get_submodule("model")
    return functools.partial(torch.compile(decoder, backend=BACKENDS[backend], dynamic=False), ids)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    races = {"product": race_product, "layer": race_layer, "model": race_model}
    parser.add_argument("what", choices=races)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    found = ceilings(device)
    print(
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: copy "
        f"{found.copy_gbps:.0f} GB/s, bf16 matmul {found.matmul_tflops:.0f} TFLOP/s"
    )
    with torch.no_grad():
        races[arguments.what](device, arguments.rounds)


if __name__ == "__main__":
    main()
