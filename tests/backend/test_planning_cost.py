"""Planning many like layers costs no more fake computation than planning a few."""

from __future__ import annotations

import pytest

import aiter_inductor
from aiter_inductor.core.effects import Effects
from aiter_inductor.core.op import Op
from tests.models import zoo


def calls_for(layers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """`(ops run on fake values, scans for effects)` while planning a Llama for an MI300X."""
    runs, scans = [], []
    compute, scan = Op.__call__, Effects.__init__
    monkeypatch.setattr(
        Op, "__call__", lambda *args, **kwargs: (runs.append(1), compute(*args, **kwargs))[1]
    )
    monkeypatch.setattr(Effects, "__init__", lambda *args: (scans.append(1), scan(*args))[1])
    model = zoo.build("llama", layers=layers)
    report = aiter_inductor.explain(model, zoo.token_ids(), use_cache=False, target="gfx942")
    monkeypatch.undo()
    assert report.count("rms_norm", "fused") == 2 * layers + 1
    return len(runs), len(scans)


def test_like_layers_share_their_fake_results(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = calls_for(3, monkeypatch), calls_for(6, monkeypatch)
    assert few == many
    assert few[1] == 1
