"""`bench`: eager, plain Inductor and this backend side by side, for ops or for whole models."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from aiter_inductor.cli import bench_model, bench_op, models
from aiter_inductor.cli.arguments import device_here, new_file, not_negative, positive
from aiter_inductor.cli.cases import BASELINES, FAMILIES, Case, case_of, parse_dims
from aiter_inductor.cli.model_programs import ModelRequest
from aiter_inductor.cli.progress import progress
from aiter_inductor.cli.rows import Row, table
from aiter_inductor.cli.timing import ceilings
from aiter_inductor.core.arch import arch_of
from aiter_inductor.core.errors import UnknownOptionError

DECODED_BEHIND = 1024
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
VERSIONED = ("torch", "triton", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is measured, where, and where the numbers go."""
    parser.add_argument(
        "names",
        nargs="*",
        help="ops or models; none takes the rows of the baseline table. --list shows all",
    )
    parser.add_argument("--list", action="store_true", help="names that can be given, and stop")
    parser.add_argument(
        "--shapes",
        nargs="+",
        action="extend",
        metavar="num_rows=64,N=4096",
        help="sizes for each op named",
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_here, default=here)
    parser.add_argument("--rounds", type=positive, default=30, help="measurements of each variant")
    parser.add_argument(
        "--no-graph", action="store_true", help="time ops launch by launch, not in a CUDA graph"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write every number there")
    model = parser.add_argument_group("for models")
    model.add_argument(
        "--tokens",
        nargs="+",
        action="extend",
        metavar="BATCHxLENGTH",
        help="default: per model",
    )
    model.add_argument("--layers", type=positive, help="decoder layers; default: per model")
    model.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    model.add_argument("--mode", choices=MODES, help="torch.compile's mode for both backends")
    model.add_argument(
        "--cached",
        type=not_negative,
        metavar="TOKENS",
        help="what a static cache holds; default: 1024 where LENGTH is 1, else no cache",
    )
    model.add_argument(
        "--without",
        nargs="+",
        default=(),
        metavar="NAME",
        help="measure also with one pattern, op or provider switched off, for each name",
    )
    model.add_argument("--train", action="store_true", help="time forward, backward and AdamW step")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns 0."""
    if arguments.list:
        print("ops:    " + ", ".join(FAMILIES))
        print("models: " + ", ".join(models.MODELS))
        return 0
    if unknown := [n for n in arguments.names if n not in FAMILIES and n not in models.MODELS]:
        raise UnknownOptionError(unknown[0], [*FAMILIES, *models.MODELS])
    device = torch.device(arguments.device)
    if arguments.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    machine = describe_machine(device)
    print(machine_line(machine), flush=True)
    rows: list[Row] = []
    for case in progress(op_cases(arguments, device)):
        rows += _shown(
            bench_op.measure_case(
                case, device, graph=not arguments.no_graph, rounds=arguments.rounds
            )
        )
    for request in progress(model_requests(arguments)):
        rows += _shown(bench_model.measure_model(request, device, rounds=arguments.rounds))
    if arguments.json:
        content = {"machine": machine, "rows": [row.as_dict() for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _shown(rows: list[Row]) -> list[Row]:
    """Print each case once it is measured: a run that is stopped has shown what it knows."""
    print(table(rows), flush=True)
    return rows


def op_cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """The op cases that the command line asks for."""
    fp8 = next(iter(arch_of(device).fp8_dtypes), torch.float8_e4m3fn)
    names = [name for name in arguments.names if name in FAMILIES]
    if arguments.shapes:
        wanted = [(n, parse_dims(n, shape)) for n in names for shape in arguments.shapes]
    elif names:
        listed = [(n, dims) for n, dims in BASELINES if n in names]
        absent = [n for n in names if all(n != known for known, _ in listed)]
        wanted = [*listed, *((n, FAMILIES[n].dims) for n in absent)]
    else:
        wanted = [] if arguments.names else list(BASELINES)
    return [case_of(name, dims, fp8) for name, dims in wanted]


def model_requests(arguments: argparse.Namespace) -> list[ModelRequest]:
    """The model runs that the command line asks for."""
    requests = []
    for name in (n for n in arguments.names if n in models.MODELS):
        for text in arguments.tokens or models.MODELS[name].tokens:
            shape = bench_model.parse_tokens(text)
            decodes = shape[1] == 1 and not arguments.train
            cached = DECODED_BEHIND if decodes else 0
            requests.append(
                ModelRequest(
                    name=name,
                    shape=shape,
                    layers=arguments.layers,
                    dtype=getattr(torch, arguments.dtype),
                    mode=arguments.mode,
                    train=arguments.train,
                    cached=cached if arguments.cached is None else arguments.cached,
                    without=tuple(arguments.without),
                )
            )
    return requests


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the code: chip, versions, measured ceilings."""
    chip = platform.processor() or platform.machine()
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device).name
    found = ceilings(device)
    return {
        "chip": chip,
        "arch": arch_of(device).name,
        "threads": torch.get_num_threads(),
        "copy_gbps": found.copy_gbps,
        "matmul_tflops": found.matmul_tflops,
        **{name: version_of(name) for name in VERSIONED},
    }


def machine_line(machine: dict[str, Any]) -> str:
    """One line of the above."""
    versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONED)
    return (
        f"{machine['chip']} ({machine['arch']}), {versions}; copy {machine['copy_gbps']:.0f} GB/s, "
        f"matmul {machine['matmul_tflops']:.3g} TFLOP/s"
    )


def version_of(distribution: str) -> str:
    """The installed version, or `absent`."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"
