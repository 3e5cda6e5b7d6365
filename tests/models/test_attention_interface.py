"""`attn_implementation="aiter"`: the logits of eager attention, padded batches included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import aiter_inductor
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


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_packed_sequences_are_attended_to_one_by_one(name, monkeypatch):
    """Logits and gradients of sequences in one row are those of each alone; no mask is read."""
    register()
    lengths, model = (5, 1, 9), zoo.build(name, dtype=torch.float32, attention="aiter", layers=2)
    ids = zoo.token_ids(1, sum(lengths))
    starts = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    packed = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": 9,
        "max_length_k": 9,
    }
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    weight = model.get_input_embeddings().weight
    (wanted,) = torch.autograd.grad(alone.square().mean(), weight)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    together = model(ids, use_cache=False, **packed).logits
    (got,) = torch.autograd.grad(together.square().mean(), weight)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_compiled_call_reads_no_mask_that_is_understood(name, training, packed):
    register()
    model = zoo.build(name, attention="aiter", layers=2).train(training)
    inputs = {"position_ids": torch.arange(LENGTH).expand(BATCH, -1) % 4} if packed else {}
    with torch.set_grad_enabled(training):
        ids = zoo.token_ids(BATCH, LENGTH)
        report = aiter_inductor.explain(model, ids, target="sm_90", use_cache=False, **inputs)
    sites = [site for site in report.sites if site.pattern == "attention"]
    assert len(sites) == 2
    assert all("mask=none" in site.problem for site in sites), str(report)
    assert all("causal=top_left" in site.problem for site in sites), str(report)
    documents = packed and name == "gemma2"  # GPT-OSS does not look for documents
    assert all(f"first_keys={documents}" in site.problem for site in sites), str(report)
