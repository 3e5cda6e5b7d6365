"""`attn_implementation="aiter"`: the logits of eager attention, padded batches included."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.transformers import attention_forward, register
from tests.models import zoo
from tests.models.test_attention import BATCH, LENGTH, padding


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_logits_are_those_of_eager_attention(name, side):
    register()
    ids = zoo.token_ids(BATCH, LENGTH)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long) if side is None else padding(side)
    model = zoo.build(name, dtype=torch.float32, attention="eager", layers=2)
    wanted = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation("aiter")
    got = model(ids, attention_mask=mask, use_cache=False).logits
    seen = mask.bool()
    torch.testing.assert_close(got[seen], wanted[seen], rtol=1e-4, atol=1e-4)


def test_dropout_beside_a_softcap_is_refused():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"dropout=0.1 beside a softcap or sinks"):
        attention_forward(torch.nn.Module(), q, q, q, None, dropout=0.1, softcap=5.0)
