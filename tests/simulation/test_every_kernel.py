"""Every Triton and HIP kernel as gfx942 and gfx950 machine code, with every check on."""

from __future__ import annotations

import pytest

from aiter_inductor.core.jit import NoCompilerError, default_settings, find_compiler
from tests.simulation.cases import Case
from tests.simulation.executing import (
    ARCHS,
    LANGUAGES,
    assert_right,
    cases_of,
    execute,
    serves,
)


@pytest.mark.parametrize(
    ("language", "case", "arch"),
    [
        (language, case, arch)
        for arch in ARCHS
        for language in LANGUAGES
        for case in cases_of(language)
        if serves(case.op, language, arch)
    ],
    ids=str,
)
def test_machine_code_is_right(language: str, case: Case, arch: str) -> None:
    if language == "hip":
        try:
            find_compiler(arch, default_settings())
        except NoCompilerError as error:
            pytest.skip(str(error))
    args, kwargs = case.arguments(arch)
    assert_right(case.op, execute(case.op, language, arch, args, kwargs), args, kwargs)
