"""`prebuild`: build native kernels of models, or of the benchmark, into a directory to ship."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from aiter_inductor.backend import plan_module
from aiter_inductor.cli import models
from aiter_inductor.cli.bench_model import parse_tokens
from aiter_inductor.cli.cases import BASELINES, FAMILIES, case_of, load_ops
from aiter_inductor.cli.code_objects import on_meta
from aiter_inductor.cli.family import Arguments
from aiter_inductor.core import config, jit
from aiter_inductor.core.arch import KNOWN, arch_named
from aiter_inductor.core.config import Options
from aiter_inductor.core.errors import OptionValueError
from aiter_inductor.core.op import Op, Use

Call = tuple[Op, Arguments]
LANGUAGES = ("hip", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare chips, models and directory."""
    parser.add_argument("--arch", default="gfx942,gfx950", help="chips, separated by commas")
    parser.add_argument(
        "--model",
        nargs="*",
        default=(),
        choices=sorted(models.MODELS),
        metavar="MODEL",
        help="what these models need at their default inputs; default: the benchmark's sizes",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: the folder `prebuilt` of the cache"
    )
    parser.epilog = (
        f"Where the kernels are to be used, name DIR in {config.PREFIX}_PREBUILT_DIRS. "
        "models: " + ", ".join(models.MODELS)
    )


def run(arguments: argparse.Namespace) -> int:
    """Build; returns 1 if a module did not build, else 0."""
    archs = chips(arguments.arch)
    out_dir = arguments.out or config.cache_dir() / "prebuilt"
    built: list[jit.Prebuilt] = []
    for arch in archs:
        modules = modules_for(arch, arguments.model)
        built += jit.prebuild(modules, [arch], out_dir, jit.default_settings(), show_progress)
    failed = [each for each in built if each.artifact is None]
    for each in failed:
        print(f"{each.module.name} for {each.arch} did not build: {each.reason}")
    size_bytes = sum(each.artifact.path.stat().st_size for each in built if each.artifact)
    print(
        f"{len(built) - len(failed)} kernels for {', '.join(archs)} in {out_dir}, "
        f"{size_bytes / 1e6:.1f} MB"
    )
    return int(bool(failed))


def chips(text: str) -> list[str]:
    """Names separated by commas.

    Raises:
        OptionValueError: for a chip that HIP kernels are not built for.
    """
    built_for = [name for name, arch in KNOWN.items() if "hip" in arch.providers]
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names or any(name not in built_for for name in names):
        raise OptionValueError("--arch", text, f"chips among {', '.join(built_for)}")
    return names


def show_progress(done: int, total: int, latest: jit.Prebuilt) -> None:
    """A bar on stderr, rewritten in place on a terminal."""
    width = 30
    bar = "#" * (width * done // total)
    line = f"[{bar:{width}}] {done}/{total} {latest.module.name} for {latest.arch}"
    in_place = sys.stderr.isatty()
    end = "" if in_place and done < total else "\n"
    print(f"\r\x1b[K{line}" if in_place else line, end=end, file=sys.stderr, flush=True)


def modules_for(arch: str, names: tuple[str, ...] = ()) -> list[jit.Module]:
    """Modules that the models `names`, or without any the benchmark's rows, launch on `arch`."""
    from aiter_inductor.kernels.hip import loading

    calls = [c for name in names for c in calls_of_model(name, arch)] or list(calls_of_bench(arch))
    with loading.collecting_modules(arch) as modules:
        for op, (args, kwargs) in calls:
            problem = op.problem(*args, **kwargs)
            for language in LANGUAGES:
                provider, use = op.providers.get(language), Use(arch_named(arch))
                if provider and provider.serves(use.arch) and not provider.refuse(problem, use):
                    host_functions(language)[op.name](*args, **kwargs)
    return modules


def calls_of_bench(arch: str) -> Iterator[Call]:
    """Every op at its default sizes, and at those that kernels are held to."""
    (fp8, *_) = arch_named(arch).fp8_dtypes
    rows = [*BASELINES, *((name, family.dims) for name, family in FAMILIES.items())]
    for name, dims in rows:
        op, example = load_ops()[name], FAMILIES[name].example
        yield op, example(case_of(name, dims, fp8).dims, fp8)


def calls_of_model(name: str, arch: str) -> list[Call]:
    """What the plan of a model on `arch` calls, at each of the model's default inputs.

    The model and its inputs are on the meta device: no weights, no memory, and one layer of each
    kind that the first two layers have.
    """
    calls: list[Call] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        for planned in plan_module(gm, Options(target=arch)).values():
            calls.extend(
                (d.match.op, on_meta(d.match)) for d in planned.decisions if d.provider is not None
            )
        return gm.forward

    for tokens in models.MODELS[name].tokens:
        model = models.build(name, device="meta", layers=2)
        ids = torch.empty(parse_tokens(tokens), dtype=torch.int64, device="meta")
        with torch.no_grad():
            compiled: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=False)
            compiled(input_ids=ids, use_cache=False)
    return calls


@cache
def host_functions(language: str) -> dict[str, Callable[..., Any]]:
    """The functions that launch kernels of `kernels/<language>`, by the op's name."""
    package = importlib.import_module(f"aiter_inductor.kernels.{language}")
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    folder = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {
        op: getattr(module, op) for op in load_ops() for module in folder if hasattr(module, op)
    }
