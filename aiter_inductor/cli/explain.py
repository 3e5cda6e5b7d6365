"""`explain`: what the backend makes of a named model."""

from __future__ import annotations

import argparse

import torch

import aiter_inductor
from aiter_inductor.cli import models
from aiter_inductor.cli.arguments import positive
from aiter_inductor.cli.bench_model import parse_tokens
from aiter_inductor.core.arch import KNOWN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the model and the chip."""
    parser.add_argument("model", choices=sorted(models.MODELS), metavar="MODEL")
    parser.add_argument("--target", choices=sorted(KNOWN), help="chip; default: the one here")
    parser.add_argument("--tokens", default="2x16", metavar="BATCHxLENGTH")
    parser.add_argument("--layers", type=positive, default=2, help="decoder layers")
    parser.add_argument("--disable", nargs="*", default=(), help="as the option aiter.disable")
    parser.add_argument(
        "--code-objects", action="store_true", help="name what each kernel is loaded from"
    )
    parser.epilog = "models: " + ", ".join(models.MODELS)


def run(arguments: argparse.Namespace) -> int:
    """Capture the model and print its report; returns 1 if a site was missed, else 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.build(arguments.model, device=device, layers=arguments.layers)
    batch, length = parse_tokens(arguments.tokens)
    ids = models.token_ids(model, batch, length, device=device)
    with torch.no_grad():
        report = aiter_inductor.explain(
            model, input_ids=ids, use_cache=False, target=arguments.target,
            disable=arguments.disable, code_objects=arguments.code_objects,
        )  # fmt: skip
    print(report)
    return 1 if report.missed() else 0
