"""What holds for every test: no setting of the person who runs them, and fresh compiled code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def without_ambient_settings() -> Iterator[None]:
    """Variables of the prefix AITER_INDUCTOR are the tests' own business; mistakes stay loud."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AITER_INDUCTOR")]:
            patch.delenv(name)
        patch.setenv("AITER_INDUCTOR_STRICT", "1")
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Compiled code of one test must not serve, or count as a recompilation of, the next."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
