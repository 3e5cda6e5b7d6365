"""The commands `prebuild` and `cache`: what they build, find wrong and remove."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from aiter_inductor.cli.command import main
from aiter_inductor.cli.prebuild import modules_for
from aiter_inductor.core import config, jit
from aiter_inductor.kernels import hip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    try:
        jit.find_compiler("gfx950", jit.default_settings())
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    return tmp_path / "kernels"


@pytest.fixture(scope="module")
def modules() -> list[jit.Module]:
    return modules_for("gfx950", ["small-llama"])


@pytest.fixture
def built(out: Path, modules: list[jit.Module]) -> Path:
    """A prebuilt directory of two kernels."""
    jit.prebuild(modules[:2], ["gfx950"], out, jit.default_settings())
    return out


def test_model_needs_kernels_of_each_family(modules):
    decoding = {"decode_attention", "decode_reduce", "decode_lengths"}
    assert {module.name for module in modules} == {"norm", "rope", "activation", *decoding}


def test_bench_and_a_model_that_decodes_need_every_source(modules):
    sources = {path for module in modules_for("gfx942") + modules for path in module.sources}
    assert sources == set(Path(hip.__file__).parent.glob("*.hip"))


def test_prebuild_writes_what_a_machine_without_compiler_loads(
    out, modules, capsys, monkeypatch, tmp_path
):
    assert main(["prebuild", "--arch", "gfx950", "--model", "small-llama", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"{len(modules)} kernels for gfx950 in {out}" in shown.out
    assert f"[{'#' * 30}] {len(modules)}/{len(modules)} " in shown.err
    monkeypatch.setenv("AITER_INDUCTOR_PREBUILT_DIRS", f"{tmp_path}:{out}")
    monkeypatch.setenv("AITER_INDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    settings = replace(
        jit.default_settings(), rocm_clang=tmp_path / "none", use_zig=False, use_rtc=False
    )
    for module in modules:
        assert jit.load(module, "gfx950", settings).path.is_relative_to(out)


def test_prebuild_tells_what_did_not_build(out, capsys, monkeypatch):
    """One line for each kernel, with the reason, and the exit status."""
    nothing = replace(jit.default_settings(), rocm_clang=out, use_zig=False, use_rtc=False)
    monkeypatch.setattr(jit, "default_settings", lambda: nothing)
    monkeypatch.setattr("aiter_inductor.cli.prebuild.modules_for", lambda *_: [one_module(out)])
    assert main(["prebuild", "--arch", "gfx950", "--out", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "answer for gfx950 did not build: no compiler for gfx950" in shown
    assert "0 kernels" in shown


def one_module(directory: Path) -> jit.Module:
    source = directory.with_suffix(".hip")
    source.write_text('extern "C" __attribute__((global)) void answer() {}\n')
    return jit.Module("answer", (source,))


def test_prebuild_refuses_a_chip_without_hip_kernels(capsys):
    assert main(["prebuild", "--arch", "gfx942,gfx906"]) == 2
    assert "gfx942,gfx906" in capsys.readouterr().err


def test_ls_shows_kernels_and_failures(built, capsys):
    failure = built / "gfx950" / "norm-00.failed"
    failure.write_text('{"message": "line 3: error: no\\nmore"}')
    assert main(["cache", "ls", "--dir", str(built)]) == 0
    shown = capsys.readouterr().out
    for artifact in jit.entries(built):
        assert f"{artifact.key[:12]} {artifact.path.stat().st_size:8} bytes" in shown
    assert "failed: gfx950/norm-00: line 3: error: no\n" in shown
    assert f"2 kernels and 1 failures in {built}" in shown


def test_ls_and_verify_of_no_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AITER_INDUCTOR_CACHE_DIR", str(tmp_path / "none"))
    assert main(["cache", "ls"]) == 0
    assert main(["cache", "verify"]) == 0
    shown = capsys.readouterr().out
    assert f"0 kernels and 0 failures in {config.cache_dir()}" in shown
    assert "nothing has been built yet" in shown


def test_verify_finds_a_changed_kernel(built, capsys):
    assert main(["cache", "verify", "--dir", str(built)]) == 0
    assert "2 kernels in" in capsys.readouterr().out
    path = jit.entries(built)[0].path
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["cache", "verify", "--dir", str(built)]) == 1
    assert f"{path} is not the file that was built" in capsys.readouterr().out


def test_clear_removes_what_is_the_cache_s(built, capsys):
    (built / "mine.txt").write_text("kept")
    assert main(["cache", "clear", "--dir", str(built)]) == 0
    assert "removed 2 kernels and 0 failures" in capsys.readouterr().out
    assert not jit.entries(built)
    assert (built / "mine.txt").exists()
    shutil.rmtree(built)
