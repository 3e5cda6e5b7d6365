"""Measure which kernel, with which launch parameters, is fastest here, and keep it in a table."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aiter_inductor.cli.arguments import not_negative
from aiter_inductor.cli.cases import FAMILIES, case_of, load_ops
from aiter_inductor.cli.linears import linears_of, models, read_shapes
from aiter_inductor.cli.progress import progress
from aiter_inductor.cli.tuning_run import Candidate, candidates_of, compile_ahead, fastest
from aiter_inductor.core import tuned_table
from aiter_inductor.core.arch import Arch, arch_of
from aiter_inductor.core.errors import OptionValueError, UnknownOptionError
from aiter_inductor.core.op import Op
from aiter_inductor.core.tuned_table import CARD
from aiter_inductor.core.tuning import SHIPPED, Tables

ROWS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"


@dataclass(frozen=True)
class Job:
    """One problem to tune; its text names it in the progress line."""

    op: Op
    problem: Any

    def __str__(self) -> str:
        return f"{self.op.name} M={self.problem.M} N={self.problem.N} K={self.problem.K}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    tuned = [name for name, op in load_ops().items() if op.tables is not None]
    parser.add_argument("--op", required=True, choices=tuned, help="what to tune")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shapes", metavar="FILE", help="a CSV file with columns N, K, and perhaps M"
    )
    known = f"one of {', '.join(models())}, `all`, or a transformers config.json or its folder"
    what.add_argument("--model", metavar="CONFIG", action="append", help=f"its linears: {known}")
    parser.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="another kind of problem: scaling=weight_row, weight_dtype=int8, group_size=32 ...",
    )
    parser.add_argument("--rows", default=ROWS, help=f"M where FILE has none; default {ROWS}")
    parser.add_argument(
        "--out", type=Path, default=SHIPPED, help=f"folder of tables; default {SHIPPED}"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="measure also what the table holds, be it of this card or of another of its chip",
    )
    parser.add_argument("--providers", default="", help="only these, separated by commas")
    parser.add_argument(
        "--jobs",
        type=not_negative,
        default=0,
        help="compile all candidates in so many processes first",
    )
    parser.add_argument("--compile-only", action="store_true", help="compile, and measure nothing")


def run(arguments: argparse.Namespace) -> int:
    """Tune what is not in the table yet; a run that was interrupted goes on where it stopped."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    op, arch = load_ops()[arguments.op], arch_of(device)
    assert op.tables is not None
    only = tuple(filter(None, arguments.providers.split(",")))
    if unknown := [name for name in only if name not in op.providers]:
        raise UnknownOptionError(unknown[0], op.providers)
    path = arguments.out / arch.name / f"{op.name}.csv"
    rows = [] if arguments.again else tuned_table.rows_of(path)
    jobs = [j for j in _jobs(op, arguments, arch) if not _holds(rows, op.tables, arch, j, only)]
    work = {job: candidates_of(op, job.problem, arch, only) for job in jobs}
    if arguments.jobs or arguments.compile_only:
        compile_ahead([(j.op.name, j.problem, c) for j, c in work.items()], arguments.jobs)
    if arguments.compile_only:
        return 0
    for job in progress(jobs):
        found = fastest(op, job.problem, work[job], device)
        for complaint in found.complaints:
            print(f"{job}: {complaint}")
        if not found.best:
            print(f"{job}: nobody computes it")
            continue
        rows = [r for r in rows if r[CARD] != arch.card or not _same(r, op.tables, arch, job, only)]
        rows += [_row(op.tables, arch, job, each) for each in found.best]
        tuned_table.write(path, op.tables.tuning, rows)
        print(f"{job}: " + ", ".join(map(str, found.best)))
    print(f"{len(rows)} rows in {path}")
    return 0


def _jobs(op: Op, arguments: argparse.Namespace, arch: Arch) -> Iterator[Job]:
    """Every problem asked for, the smallest first, each once."""
    listed = [_number(part) for part in arguments.rows.split(",")]
    if arguments.shapes:
        found = read_shapes(Path(arguments.shapes))
    else:
        found = [s for name in arguments.model for s in linears_of(name)]
    shapes = [(m, s.N, s.K) for s in found for m in ([s.M] if s.M else listed)]
    fp8 = arch.fp8_dtypes[0] if arch.fp8_dtypes else torch.float8_e4m3fn
    for M, N, K in sorted(set(shapes), key=lambda shape: (shape[1] * shape[2], shape)):
        dims = {**FAMILIES[op.name].dims, "num_rows": M, "N": N, "K": K}
        yield Job(op, _changed(case_of(op.name, dims, fp8).problem, arguments.set))


def _changed(problem: Any, settings: Sequence[str]) -> Any:
    """The problem with fields given as `FIELD=VALUE`.

    Raises:
        OptionValueError: for a field that it does not have, or a value of another type.
    """
    hints = typing.get_type_hints(type(problem))
    fields = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in hints:
            raise OptionValueError("--set", setting, f"FIELD=VALUE with one of {', '.join(hints)}")
        try:
            fields[name] = tuned_table.value_of(name, text, hints[name])
        except ValueError as error:
            raise OptionValueError("--set", setting, f"FIELD=VALUE: {error}") from error
    return replace(problem, **fields)


def _holds(
    rows: Sequence[dict[str, str]], tables: Tables, arch: Arch, job: Job, only: Sequence[str]
) -> bool:
    return any(_same(row, tables, arch, job, only) for row in rows)


def _same(row: dict[str, str], tables: Tables, arch: Arch, job: Job, only: Sequence[str]) -> bool:
    """Whether a row of a table is of this problem on this chip, and of one of these providers."""
    if only and row.get("provider") not in only:
        return False
    wanted = tuned_table.row(tables.tuning, arch, job.problem, "", None, latency_us=1.0, error=0.0)
    names = ("arch", "compute_units", tables.tuning.rows, *tables.tuning.key)
    return all(row.get(name) == wanted[name] for name in names)


def _row(tables: Tables, arch: Arch, job: Job, found: Candidate) -> dict[str, str]:
    return tuned_table.row(
        tables.tuning,
        arch,
        job.problem,
        found.provider,
        found.config,
        latency_us=found.latency_us,
        error=found.error,
    )


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise OptionValueError("--rows", text, "positive integers separated by commas")
    return int(text)
