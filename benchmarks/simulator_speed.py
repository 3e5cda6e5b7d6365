"""Wave-instructions a second that the simulator executes on one core, all checks on.

python benchmarks/simulator_speed.py [--arch gfx950] [OP ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from aiter_inductor.cli.cases import case_of, load_ops
from aiter_inductor.core.arch import arch_named
from aiter_inductor.kernels.triton.simulated import Launched, simulating

ROWS = {"num_rows": 64, "N": 4096}
SIZES: Mapping[str, Mapping[str, int]] = {
    "rms_norm": ROWS,
    "add_rms_norm_quant": {**ROWS, "group_size": 128},
    "act_and_mul_quant": {**ROWS, "group_size": 128},
    "rope_qk": {"batch": 2, "num_tokens": 64, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128},
    "gemm_fp8_blockscale": {"num_rows": 256, "N": 256, "K": 1024},
    "gemm_int8": {"num_rows": 256, "N": 256, "K": 1024},
    "gemm_w8a16": {"num_rows": 256, "N": 256, "K": 1024},
    "mla_decode": {"batch": 2, "num_heads": 16, "q_len": 1, "kv_len": 512, "kv_lora_rank": 512},
}


def launches(op: str, arch: str) -> list[Launched]:
    """The op's Triton kernels, run once."""
    (fp8, *_) = arch_named(arch).fp8_dtypes
    args, kwargs = case_of(op, SIZES[op], fp8).problem.sample(seed=0, device="cpu")
    with simulating(arch) as found:
        load_ops()[op].providers["triton"].run(*args, **kwargs)
    return found


def seconds(launched: Launched, repeats: int) -> float:
    """Least time of the simulation proper, on one core."""
    kernel = launched.run.kernel
    times = [
        kernel.launch(
            launched.grid,
            (launched.threads,),
            launched.arguments,
            shared_bytes=launched.shared_bytes,
            num_threads=1,
        ).seconds
        for _ in range(repeats)
    ]
    return min(times)


def main() -> None:
    """Print a line for each launch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=list(SIZES), metavar="OP")
    parser.add_argument("--arch", default="gfx942")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'op':22} {'kernel':28} {'M instr':>8} {'of them MFMA':>12} {'M instr/s':>9}")
    for op in arguments.ops:
        for launched in launches(op, arguments.arch):
            counts = launched.run.profile().count_by_mnemonic
            matrix = sum(n for name, n in counts.items() if "mfma" in name)
            rate = launched.run.instructions / seconds(launched, arguments.repeats) / 1e6
            print(
                f"{op:22} {launched.name:28} {launched.run.instructions / 1e6:8.2f} "
                f"{matrix / launched.run.instructions:12.1%} {rate:9.1f}"
            )


if __name__ == "__main__":
    main()
