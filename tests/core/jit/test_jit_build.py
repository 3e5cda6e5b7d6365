"""A module is built once, found again, rebuilt when anything it depends on changes."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest

from aiter_inductor.core.jit import (
    BackgroundBuilds,
    BuildError,
    JitSettings,
    JitWarning,
    Module,
    NoCompilerError,
    build_key,
    find,
    load,
    source_key,
)
from aiter_inductor.core.jit.includes import included_files


def answer_of(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


def test_builds_once_and_is_found_again(module, settings, counting):
    settings = replace(settings, host_compiler=counting.path)
    assert find(module, "host", settings) is None
    artifact = load(module, "host", settings)
    assert answer_of(artifact.path) == 42
    assert load(module, "host", settings) == artifact
    assert counting.builds == 1
    assert settings.cache_dir.stat().st_mode & 0o777 == 0o700


def test_includes_are_followed_transitively(module):
    assert [file.name for file in included_files(module.sources)] == ["answer.h", "deep.h"]


@pytest.mark.parametrize("change", ["source", "deep header", "flag", "define", "arch", "compiler"])
def test_key_changes_with(module, tmp_path, change):
    before = build_key(module, "host", "cc 1")
    arch, compiler = "host", "cc 1"
    if change == "source":
        module.sources[0].write_text("int answer(void) { return 7; }\n")
    elif change == "deep header":
        (tmp_path / "deep.h").write_text("#define ANSWER 43\n")
    elif change == "flag":
        module = replace(module, flags=("-g",))
    elif change == "define":
        module = replace(module, defines=(("N", "1"),))
    elif change == "arch":
        arch = "gfx942"
    else:
        compiler = "cc 2"
    assert build_key(module, arch, compiler) != before


def test_key_ignores_where_the_sources_lie(module, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in (*module.sources, *included_files(module.sources)):
        (elsewhere / file.name).write_bytes(file.read_bytes())
    moved = replace(module, sources=(elsewhere / module.sources[0].name,))
    assert source_key(moved, "host") == source_key(module, "host")


def test_changed_header_is_rebuilt(module, settings, host_compiler, tmp_path):
    settings = replace(settings, host_compiler=host_compiler)
    load(module, "host", settings)
    (tmp_path / "deep.h").write_text("#define ANSWER 43 // changed\n")
    assert answer_of(load(module, "host", settings).path) == 43


def test_failed_build_warns_with_the_compilers_lines_and_is_remembered(module, settings, counting):
    settings = replace(settings, host_compiler=counting.path)
    module.sources[0].write_text("int answer(void) { return undeclared_name; }\n")
    line = r"answer\.c:1:.*undeclared_name"
    with pytest.warns(JitWarning, match=line), pytest.raises(BuildError, match=line):
        load(module, "host", settings)
    with pytest.raises(BuildError, match="undeclared_name"):
        load(module, "host", settings)
    assert counting.builds == 1


def test_build_that_hangs_is_stopped(module, settings, tmp_path, counting_after):
    hanging = counting_after("sleep 60")
    settings = replace(settings, host_compiler=hanging.path, build_timeout_s=0.5)
    with (
        pytest.warns(JitWarning),
        pytest.raises(BuildError, match="longer than 0 s|longer than 1 s"),
    ):
        load(module, "host", settings)


def test_missing_compiler_says_where_it_looked(module, settings, tmp_path):
    nowhere = replace(settings, host_compiler=tmp_path / "nothing")
    with pytest.warns(JitWarning), pytest.raises(NoCompilerError, match="nothing does not answer"):
        load(module, "host", nowhere)


def test_unknown_target_has_no_compiler(module, settings):
    with pytest.warns(JitWarning), pytest.raises(NoCompilerError, match="z80: unknown target"):
        load(module, "z80", settings)


def test_background_build_says_so_until_it_is_ready(module, settings, tmp_path, counting_after):
    slow = counting_after("sleep 0.3")
    builds = BackgroundBuilds(replace(settings, host_compiler=slow.path))
    assert builds.poll(module, "host") == "answer is being built for host"
    builds.wait(timeout_s=30)
    artifact = builds.poll(module, "host")
    assert not isinstance(artifact, str)
    assert answer_of(artifact.path) == 42
    assert slow.builds == 1


@pytest.mark.filterwarnings("ignore::aiter_inductor.core.jit.JitWarning")
def test_background_build_that_fails_is_a_sentence(module, settings, counting):
    module.sources[0].write_text("this is not C\n")
    builds = BackgroundBuilds(replace(settings, host_compiler=counting.path))
    builds.poll(module, "host")
    builds.wait(timeout_s=30)
    outcome = builds.poll(module, "host")
    assert isinstance(outcome, str)
    assert "answer.c:1" in outcome


def test_module_refuses_a_name_that_is_no_identifier():
    with pytest.raises(ValueError, match=r"'\.\./x' is not a lower-case identifier"):
        Module("../x", (Path("x.c"),))


def test_settings_default_to_the_configured_directory(monkeypatch, tmp_path):
    from aiter_inductor.core.jit import default_settings

    monkeypatch.setenv("AITER_INDUCTOR_CACHE_DIR", str(tmp_path / "here"))
    assert default_settings() == JitSettings(cache_dir=tmp_path / "here")
