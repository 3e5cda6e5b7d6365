"""Inductor's caches across processes: the same program hits, a change of meaning misses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import torch
import aiter_inductor.backend
from aiter_inductor.core.op import OPS, Provider, accept
for op in OPS.values():
    op.providers["cpp"] = Provider("cpp", op.reference, None, accept, accept, traceable=True)

def norm(x, w):
    y = x.float()
    return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

x, w = torch.randn(8, 64).bfloat16(), torch.randn(64).bfloat16()
compiled = torch.compile(norm, backend="aiter")
compiled(x, w)
compiled(x.requires_grad_(), w).sum().backward()
counters = torch._dynamo.utils.counters
print(json.dumps({
    "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
    "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
    "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
    "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
    "bypass": counters["inductor"]["fxgraph_cache_bypass"]
    + counters["aot_autograd"]["autograd_cache_bypass"],
}))
"""


def run(package: Path, cache: Path) -> dict[str, int]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=package,
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that a test may change."""
    source = Path(__file__).parents[2] / "aiter_inductor"
    shutil.copytree(source, tmp_path / "copy" / "aiter_inductor")
    return tmp_path / "copy"


def test_second_process_hits_and_a_changed_formula_misses(package: Path, tmp_path: Path) -> None:
    """Two graphs, one of inference and one of training with its backward."""
    cache = tmp_path / "cache"
    first = run(package, cache)
    assert first["bypass"] == 0
    assert first["aot_hit"] == first["fx_hit"] == 0
    assert first["aot_miss"] == 2

    second = run(package, cache)
    assert second["bypass"] == 0
    assert second["aot_hit"] == 2
    assert second["aot_miss"] == second["fx_miss"] == 0

    formula = package / "aiter_inductor" / "lowerings" / "norm.py"
    formula.write_text(formula.read_text() + "\n# a change of any source is a change of meaning\n")
    third = run(package, cache)
    assert third["bypass"] == third["aot_hit"] == third["fx_hit"] == 0
    assert third["aot_miss"] == 2
