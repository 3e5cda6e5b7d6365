"""A module that any machine with a C compiler can build, and compilers that count or fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aiter_inductor.core.jit import JitSettings, Module

SCRIPT = """#!/bin/sh
if [ "$1" = --version ]; then echo "stand-in 1.0"; exit 0; fi
echo built >> {log}
{before}
exec {compiler} "$@"
"""


@pytest.fixture
def settings(tmp_path: Path) -> JitSettings:
    return JitSettings(cache_dir=tmp_path / "cache", build_timeout_s=60)


@pytest.fixture
def module(tmp_path: Path) -> Module:
    source = tmp_path / "answer.c"
    source.write_text(
        '#include "answer.h"\n__attribute__((visibility("default"))) '
        "int answer(void) { return ANSWER; }\n"
    )
    (tmp_path / "answer.h").write_text('#include "deep.h"\n')
    (tmp_path / "deep.h").write_text("#define ANSWER 42\n")
    return Module("answer", (source,))


@pytest.fixture
def host_compiler() -> Path:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler on the PATH")
    return Path(found)


class CountingCompiler:
    """A compiler script that notes each build and may do something first, such as sleep."""

    def __init__(self, directory: Path, compiler: Path, before: str = "") -> None:
        self._log = directory / "builds.log"
        self.path = directory / "counting-cc"
        self.path.write_text(SCRIPT.format(log=self._log, before=before, compiler=compiler))
        self.path.chmod(0o755)

    @property
    def builds(self) -> int:
        return self._log.read_text().count("built") if self._log.exists() else 0


@pytest.fixture
def counting_after(tmp_path: Path, host_compiler: Path) -> Callable[[str], CountingCompiler]:
    return lambda before: CountingCompiler(tmp_path, host_compiler, before)


@pytest.fixture
def counting(tmp_path: Path, host_compiler: Path) -> CountingCompiler:
    return CountingCompiler(tmp_path, host_compiler)
