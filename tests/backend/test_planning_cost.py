"""Planning many like layers costs no more fake computation than a few, and few more look-ups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import aiter_inductor
from aiter_inductor.core.effects import Effects
from aiter_inductor.core.expected import Region
from aiter_inductor.core.match import Match
from aiter_inductor.core.op import Op
from tests.models import zoo

COUNTED = {"fake runs": (Op, "__call__"), "scans": (Effects, "__init__")}
LOOKED_UP = {"ends": (Match, "ends"), "regions": (Region, "covers")}


def calls_for(layers: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the above is called while a Llama is planned for an MI300X."""
    calls: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name, (owner, method) in (COUNTED | LOOKED_UP).items():
        monkeypatch.setattr(owner, method, counting(name, getattr(owner, method)))
    model = zoo.build("llama", layers=layers)
    report = aiter_inductor.explain(model, zoo.token_ids(), use_cache=False, target="gfx942")
    monkeypatch.undo()
    assert report.count("rms_norm", "fused") == 2 * layers + 1
    return calls


def test_like_layers_share_their_fake_results(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = calls_for(3, monkeypatch), calls_for(6, monkeypatch)
    assert all(few[name] == many[name] > 0 for name in COUNTED)
    assert few["scans"] == 1
    # Searches through all matches would make it four times as many.
    assert all(0 < few[name] <= many[name] <= 2.2 * few[name] for name in LOOKED_UP)
