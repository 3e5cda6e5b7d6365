"""What a benchmark of a model calls: a forward pass, a step of decoding, or a step of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aiter_inductor.cli import models
from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.inductor import mode_options

INPUT_SETS = 4
SPARE_TOKENS = 256
"""Room in a cache behind what fills it: it is wound back after so many calls."""


@dataclass(frozen=True)
class Program:
    """One variant of a model, ready to be called with tokens, [batch, length].

    Attributes:
        run: what is timed.
        results: tensors to compare, of a call that leaves the model as it was.
    """

    run: Callable[[torch.Tensor], object]
    results: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


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
        cached: tokens of each sequence that a static cache already holds; 0 is no cache.
        without: names for `aiter.disable`, each measured as a variant of its own.
    """

    name: str
    shape: tuple[int, int]
    layers: int | None
    dtype: torch.dtype
    mode: str | None
    train: bool
    cached: int = 0
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = "training step" if self.train else "forward"
        batch, length = self.shape
        behind = f" behind {self.cached}" if self.cached else ""
        mode = f" mode={self.mode}" if self.mode else ""
        return f"{self.name} {what} {batch}x{length}{behind} {short_name(self.dtype)}{mode}"


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    Attributes:
        name: as the table shows it.
        backend: torch.compile's; `eager` does not compile.
        disable: for `aiter.disable`.
    """

    name: str
    backend: str
    disable: str = ""

    def __str__(self) -> str:
        return self.name


def variants_of(request: ModelRequest) -> tuple[Variant, ...]:
    """Eager, plain Inductor, this backend, and this backend with each name switched off."""
    named = tuple(Variant(name, name) for name in ("eager", "inductor", "aiter"))
    return named + tuple(Variant(f"without {n}", "aiter", n) for n in request.without)


def programs_of(model: torch.nn.Module, request: ModelRequest) -> dict[Variant, Program]:
    """Every variant of `request`, not compiled before its first call.

    All share the weights of `model`, and in training its gradients and the optimiser's moments:
    steps of AdamW change the weights a little, and no time or size depends on that.
    """
    variants = variants_of(request)
    if request.train:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6)
        return {each: _training(model, each, request, optimizer) for each in variants}
    make = _decoding if request.cached else _forward
    return {each: make(model, each, request) for each in variants}


def compiled(model: Any, variant: Variant, mode: str | None) -> Callable[..., Any]:
    """`model`, or what torch.compile makes of it."""
    if variant.backend == "eager":
        run: Callable[..., Any] = model
        return run
    if not variant.disable:
        return torch.compile(model, backend=variant.backend, mode=mode)
    options: Any = {**mode_options(mode), "aiter.disable": [variant.disable]}
    return torch.compile(model, backend=variant.backend, options=options)


def _forward(model: Any, variant: Variant, request: ModelRequest) -> Program:
    forward = compiled(model, variant, request.mode)

    @torch.no_grad()
    def run(ids: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits: torch.Tensor = forward(input_ids=ids, use_cache=False).logits
        return logits

    return Program(run, lambda ids: (run(ids).clone(),))


def _decoding(model: Any, variant: Variant, request: ModelRequest) -> Program:
    """Tokens behind a static cache of the variant's own.

    A static cache costs the same however much of it is used, so calls go on where the last one
    ended, and the cache is wound back before it would overflow.
    """
    from transformers import StaticCache

    batch, length = request.shape
    cache = StaticCache(config=model.config, max_cache_len=request.cached + SPARE_TOKENS)
    device = next(model.parameters()).device
    prompt = models.token_ids(model, batch, request.cached, device=device)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    forward = compiled(model, variant, request.mode)
    used = 0

    @torch.no_grad()
    def run(ids: torch.Tensor) -> torch.Tensor:
        nonlocal used
        if used + length > SPARE_TOKENS:
            _wind_back(cache, request.cached)
            used = 0
        used += length
        torch.compiler.cudagraph_mark_step_begin()
        logits: torch.Tensor = forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits

    return Program(run, lambda ids: (run(ids).clone(),))


def _wind_back(cache: Any, tokens: int) -> None:
    """Let every layer of a static cache hold `tokens` tokens again."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)
        if hasattr(layer, "cumulative_length_int"):  # of layers with a window
            layer.cumulative_length_int = tokens


def _training(
    model: Any, variant: Variant, request: ModelRequest, optimizer: torch.optim.Optimizer
) -> Program:
    """A step of training; what is compared is the loss and every gradient."""
    forward = compiled(model, variant, request.mode)

    def backward(ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: torch.Tensor = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def run(ids: torch.Tensor) -> None:
        backward(ids)
        optimizer.step()

    def results(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = backward(ids).clone()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad(set_to_none=True)
        return (loss, *gradients)

    return Program(run, results)
