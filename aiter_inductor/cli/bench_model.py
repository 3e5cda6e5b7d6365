"""Measure one model: eager, under Inductor, under this backend; inference or a training step."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import aiter_inductor
from aiter_inductor.cli import models
from aiter_inductor.cli.bench_op import count_kernels, error
from aiter_inductor.cli.rows import Row
from aiter_inductor.cli.timing import Call, measure, ratio
from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.errors import OptionValueError
from aiter_inductor.core.report import Report

INPUT_SETS = 4


@dataclass(frozen=True)
class ModelRequest:
    """One model at one size of input.

    Attributes:
        name: a key of `models.MODELS`.
        shape: batch and sequence length.
        layers: decoder layers, None for the configuration's own.
        dtype: of weights and activations.
        mode: torch.compile's, for both backends.
        train: a step of forward, backward and AdamW instead of a forward pass.
    """

    name: str
    shape: tuple[int, int]
    layers: int | None
    dtype: torch.dtype
    mode: str | None
    train: bool

    def __str__(self) -> str:
        what = "training step" if self.train else "forward"
        batch, length = self.shape
        mode = f" mode={self.mode}" if self.mode else ""
        return f"{self.name} {what} {batch}x{length} {short_name(self.dtype)}{mode}"


def parse_tokens(text: str) -> tuple[int, int]:
    """`(64, 1)` from `64x1`.

    Raises:
        OptionValueError: for anything else.
    """
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise OptionValueError("--tokens", text, "BATCHxLENGTH, such as 64x1")
    return int(found[1]), int(found[2])


def measure_model(request: ModelRequest, device: torch.device, *, rounds: int) -> list[Row]:
    """Time every variant of `request` in one run; no KV cache."""
    torch._dynamo.reset()
    model = models.build(request.name, device=device, dtype=request.dtype, layers=request.layers)
    ids = [
        models.token_ids(model, *request.shape, device=device, seed=seed)
        for seed in range(INPUT_SETS)
    ]
    make = _training if request.train else _inference
    variants = {name: make(model, name, request) for name in ("eager", "inductor", "aiter")}
    outputs = {name: run(ids[0]) for name, run in variants.items()}
    errors = {name: error(out, outputs["eager"]) for name, out in outputs.items()}
    del outputs
    calls: dict[str, list[Call]] = {
        name: [partial(run, each) for each in ids] for name, run in variants.items()
    }
    peaks = {name: _peak_bytes(each[0], device) for name, each in calls.items()}
    kernels = {name: count_kernels(each[0], device) for name, each in calls.items()}
    timings = measure(calls, device, rounds=rounds)
    notes = {"aiter": summary(aiter_inductor.report(model))} if not request.train else {}
    return [
        Row(
            case=str(request),
            variant=name,
            latency_us=timing.median_us,
            spread=timing.spread,
            against_inductor=ratio(timing, timings["inductor"]),
            kernels=kernels[name],
            error=errors[name],
            peak_bytes=peaks[name],
            note=notes.get(name, ""),
        )
        for name, timing in timings.items()
    ]


def summary(report: Report) -> str:
    """Sites by status, and how many of them each fused op took."""
    status = Counter(site.status for site in report.sites)
    taken = Counter(site.fused_into for site in report.sites if site.status == "fused")
    counted = ", ".join(f"{number} {name}" for name, number in status.items())
    into = ", ".join(f"{op} {number}" for op, number in taken.items())
    return f"{counted} ({into})" if into else counted


def _compiled(model: Any, backend: str, mode: str | None) -> Callable[..., Any]:
    if backend == "eager":
        run: Callable[..., Any] = model
        return run
    return torch.compile(model, backend=backend, mode=mode)


def _inference(model: Any, backend: str, request: ModelRequest) -> Callable[[torch.Tensor], Any]:
    forward = _compiled(model, backend, request.mode)

    @torch.no_grad()
    def run(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = forward(input_ids=ids, use_cache=False).logits
        return logits

    return run


def _training(model: Any, backend: str, request: ModelRequest) -> Callable[[torch.Tensor], Any]:
    """A step on a copy of the model, because every step changes the weights."""
    own = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-5)
    forward = _compiled(own, backend, request.mode)

    def run(ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: torch.Tensor = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def _peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that a call holds beyond what was held before it."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
