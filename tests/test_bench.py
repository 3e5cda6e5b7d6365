"""The benchmark: its cases cover every op, its arithmetic is right, its command writes rows."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiter_inductor.cli import bench, models
from aiter_inductor.cli.bench_model import parse_tokens
from aiter_inductor.cli.bench_op import error
from aiter_inductor.cli.cases import BASELINES, FAMILIES, case_of, load_ops, parse_dims
from aiter_inductor.cli.command import main
from aiter_inductor.cli.rows import Row, table
from aiter_inductor.cli.timing import Ceilings, Timing, measure, ratio, rotation
from aiter_inductor.core.dtypes import QUANT_DTYPES
from aiter_inductor.core.errors import OptionValueError, UnknownOptionError
from aiter_inductor.core.problem import describe

CPU = torch.device("cpu")
SMALL = {
    "num_rows": 6,
    "N": 128,
    "K": 256,
    "group_size": 64,
    "batch": 2,
    "num_tokens": 5,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "v_dim": 24,
    "nope_dim": 32,
    "rope_dim": 16,
    "q_len": 1,
    "kv_len": 24,
    "kv_lora_rank": 64,
    "num_pages": 3,
    "num_slots": 9,
    "page_size": 8,
    "cache_bits": 16,
    "num_experts": 32,
    "topk": 4,
    "num_groups": 4,
    "topk_groups": 2,
    "block_m": 16,
    "num_seqs": 3,
    "max_pages": 2,
    "turned": 0,
}
FP8 = torch.float8_e4m3fn
positive = st.floats(min_value=1e-3, max_value=1e6)


def small_case(name, **dims):
    sizes = {key: SMALL[key] for key in FAMILIES[name].dims}
    return case_of(name, {**sizes, **dims}, FP8)


def test_every_op_can_be_benchmarked():
    assert set(FAMILIES) == set(load_ops()), "add the op to FAMILIES in aiter_inductor/cli/cases.py"


@pytest.mark.parametrize("name", FAMILIES)
def test_problem_draws_the_inputs_it_describes(name):
    case = small_case(name)
    args, kwargs = case.problem.sample(seed=0, device="cpu")
    assert case.op.problem(*args, **kwargs) == case.problem
    again, _ = case.problem.sample(seed=0, device="cpu")
    other, _ = case.problem.sample(seed=1, device="cpu")
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    assert all(torch.equal(args[i], again[i]) for i in tensors)
    assert not all(torch.equal(args[i], other[i]) for i in tensors)
    assert describe(case.problem)


@pytest.mark.parametrize("name", FAMILIES)
def test_problem_counts_each_tensor_once(name):
    """At least the tensors passed over row by row, at most all in and out (and 1 %).

    Of a tensor that is written in place only a part may be passed over; `wide` is what a gradient
    goes to, and not read.
    """
    case = small_case(name)
    args, kwargs = case.problem.sample(seed=0, device="cpu")
    out = case.op.outcome(case.op.reference, args, kwargs)
    out = (out,) if isinstance(out, torch.Tensor) else out
    inputs = case.op.bind(*args, **kwargs)
    in_place = [inputs[name] for name in case.op.mutates]
    args = [given for name, given in inputs.items() if name != "wide"]
    read = [t for t in args if isinstance(t, torch.Tensor) and all(t is not m for m in in_place)]
    whole = sum(t.nbytes for t in (*read, *out))
    passed = [t for t in (*read, *out[: len(out) - len(in_place)]) if t.dim() != 1]
    assert sum(t.nbytes for t in passed) <= case.problem.bytes_moved() <= 1.01 * whole
    assert case.problem.flops() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_code_computes_what_the_op_means(name):
    case = small_case(name)
    args, kwargs = case.problem.sample(seed=0, device="cpu")
    plain = case.op.outcome(case.plain, args, kwargs)
    wanted = case.op.outcome(case.op.reference, args, kwargs)
    one = isinstance(wanted, torch.Tensor)
    for ours, theirs in zip((plain,) if one else plain, (wanted,) if one else wanted, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    # Two roundings of bf16; one step of fp8 is an eighth.
    quantised = any(t.dtype in QUANT_DTYPES for t in ((wanted,) if one else wanted))
    assert error(plain, wanted) <= (0.13 if quantised else 0.016)


def test_baseline_rows_exist():
    for name, dims in BASELINES:
        assert dims.keys() == FAMILIES[name].dims.keys()
        assert case_of(name, dims, FP8).problem.bytes_moved() > 0


def test_grouped_and_ungrouped_quantisation_differ():
    grouped, whole = (small_case("rms_norm_quant", group_size=g) for g in (64, 0))
    assert grouped.problem != whole.problem
    assert grouped.problem.bytes_moved() > whole.problem.bytes_moved()


@pytest.mark.parametrize(
    ("text", "error_type", "sentence"),
    [
        ("num_row=3", UnknownOptionError, "nearest known one is 'num_rows'"),
        ("N=0", OptionValueError, "an integer of at least 1"),
        ("N=many", OptionValueError, "'many'"),
    ],
)
def test_bad_sizes_are_refused(text, error_type, sentence):
    with pytest.raises(error_type, match=sentence):
        parse_dims("rms_norm", text)


def test_tokens_are_batch_by_length():
    assert parse_tokens("64x1") == (64, 1)
    for wrong in ("64", "0x4", "4x", "axb"):
        with pytest.raises(OptionValueError, match="BATCHxLENGTH"):
            parse_tokens(wrong)


@given(st.lists(positive, min_size=2, max_size=20), st.floats(0.1, 10))
def test_ratio_is_paired_by_round(rounds, factor):
    """Noise that hits both variants of a round alike does not change the ratio."""
    theirs = Timing(tuple(rounds))
    ours = Timing(tuple(factor * r for r in rounds))
    assert ratio(ours, theirs) == pytest.approx(factor)


@given(positive, positive)
def test_floor_is_the_slower_of_memory_and_arithmetic(size_bytes, flops):
    found = Ceilings(copy_gbps=100.0, matmul_tflops=2.0)
    floor_us = found.floor_us(size_bytes, flops)
    assert floor_us == pytest.approx(max(size_bytes / 100e9, flops / 2e12) * 1e6)


def test_spread_is_relative_to_the_median():
    assert Timing((10.0,)).spread == 0
    assert Timing((10.0, 10.0, 10.0, 10.0)).spread == 0
    assert Timing((8.0, 10.0, 10.0, 12.0)).spread == pytest.approx(0.15)


def test_rotated_inputs_exceed_the_cache():
    for size_bytes in (1e6, 1e7, 1e9):
        assert rotation(size_bytes, CPU) * size_bytes >= 64 << 20
    assert rotation(1, CPU) == 256


def test_slower_code_measures_slower():
    x = torch.randn(1 << 16)

    def once():
        return x.exp()

    def four_times():
        return [x.exp() for _ in range(4)]

    timings = measure({"once": [once], "four": [four_times]}, CPU, rounds=25)
    # The fastest rounds: the others also hold whatever else this machine was doing.
    assert 2 < min(timings["four"].rounds_us) / min(timings["once"].rounds_us) < 8


def test_table_leaves_out_empty_columns():
    rows = [
        Row("case a", "eager", 12.5, 0.01, error=0.0),
        Row("case a", "triton", None, note="triton: N=3 is odd"),
        Row("case b", "eager", 3.25),
    ]
    text = table(rows)
    assert "kernels" not in text
    assert "12.5" in text
    assert "triton: N=3 is odd" in text
    assert text.count("variant") == 2


def test_command_measures_an_op(tmp_path, capsys):
    file = tmp_path / "rows.json"
    shape = "num_rows=4,N=64"
    arguments = ["bench", "rms_norm", "--shapes", shape, "--rounds", "2", "--device", "cpu"]
    assert main([*arguments, "--json", str(file)]) == 0
    shown = capsys.readouterr()
    assert "rms_norm num_rows=4 N=64" in shown.out
    assert "[1/1" in shown.err
    content = json.loads(file.read_text())
    assert content["machine"]["copy_gbps"] > 0
    variants = {row["variant"]: row for row in content["rows"]}
    assert set(variants) == {"eager", "inductor", "aiter"}
    assert variants["aiter"]["error"] <= 0.016
    assert variants["inductor"]["against_inductor"] == 1


def test_sizes_given_in_several_places_are_all_measured():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    given = ["rms_norm", "--shapes", "num_rows=4,N=64", "num_rows=2,N=64", "--shapes", "N=128"]
    cases = bench.op_cases(parser.parse_args([*given, "--device", "cpu"]), CPU)
    assert [(case.problem.num_rows, case.problem.N) for case in cases][:2] == [(4, 64), (2, 64)]
    assert [case.problem.N for case in cases] == [64, 64, 128]


def test_command_measures_a_model(tmp_path, capsys):
    file = tmp_path / "rows.json"
    sizes = ["--tokens", "1x4", "--layers", "1", "--rounds", "2", "--device", "cpu"]
    assert main(["bench", "small-llama", *sizes, "--json", str(file)]) == 0
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["aiter"]["error"] <= max(0.02, 2 * rows["inductor"]["error"])
    assert "inlined" in rows["aiter"]["note"]


def test_unknown_name_tells_the_nearest(capsys):
    assert main(["bench", "rmsnorm"]) == 2
    assert "nearest known one is 'rms_norm'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in models.MODELS if n.startswith("small")])
def test_small_models_run(name):
    model = models.build(name, layers=1)
    ids = models.token_ids(model, 1, 4, device="cpu")
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()
