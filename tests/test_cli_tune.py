"""`python -m aiter_inductor tune`: tables, interrupted runs, shape lists, wrong kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aiter_inductor.cli.command import main
from aiter_inductor.cli.linears import Linear, linears_of, models
from aiter_inductor.cli.tuning_run import Candidate, candidates_of, fastest
from aiter_inductor.core import tuned_table
from aiter_inductor.core.arch import arch_named
from aiter_inductor.lowerings.gemm import gemm_fp8_blockscale, gemm_w8a16
from aiter_inductor.lowerings.gemm_problem import GemmProblem

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
PROBLEM = GemmProblem(4, 32, 64, BF16, FP8, BF16, "weight_block", None, 0, 128, 128)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, capsys) -> None:
    shapes = tmp_path / "shapes.csv"
    shapes.write_text("N,K\n32,64\n")
    start = ["tune", "--op", "gemm_w8a16", "--shapes", str(shapes), "--out", str(tmp_path)]
    assert main([*start, "--rows", "4"]) == 0
    assert main([*start, "--rows", "4,2"]) == 0
    out = capsys.readouterr().out
    assert out.count("M=4") == 1
    table = tmp_path / "cpu" / "gemm_w8a16.csv"
    assert out.strip().endswith(f"2 rows in {table}")
    tables = gemm_w8a16.tables
    assert tables is not None
    read = tuned_table.read(
        table, "gemm_w8a16", tables.tuning, arch_named("cpu"), {"cpp": None, "triton": None}
    )
    assert [(found.rows, found.provider) for found in read] == [(2, "cpp"), (4, "cpp")]
    assert read[1].key == tables.tuning.of_problem(PROBLEM)[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("N,K\n32,0\n", ":2: K' is '0' but must be a positive integer"),
        ("M,K\n1,2\n", ":2: N' is '' but must be a positive integer"),
    ],
)
def test_a_bad_list_of_shapes(tmp_path: Path, capsys, content: str, reason: str) -> None:
    shapes = tmp_path / "shapes.csv"
    shapes.write_text(content)
    assert main(["tune", "--op", "gemm_int8", "--shapes", str(shapes)]) == 2
    assert reason in capsys.readouterr().err


def test_another_kind_of_problem(tmp_path: Path, capsys) -> None:
    shapes = tmp_path / "shapes.csv"
    shapes.write_text("N,K\n32,64\n")
    start = ["tune", "--op", "gemm_w8a16", "--shapes", str(shapes), "--out", str(tmp_path)]
    kind = ["scaling=weight_row", "block_n=0", "block_k=0", "weight_dtype=int8"]
    set_to = [part for each in kind for part in ("--set", each)]
    assert main([*start, "--rows", "4", *set_to]) == 0
    row = tuned_table.rows_of(tmp_path / "cpu" / "gemm_w8a16.csv")[0]
    assert (row["scaling"], row["weight_dtype"], row["block_n"]) == ("weight_row", "int8", "0")
    assert main([*start, "--set", "tiles=4"]) == 2
    assert "must be FIELD=VALUE with one of M, N, K" in capsys.readouterr().err
    assert main([*start, "--set", "dtype=float7"]) == 2
    assert "dtype='float7' is neither a number nor a dtype" in capsys.readouterr().err


def test_listed_models() -> None:
    assert len(models()) >= 21
    assert Linear(24576, 1536) in linears_of("deepseek-v3")
    assert set(linears_of("llama-3-8b")) <= set(linears_of("all"))
    assert len(set(linears_of("all"))) == len(linears_of("all"))


def test_a_configuration_gives_its_own_linears(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
    ).save_pretrained(tmp_path)
    assert set(linears_of(str(tmp_path))) == {
        Linear(64, 64), Linear(32, 64), Linear(96, 64), Linear(64, 96),
    }  # fmt: skip


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "sm_90"])
@pytest.mark.parametrize("M", [1, 64, 4096])
def test_candidates_can_run_and_differ(arch: str, M: int) -> None:
    chip = arch_named(arch)
    fp8 = chip.fp8_dtypes[0]
    problem = GemmProblem(M, 4096, 7168, fp8, fp8, BF16, "block", None, 128, 128, 128)
    found = candidates_of(gemm_fp8_blockscale, problem, chip)
    configs = [c.config for c in found if c.provider == "triton"]
    assert len(configs) == len(set(configs)) >= 6
    assert all(config.refuse(problem) is None for config in configs)
    assert any(config.split_k > 1 for config in configs) == (M <= 64)
    assert (Candidate("vendor", None) in found) == (arch == "sm_90")


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiter_inductor.kernels.cpp import gemm as kernels

    def wrong(x, weight, weight_scale, bias=None, **kwargs):
        return gemm_w8a16.reference(x, weight, weight_scale, bias, **kwargs) * 1.015625

    monkeypatch.setattr(kernels, "gemm_w8a16", wrong)
    found = fastest(gemm_w8a16, PROBLEM, [Candidate("cpp", None)], torch.device("cpu"))
    assert found.best == []
    assert found.complaints == ["cpp 0.0 µs: error 1.6e-02 is above 5e-03"]
