"""Compile two small transformers models with backend="aiter" and show what came of it.

For a Llama-like and a DeepSeek-V3-like model with random weights: the report for this machine and
for an MI300X, the error against eager beside plain Inductor's own, and the time beside plain
Inductor's. Last, a few fused sites of the first are executed as the machine code of an MI300X and
an MI350X, in the simulator. Runs on a CPU in less than two minutes; nothing is downloaded.

In a mixture of experts one rounding can send a token to another expert; bfloat16 eager then shows
an error against fp32 that neither backend made.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch

import aiter_inductor
from aiter_inductor.cli import machine_code, models
from aiter_inductor.cli.timing import measure, ratio

MODELS = ("small-llama", "small-deepseek-v3")
TARGET = "gfx942"
BATCH, LENGTH, LAYERS = 2, 64, 2
CHIPS = ("gfx942", "gfx950")
SITES = ("rms_norm", "rope_qk", "add_rms_norm", "act_and_mul")


def main() -> None:
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # transformers' version checks are cached functions, which Dynamo remarks on.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    for name in MODELS:
        show(name, device)
    execute_machine_code(MODELS[0], device)
    print(f"\ndone in {time.perf_counter() - start:.0f} s")


@torch.no_grad()
def show(name: str, device: torch.device) -> None:
    model = models.build(name, device=device, layers=LAYERS)
    ids = models.token_ids(model, BATCH, LENGTH, device=device)
    heading(f"{name}: {LAYERS} layers, {BATCH}x{LENGTH} tokens, bfloat16, on {device}")

    def logits(forward: Callable[..., object]) -> Callable[[], torch.Tensor]:
        return lambda: forward(input_ids=ids, use_cache=False).logits

    runs = {"eager": logits(model)}
    for backend in ("inductor", "aiter"):
        print(f"compiling with {backend} ...", flush=True)
        runs[backend] = logits(torch.compile(model, backend=backend))
        runs[backend]()

    print("\nwhat was done here, from the compiled model:")
    print(aiter_inductor.report(model))
    print(f"\nwhat would be done on {TARGET}, planned on this machine:")
    print(aiter_inductor.explain(model, input_ids=ids, use_cache=False, target=TARGET))

    exact = models.build(name, device=device, dtype=torch.float32, layers=LAYERS)
    exact.load_state_dict(model.state_dict())
    wanted, reference = logits(exact)(), runs["eager"]().float()
    timings = measure({name: [run] for name, run in runs.items()}, device, rounds=40)
    print("\n               time     ±  / inductor  max error against fp32  against eager")
    for backend, run in runs.items():
        timing, found = timings[backend], run().float()
        print(
            f"{backend:9} {timing.median_us / 1e3:7.2f} ms {timing.spread:5.0%}"
            f"{ratio(timing, timings['inductor']):12.3f}"
            f"{float((found - wanted).abs().max()):24.4f}"
            f"{float((found - reference).abs().max()):15.4f}"
        )


@torch.no_grad()
def execute_machine_code(name: str, device: torch.device) -> None:
    heading(f"{name}: fused sites as machine code, executed by the simulator with every check on")
    model = models.build(name, device=device, layers=LAYERS)
    ids = models.token_ids(model, BATCH, LENGTH, device=device)
    sites = machine_code.capture(model, SITES, target=TARGET, input_ids=ids, use_cache=False)
    print(f"{'chip':7} {'kernel':7} {'op':13} {'module':40} max error    of up to    time")
    for arch in CHIPS:
        for run in (run for site in sites for run in machine_code.execute(site, arch)):
            print(
                f"{run.arch:7} {run.provider:7} {run.op:13} {run.path:40} {run.error:9.5f}"
                f"{run.largest:12.3f}{run.seconds:6.1f} s",
                flush=True,
            )


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


if __name__ == "__main__":
    main()
