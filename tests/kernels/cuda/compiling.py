"""Compiling for Hopper, on machines with and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiter_inductor.core import jit


def compiled(variant: Any, tmp_path: Path) -> jit.Artifact:
    """A kernel built anew for sm_90, or a skip that says which compilers were looked for."""
    settings = jit.JitSettings(tmp_path / "cache")
    try:
        jit.find_compiler("sm_90", settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    return jit.load(variant.module(), "sm_90", settings)
