"""List, verify, clear; and what `prebuild` ships is used without a compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aiter_inductor.core.jit import (
    JitWarning,
    NoCompilerError,
    clear,
    entries,
    failures,
    file_sizes,
    load,
    prebuild,
    verify,
)


def test_entries_are_listed_verified_and_cleared(module, settings, host_compiler):
    settings = replace(settings, host_compiler=host_compiler)
    artifact = load(module, "host", settings)
    (settings.cache_dir / "keep.txt").write_text("not the cache's")
    assert entries(settings.cache_dir) == [artifact]
    assert verify(settings.cache_dir) == []
    artifact.path.write_bytes(b"short")
    assert verify(settings.cache_dir) == [f"{artifact.path} is not the file that was built"]
    cleared = clear(settings.cache_dir)
    assert (cleared.entries, cleared.failures) == (1, 0)
    assert cleared.size_bytes > 5
    assert entries(settings.cache_dir) == []
    assert (settings.cache_dir / "keep.txt").exists()


@pytest.mark.filterwarnings("ignore::aiter_inductor.core.jit.JitWarning")
def test_clear_forgets_failures(module, settings, counting):
    settings = replace(settings, host_compiler=counting.path)
    good = module.sources[0].read_text()
    module.sources[0].write_text("broken\n")
    with pytest.raises(Exception, match="broken"):
        load(module, "host", settings)
    (message,) = failures(settings.cache_dir).values()
    assert "broken" in message
    assert clear(settings.cache_dir).failures == 1
    assert failures(settings.cache_dir) == {}
    module.sources[0].write_text(good)


def test_unfinished_build_is_found_by_verify(settings):
    left = settings.cache_dir / "host/.building-answer-0"
    left.mkdir(parents=True)
    settings.cache_dir.chmod(0o700)
    (finding,) = verify(settings.cache_dir)
    assert str(left) in finding
    clear(settings.cache_dir)
    assert verify(settings.cache_dir) == []


def test_prebuilt_directory_serves_without_a_compiler(module, settings, counting, tmp_path):
    out_dir = tmp_path / "shipped"
    steps: list[tuple[int, int, str]] = []
    building = replace(settings, host_compiler=counting.path)
    other = replace(module, name="other", defines=(("OTHER", "1"),))
    prebuild(
        [module, other],
        ["host"],
        out_dir,
        building,
        lambda done, total, one: steps.append((done, total, one.module.name)),
    )
    assert [step[:2] for step in steps] == [(1, 2), (2, 2)]
    assert {step[2] for step in steps} == {"answer", "other"}
    using = replace(settings, prebuilt_dirs=(out_dir,), host_compiler=tmp_path / "nothing")
    assert load(module, "host", using).path.is_relative_to(out_dir)
    changed = replace(module, flags=("-g",))
    with pytest.warns(JitWarning), pytest.raises(NoCompilerError):
        load(changed, "host", using)


def test_prebuild_is_incremental_and_reports_what_failed(module, settings, counting, tmp_path):
    building = replace(settings, host_compiler=counting.path)
    broken = tmp_path / "broken.c"
    broken.write_text("not C\n")
    modules = [module, replace(module, name="broken", sources=(broken,))]
    for expected_builds in (2, 3):  # the broken one is tried again, the good one is not
        done = prebuild(modules, ["host"], tmp_path / "shipped", building)
        reasons = {one.module.name: one.reason for one in done}
        assert reasons["answer"] is None
        assert "broken.c:1" in (reasons["broken"] or "")
        assert counting.builds == expected_builds


def test_files_of_a_build_that_ends_meanwhile_are_not_counted(tmp_path, monkeypatch):
    (tmp_path / "kept").write_bytes(b"12345")
    listed = [(str(tmp_path), [], ["kept", "gone"])]
    monkeypatch.setattr("os.walk", lambda root: listed)
    assert file_sizes(tmp_path) == [5]
