"""The table of static figures: nothing spills, and the committed file is what the sources give."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiter_inductor.cli import figures
from aiter_inductor.cli.command import main
from aiter_inductor.core import jit

TABLE = Path(__file__).parents[1] / "docs" / "figures.md"
ARCHS = ("gfx942", "gfx950")
SAMPLE = ("moe_route", "moe_sort", "kv_cache_write")


def rows() -> list[dict[str, str]]:
    """The committed table's rows by column."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    names, _, *found = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert tuple(names) == figures.COLUMNS
    return [dict(zip(names, cells, strict=True)) for cells in found]


def test_nothing_spills_to_memory():
    """Triton's kernels may move registers to unused ones of another kind; of HIP's, one does."""
    columns = {"triton": ("scratch",), "hip": ("scratch", "VGPR spills")}
    assert not [row for row in rows() if any(row[name] != "0" for name in columns[row["by"]])]
    moved = {
        (row["kernel"], row["chip"]): int(row["SGPR spills"])
        for row in rows()
        if row["by"] == "hip"
    }
    # Most of its 31 parameters and three pointers into the workspace outlive the loop over tiles; a
    # tile has 48 matrix instructions.
    assert moved.pop(("`decode_attend`", "gfx942")) <= 44
    assert not any(moved.values())


@pytest.mark.parametrize("op", SAMPLE)
@pytest.mark.parametrize("arch", ARCHS)
def test_table_is_what_the_sources_give(op, arch):
    try:
        compilers = figures.compilers(ARCHS)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    if compilers not in TABLE.read_text():
        pytest.skip(f"the table was not compiled by {compilers}")
    found = [
        dict(zip(figures.COLUMNS, m.cells(), strict=True)) for m in figures.figures_of(op, arch)
    ]
    assert found == [row for row in rows() if (row["op"], row["chip"]) == (op, arch)]


def test_command_prints_the_ops_it_is_asked_for(capsys):
    try:
        jit.find_compiler("gfx942", jit.default_settings())
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    assert main(["figures", "moe_sort", "--arch", "gfx942"]) == 0
    shown = capsys.readouterr().out
    assert "| moe_sort | `moe_count_kernel` | hip | gfx942 |" in shown
    assert main(["figures", "moe_sotr"]) == 2
    assert "nearest known one is 'moe_sort'" in capsys.readouterr().err
