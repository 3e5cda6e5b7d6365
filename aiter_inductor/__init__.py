"""torch.compile(model, backend="aiter"): fused kernels for AMD Instinct chips, behind Inductor.

Importing this package imports neither torch nor Triton; each public name is loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "aiter": "aiter_inductor.backend",
    "explain": "aiter_inductor.inspection",
    "report": "aiter_inductor.inspection",
    "quantize_": "aiter_inductor.quantization",
    "provide_fp8_kernels": "aiter_inductor.fine_grained_fp8",
    "assert_fused": "aiter_inductor.core.report",
    "Report": "aiter_inductor.core.report",
    "Site": "aiter_inductor.core.report",
}

__all__ = [
    "Report",
    "Site",
    "__version__",
    "aiter",
    "assert_fused",
    "explain",
    "provide_fp8_kernels",
    "quantize_",
    "report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
