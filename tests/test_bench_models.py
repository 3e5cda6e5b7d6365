"""Benchmarks of models: what a command line asks for, and programs that can be called for ever."""

from __future__ import annotations

import argparse

import pytest
import torch

from aiter_inductor.cli import bench, model_programs
from aiter_inductor.cli.model_programs import ModelRequest, programs_of, variants_of
from tests.models import zoo


def requests(*words: str) -> list[ModelRequest]:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.model_requests(parser.parse_args(["llama-3-8b", *words]))


def request(**facts: object) -> ModelRequest:
    given = {"name": "tiny", "shape": (2, 1), "layers": None, "dtype": torch.float32}
    return ModelRequest(**{**given, "mode": None, "train": False, **facts})


def test_one_token_is_decoded_behind_a_cache() -> None:
    assert [(r.shape, r.cached) for r in requests()] == [((1, 4096), 0), ((64, 1), 1024)]
    assert [r.cached for r in requests("--cached", "0", "--tokens", "64x1", "1x8")] == [0, 0]
    assert [r.cached for r in requests("--cached", "7", "--tokens", "64x1", "1x8")] == [7, 7]
    assert [r.cached for r in requests("--train", "--tokens", "64x1")] == [0]


def test_each_name_switched_off_is_a_variant() -> None:
    (asked,) = requests("--tokens", "1x8", "--without", "rope", "hip")
    found = [(v.name, v.backend, v.disable) for v in variants_of(asked)[2:]]
    assert found == [
        ("aiter", "aiter", ""), ("without rope", "aiter", "rope"), ("without hip", "aiter", "hip"),
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cache_is_wound_back_before_it_overflows(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_programs, "SPARE_TOKENS", 3)
    model = zoo.build(family, dtype=torch.float32)
    eager = next(iter(programs_of(model, request(cached=5)).values()))
    token = zoo.token_ids(2, 1)
    logits = [eager.results(token)[0] for _ in range(8)]
    for first, again in ((0, 3), (1, 4), (2, 5), (0, 6)):
        torch.testing.assert_close(logits[again], logits[first])
    assert not torch.equal(logits[0], logits[1])


def test_training_compares_gradients_and_steps_only_when_timed() -> None:
    model = zoo.build("llama", dtype=torch.float32)
    eager = next(iter(programs_of(model, request(train=True, shape=(2, 6))).values()))
    before = model.lm_head.weight.clone()
    loss, *gradients = eager.results(zoo.token_ids(2, 6))
    assert loss.dim() == 0
    assert [g.shape for g in gradients] == [p.shape for p in model.parameters()]
    assert torch.equal(model.lm_head.weight, before)
    eager.run(zoo.token_ids(2, 6))
    assert not torch.equal(model.lm_head.weight, before)
