"""Whatever keeps a kernel from being built or loaded, the answer is right, after one clear line."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.jit import build as building
from aiter_inductor.kernels.hip import loading, norm
from aiter_inductor.kernels.prepared import Plans
from aiter_inductor.lowerings.norm import rms_norm

X, WEIGHT, EPS = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16(), 1e-6
Settings = Callable[[Path], jit.JitSettings]


def broken_compiler(tmp_path: Path) -> jit.JitSettings:
    script = tmp_path / "cc"
    version = '[ "$1" = --version ] && echo "stand-in 1.0" && exit 0'
    script.write_text(f'#!/bin/sh\n{version}\necho "cc: error: out of ideas" >&2\nexit 1\n')
    script.chmod(0o755)
    return jit.JitSettings(tmp_path / "cache", host_compiler=script)


def no_compiler(tmp_path: Path) -> jit.JitSettings:
    return jit.JitSettings(tmp_path / "cache", host_compiler=tmp_path / "absent")


def written_by_others(tmp_path: Path) -> jit.JitSettings:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache").chmod(0o777)
    return jit.JitSettings(tmp_path / "cache")


def no_directory(tmp_path: Path) -> jit.JitSettings:
    (tmp_path / "file").touch()
    return jit.JitSettings(tmp_path / "file" / "cache")


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[jit.JitSettings], list[str]]:
    """Runs the provider under some settings, as a new process would; returns what it warned."""

    def run(settings: jit.JitSettings) -> list[str]:
        monkeypatch.setattr(jit, "default_settings", lambda: settings)
        monkeypatch.setattr(building, "_warned", set())
        monkeypatch.setattr(norm, "_PLANS", Plans())
        loading.load_kernel.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                found = rms_norm.providers["hip"].run(X, WEIGHT, EPS)
                torch.testing.assert_close(found, rms_norm.reference(X, WEIGHT, EPS))
        loading.load_kernel.cache_clear()
        return [str(w.message) for w in caught if issubclass(w.category, jit.JitWarning)]

    return run


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (broken_compiler, "cc: error: out of ideas"),
        (no_compiler, "absent"),
        (written_by_others, "by others (mode 777)"),
        (no_directory, "cannot be made: Not a directory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_next_provider_takes_over(run_with, tmp_path, settings: Settings, sentence):
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler on the PATH")
    said = run_with(settings(tmp_path))
    about = [line for line in said if "rms_norm does not run in hip" in line]
    assert len(about) == 1, said
    assert sentence in about[0]


@pytest.mark.parametrize("damage", ["truncated", "another hash"])
def test_a_damaged_object_is_built_again(run_with, tmp_path, damage):
    settings = jit.JitSettings(tmp_path / "cache")
    try:
        jit.find_compiler("host", settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    assert run_with(settings) == []
    built = next(e for e in jit.entries(settings.cache_dir) if e.name == "norm")
    content = built.path.read_bytes()
    half = len(content) // 2
    built.path.unlink()  # this process has the old file mapped
    built.path.write_bytes(
        content[:half]
        if damage == "truncated"
        else content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    )
    said = run_with(replace(settings))
    assert len(said) == 1
    assert "it is not used" in said[0]
    assert built.path.read_bytes() == content
