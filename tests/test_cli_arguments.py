"""Mistakes in arguments are told in one line, before anything is measured."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.cli.command import main

BENCH = ["bench", "rms_norm"]
TUNE = ["tune", "--op", "gemm_int8"]
MISTAKES = [
    ([*BENCH, "--rounds", "0"], "0 is not a positive integer"),
    ([*BENCH, "--cached", "-1"], "'-1' is not a count"),
    ([*BENCH, "--mode", "bogus"], "invalid choice: 'bogus'"),
    ([*BENCH, "--device", "xla"], "'xla' is not cpu"),
    ([*BENCH, "--json", "/nonexistent/x.json"], "is no file in a folder that exists"),
    (["explain", "small-llama", "--layers", "0"], "0 is not a positive integer"),
    ([*TUNE, "--model", "qwen3-8b", "--jobs", "-1"], "'-1' is not a count"),
    ([*TUNE, "--model", "qwen3-8b", "--providers", "nosuch"], "unknown option 'nosuch'"),
]


def status_of(argv: list[str]) -> int | str | None:
    try:
        return main(argv)
    except SystemExit as stop:  # argparse's own
        return stop.code


@pytest.mark.parametrize(("argv", "sentence"), MISTAKES)
def test_a_mistake_is_one_line(argv, sentence, capsys):
    assert status_of(argv) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert status_of([*BENCH, "--device", "cuda"]) == 2
    assert "'cuda' is not cpu, and torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"\xff"], ids=str)
def test_files_of_another_kind(content, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(content)
    assert status_of([*TUNE, "--model", str(tmp_path)]) == 2
    assert "must be a transformers configuration" in capsys.readouterr().err
    assert status_of([*TUNE, "--shapes", str(tmp_path / "config.json")]) == 2
    assert "option" in capsys.readouterr().err
