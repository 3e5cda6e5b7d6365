"""Tables of measurements: what is believed, whom a choice follows, and what it costs."""

from __future__ import annotations

import timeit
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch

from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core import tuned_table, tuning
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.core.tuned_table import TunedTableWarning
from aiter_inductor.core.tuning import ByRows, Ladder, Measurement, config_text
from aiter_inductor.kernels.triton.gemm_config import GemmConfig
from aiter_inductor.lowerings.gemm import gemm_fp8_blockscale as op
from aiter_inductor.lowerings.gemm_problem import GemmProblem

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
HOPPER = arch_named("sm_90")
NO_COMPILER = Use(HOPPER, disabled=lambda name: name if name == "cuda" else None)
TILES = GemmConfig(64, 64, 128, split_k=4)
PROBLEM = GemmProblem(64, 4096, 4096, FP8, FP8, BF16, "block", None, 128, 128, 128)


def at(rows: int, provider: str, config: object, latency_us: float, error: float = 1e-4):
    problem = replace(PROBLEM, M=rows)
    return tuned_table.row(
        op.tables.tuning, HOPPER, problem, provider, config, latency_us=latency_us, error=error
    )


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes rows as the table of the op on sm_90."""
    monkeypatch.setenv("AITER_INDUCTOR_TUNED_DIRS", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "nothing")
    path = tmp_path / "sm_90" / "gemm_fp8_blockscale.csv"
    op.tables.forget()
    op._by_rows.clear()

    def write(*rows: dict[str, str]) -> Path:
        tuned_table.write(path, op.tables.tuning, rows)
        return path

    yield write
    op.tables.forget()
    op._by_rows.clear()


def step(rows: int, latency_us: float, provider: str = "triton") -> Measurement:
    return Measurement(rows, (), provider, None, latency_us)


def test_a_ladder_follows_the_lower_measurement_as_far_as_its_bound_is_better():
    few, some, many = step(16, 10.0, "a"), step(64, 20.0, "b"), step(4096, 1280.0, "c")
    ladder = Ladder.of([many, few, some, step(64, 25.0, "slower")])
    # 16 rows in 10 µs are at most 20 µs for 32; 64 in 20 at most 1280 for 4096, which must be c's.
    assert ladder.bounds == (32, 256, 1023)
    found = [ladder.at(rows).provider for rows in (4, 16, 32, 33, 64, 256, 1024, 4096, 16384)]
    assert found == ["a", "a", "a", "b", "b", "b", "c", "c", "c"]
    assert ladder.at(3) is ladder.at(257) is ladder.at(1023) is ladder.at(16385) is None
    assert ladder.providers() == ("c", "b", "a")


def test_two_measurements_that_are_near_leave_no_gap():
    ladder = Ladder.of([step(64, 10.0, "few"), step(512, 60.0, "many")])
    found = [ladder.at(rows).provider for rows in (64, 384, 385, 512)]
    assert found == ["few", "few", "many", "many"]


def test_a_measured_size_is_followed_even_where_a_neighbour_looks_better():
    ladder = Ladder.of([step(32, 50.0, "slow"), step(64, 10.0, "fast")])
    assert [ladder.at(rows).provider for rows in (32, 33, 64)] == ["slow", "fast", "fast"]


def test_a_table_is_the_first_question(table):
    table(at(64, "triton", TILES, 9.0), at(64, "vendor", None, 12.0), at(4096, "vendor", None, 120))
    use = Use(HOPPER)
    few = op.select(PROBLEM, use)
    assert few.provider is op.providers["triton"]
    assert few.reason == "triton took 9 µs at M=64"
    assert op.select(replace(PROBLEM, M=3000), use).provider is op.providers["vendor"]
    without = Use(HOPPER, disabled=lambda name: name if name == "triton" else None)
    assert op.select(PROBLEM, without).provider is op.providers["vendor"]
    other = op.select(replace(PROBLEM, N=4224), NO_COMPILER)
    assert other.provider is op.providers["triton"]
    assert other.reason.startswith("triton takes it: M=64 is at most 64")


def test_an_open_number_of_rows_is_chosen_for_when_called(table):
    table(at(64, "triton", TILES, 9.0), at(4096, "vendor", None, 120.0))
    selection = op.select(replace(PROBLEM, M=sympy.Symbol("s0")), Use(HOPPER))
    assert selection.reason == "vendor or triton, by M when called"
    assert selection.provider is op.by_rows(("vendor", "triton"))
    assert selection.provider.name == "rows:vendor,triton"


def test_a_call_runs_what_its_rows_ask_for(table):
    table(at(4, "triton", TILES, 9.0), at(64, "vendor", None, 9.5))
    called = []
    runs = {
        "vendor": lambda *args, **kwargs: called.append(("vendor", kwargs)),
        "triton": lambda *args, **kwargs: called.append(("triton", kwargs)),
    }
    run = ByRows(op.tables, runs, lambda device: HOPPER)
    for rows in (2, 4, 64, 4096):
        run(torch.empty(rows, 4096, dtype=FP8), torch.empty(4096, 4096, dtype=FP8), None, None)
    assert called == [("triton", {"config": TILES})] * 2 + [("vendor", {})] * 2


def test_a_choice_takes_less_than_a_microsecond(table):
    table(*(at(1 << i, "triton", TILES, 5.0 + 2**i / 50) for i in range(13)))
    run = ByRows(op.tables, {"triton": lambda *args, **kwargs: None}, lambda device: HOPPER)
    args = torch.empty(64, 4096, dtype=FP8), torch.empty(4096, 4096, dtype=FP8), None, None
    assert run.choose(*args) is not None
    number = 20000

    best = min(timeit.repeat(lambda: run.choose(*args), number=number, repeat=7)) / number
    # 0.9 µs on a quiet core of 2.6 GHz; twice that is a choice that looks at too much.
    assert best < 2e-6


BAD = {
    "there is no provider 'ck'; known are cpp, cuda, vendor, triton": {
        "provider": "ck",
        "config": "",
    },
    "triton has no launch parameter 'tile_m'": {"config": "tile_m=64"},
    "block_m=48 is no power of two of at least 16": {"config": "block_m=48 block_n=64 block_k=64"},
    "tflops=1 contradicts 238.6 in 9.0 µs": {"tflops": "1"},
    "more than the 1979 of sm_90": {"latency_us": "1.00", "tflops": "2147", "gbs": "17563"},
    "error=2.0e-01 is above 5e-03": {"error": "0.2"},
    "latency_us='fast' is no number": {"latency_us": "fast"},
    "dtype='float7' is neither a number nor a dtype": {"dtype": "float7"},
    "'block_m=64' is no config of triton": {"config": "block_m=64"},
}


@pytest.mark.parametrize(("reason", "change"), BAD.items(), ids=lambda v: str(v)[:20])
def test_a_row_that_cannot_be_true_is_refused_with_a_line(table, reason, change):
    good, bad = at(4096, "vendor", None, 120.0), at(64, "triton", TILES, 9.0) | change
    path = table(good, bad)
    with pytest.warns(TunedTableWarning) as caught:
        selection = op.select(replace(PROBLEM, M=4096), Use(HOPPER))
    assert selection.reason == "vendor took 120 µs at M=4096"
    assert str(caught[0].message).startswith("1 rows of the gemm_fp8_blockscale table are refused")
    assert f"{path}:2: " in str(caught[0].message)
    assert reason in str(caught[0].message)


def test_rows_of_another_chip_say_nothing(table):
    table(at(64, "triton", TILES, 9.0) | {"compute_units": "80"})
    assert op.select(PROBLEM, NO_COMPILER).reason.startswith("triton takes it: M=64 is at most")


def test_a_table_is_read_as_it_was_written(table):
    rows = [at(8, "triton", TILES, 5.0), at(64, "triton", TILES, 9.0), at(8, "vendor", None, 6.0)]
    path = table(*rows)
    read = tuned_table.rows_of(path)
    assert [(row["M"], row["provider"]) for row in read] == [
        ("8", "triton"), ("8", "vendor"), ("64", "triton"),
    ]  # fmt: skip
    assert read[0] == rows[0]
    assert read[0]["config"] == config_text(TILES)


def test_graph_caches_tell_tables_apart(tmp_path, monkeypatch):
    from aiter_inductor.core.inductor import meaning_key

    without = meaning_key()
    (tmp_path / "a.csv").write_text("arch\n")
    monkeypatch.setenv("AITER_INDUCTOR_TUNED_DIRS", str(tmp_path))
    assert meaning_key() != without


@pytest.mark.parametrize("path", sorted(tuning.SHIPPED.glob("*/*.csv")), ids=lambda p: p.stem)
def test_every_row_that_ships_is_believed(path):
    tuned, arch = load_ops()[path.stem], arch_named(path.parent.name)
    configs = {p.name: p.config() if p.config else None for p in tuned.providers.values()}
    read = tuned_table.read(path, path.stem, tuned.tables.tuning, arch, configs)
    assert len(read) == len(tuned_table.rows_of(path)) > 0


def test_a_card_follows_what_was_measured_on_it_and_on_others_what_was_not(table):
    """Times of two cards at one number of rows are not compared."""
    other, this = (replace(HOPPER, card=name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))

    def of(card: str, *row) -> dict[str, str]:
        return at(*row) | {"card": card}

    table(
        of(other.card, 64, "triton", TILES, 9.0),
        of(this.card, 64, "vendor", None, 10.0),
        of(this.card, 64, "triton", TILES, 11.0),
        of(other.card, 256, "triton", TILES, 30.0),
    )
    assert op.select(PROBLEM, Use(this)).provider is op.providers["vendor"]
    assert op.select(PROBLEM, Use(other)).provider is op.providers["triton"]
    beyond = op.select(replace(PROBLEM, M=256), Use(this))
    assert beyond.reason == "triton took 30 µs at M=256"
