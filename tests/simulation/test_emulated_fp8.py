"""e4m3fn on gfx942, whose instructions convert to e4m3fnuz: by integer operations, bit for bit.

FP8 checkpoints are in e4m3fn, and so are the activations that their models multiply them with.
"""

from __future__ import annotations

import pytest
import torch

from tests.simulation.cases import Case, Style, sizes_of
from tests.simulation.executing import assert_right, execute

OPS = ("quant_per_token", "quant_per_group", "rms_norm_quant", "add_rms_norm_quant",
       "act_and_mul_quant", "quant_static")  # fmt: skip
E4M3FN = Style("e4m3fn", fields={"out_dtype": torch.float8_e4m3fn})


@pytest.mark.parametrize("op", OPS)
def test_machine_code_is_right(op: str) -> None:
    args, kwargs = Case(op, sizes_of(op)[1], E4M3FN).arguments("gfx942")
    found = execute(op, "triton", "gfx942", args, kwargs)
    assert (found[0] if isinstance(found, tuple) else found).dtype == torch.float8_e4m3fn
    assert_right(op, found, args, kwargs)
