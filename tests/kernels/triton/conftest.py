"""Kernels run here under Triton's interpreter, which a process chooses before it imports Triton.

Other tests of the same run compile Triton kernels for AMD, so these files are collected only in a
process of their own, which `test_under_interpreter.py` starts. To run one by hand:
`TRITON_INTERPRET=1 pytest tests/kernels/triton/test_norm.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

COMPILED = (
    "test_under_interpreter.py",
    "test_compiled_rows.py",
    "test_rope_compiled.py",
    "test_activation_compiled.py",
    "test_floats_compiled.py",
    "test_gemm_compiled.py",
    "test_gemm_simulated.py",
    "test_dequantise_simulated.py",
    "test_mla_compiled.py",
    "test_mxfp4_simulated.py",
    "test_mla_simulated.py",
    "test_paged_attention_compiled.py",
)
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.suffix != ".py" or collection_path.parent != Path(__file__).parent:
        return None
    return True if (collection_path.name in COMPILED) == INTERPRETING else None


if INTERPRETING:
    from tests.kernels.triton import interpretation

    interpretation.install()
