"""Where nothing takes a site, Inductor must get the very graph that the program wrote.

On the CPU that is everything but inference's causal attention, which is switched off here.

Shown by Inductor's own cache: what plain Inductor compiled is a hit for this backend, so code,
results, speed and what training saves are the same by construction.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.models import zoo


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("gpt_oss", False),
        ("deepseek_v3", False),
        ("llama", True),
    ],
)
def test_plain_inductors_code_is_reused(
    name: str, training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, ids = zoo.build(name, dtype=torch.float32), zoo.token_ids(2, 9)
    outcomes = []
    options = {"inductor": None, "aiter": {"aiter.disable": ["attention"]}}
    for backend in ("inductor", "aiter"):
        torch._dynamo.reset()
        counters.clear()
        with torch.set_grad_enabled(training):
            out = torch.compile(model, backend=backend, options=options[backend])(
                ids, labels=ids, use_cache=False
            )
            if training:
                out.loss.backward()
        seen = counters["aot_autograd"]
        outcomes.append((seen["autograd_cache_hit"], seen["autograd_cache_miss"]))
    assert outcomes[0][0] == 0
    assert outcomes[0][1] >= 1, "plain Inductor did not compile anything to compare with"
    assert outcomes[1] == (outcomes[0][1], 0)
