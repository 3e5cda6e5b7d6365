"""Sites of a model run as machine code on the model's own tensors, as the demo shows them."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.cli import machine_code, models
from aiter_inductor.core.jit import NoCompilerError, default_settings, find_compiler
from tests.simulation.executing import ARCHS

OPS = ("rms_norm", "rope_qk", "add_rms_norm", "act_and_mul")
BF16_STEPS = 2**-7  # of the largest value: one rounding, and one on the way


@pytest.fixture(scope="module")
def sites() -> list[machine_code.Captured]:
    model = models.build("small-llama", layers=1)
    ids = models.token_ids(model, 1, 5, device="cpu")
    with torch.no_grad():
        return machine_code.capture(model, OPS, target="gfx942", input_ids=ids, use_cache=False)


def test_the_sites_of_a_llama_are_found(sites):
    assert [site.match.op.name for site in sites] == list(OPS)
    (x, residual, *_) = sites[2].args
    assert x.shape == residual.shape == (1, 5, 256)
    assert torch.equal(sites[2].eager[1], x + residual)


@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code_computes_what_eager_does(sites, arch):
    try:
        find_compiler(arch, default_settings())
    except NoCompilerError as error:
        pytest.skip(str(error))
    runs = [run for site in sites for run in machine_code.execute(site, arch)]
    assert [(run.op, run.provider) for run in runs] == [
        (op, provider) for op in OPS for provider in ("triton", "hip")
    ]
    for run in runs:
        assert run.largest > 0
        assert run.error <= BF16_STEPS * run.largest, run
