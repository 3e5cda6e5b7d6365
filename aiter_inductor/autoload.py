"""What `import torch` runs: nothing, unless AITER_INDUCTOR=1 asks for this backend.

Registered under torch's entry point group `torch.backends`, so no line of the program changes.
This file imports nothing that `import torch` has not imported yet, and must stay so.
"""

from __future__ import annotations

import functools
from typing import Any


def autoload() -> None:
    """Give plain `torch.compile(...)` this backend if the environment asks for it.

    A program that names a backend itself, `backend="inductor"` included, keeps it. A value that is
    neither 0 nor 1 is a warning: an error here would make `import torch` fail.
    """
    from aiter_inductor.core import config
    from aiter_inductor.core.errors import OptionValueError

    try:
        requested = config.autoload_requested()
    except OptionValueError as error:
        import warnings

        warnings.warn(f"{error}; torch.compile keeps its own default backend", stacklevel=2)
        return
    if requested:
        _replace_default_backend()


def _replace_default_backend() -> None:
    import torch

    compile_with_default = torch.compile

    @functools.wraps(compile_with_default)
    def compile_with_aiter(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("backend", "aiter")
        return compile_with_default(*args, **kwargs)

    torch.compile = compile_with_aiter
