"""Rotated keys and values that go into a static cache are stored by the kernel that rotates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import StaticCache

from aiter_inductor.core import inductor
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.config import Options
from aiter_inductor.core.effects import effects_of
from aiter_inductor.core.faults import STRICT
from aiter_inductor.core.op import Use
from aiter_inductor.core.plan import Selector, fuse_matches, raise_matches
from aiter_inductor.lowerings.rope_cache import rope_cache_write
from aiter_inductor.patterns import FUSION, RAISING
from tests.models import zoo
from tests.patterns.fusion.test_rope_pair import KVH, B, D, H, S, op_names, rms, rotate, split
from tests.patterns.rewrite_check import Rewritten, check_rewrite, rewrite

T = 12
Program = Callable[..., Any]


def inputs(num_tokens: int = S, marked: bool = False) -> tuple[Tensor, ...]:
    """q, k, v as linears leave them, tables, both caches, and how full they are."""
    dtype = torch.float32
    q, k, v = (torch.randn(B, num_tokens, n * D).to(dtype) for n in (H, KVH, KVH))
    angles = torch.randn(1, 1, num_tokens, D // 2).repeat(1, 1, 1, 2)
    caches = (torch.randn(B, KVH, T, D).to(dtype) for _ in range(2))
    found = (q, k, v, angles.cos(), angles.sin(), *caches, torch.tensor(3))
    if marked:
        for x, axis in zip(found, (1, 1, 1, 2, 2, 2, 2), strict=False):
            torch._dynamo.maybe_mark_dynamic(x, axis)
    return found


def heads(*packed: Tensor) -> tuple[Tensor, ...]:
    return tuple(split(x).transpose(1, 2) for x in packed)


def stepping(
    *, norm: Tensor | None = None, copies: bool = True, between: Program = lambda *_: None
) -> Program:
    """A layer's update of its cache, and what attention would read of it."""

    def program(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *cache: Tensor
    ) -> tuple[Any, ...]:
        keys, values, length = (x.clone() for x in cache) if copies else cache
        q, k, v = heads(q, k, v)
        if norm is not None:
            q, k = rms(q, norm[0]), rms(k, norm[1])
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        slots = torch.arange(k.shape[2]) + length
        length.add_(k.shape[2])
        keys.index_copy_(2, slots, k)
        extra = between(keys, values, k, v, slots)
        values.index_copy_(2, slots, v)
        return q, keys.sum(-1), keys, values, length, extra

    return program


def stored(done: Rewritten) -> bool:
    return op_names(done) == ["rope_cache_write"]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("num_tokens", [1, S])
@pytest.mark.parametrize("normed", [False, True])
def test_caches_are_written_by_the_rotation(normed: bool, num_tokens: int, marked: bool) -> None:
    norm = torch.rand(2, D) if normed else None
    expect = {"rope": 2} | ({"rms_norm": 2} if normed else {})
    done = check_rewrite(stepping(norm=norm), *inputs(num_tokens, marked), expect=expect)
    assert stored(done), done.graphs
    assert "index_copy_" not in done.graphs[0]


NEAR_MISSES: dict[str, tuple[Program, str]] = {
    "keys read too": (lambda keys, values, k, v, slots: k + 1, "k_1 is read by extra too"),
    "what is returned is read": (
        lambda keys, values, k, v, slots: values.index_copy_(2, slots, v) + 1,
        "2 other tensors, not one, are stored where index_copy_ stores keys",
    ),
    "cache read in between": (
        lambda keys, *_: keys + 1,
        "extra reads what it writes, in between",
    ),
    "values read in between": (
        lambda keys, values, *_: values[:, 1:].sum(),
        "extra reads what it writes, in between",
    ),
    "cache written in between": (
        lambda keys, *_: keys.mul_(2).sum(),
        "mul_ writes to what it reads or switches a mode in between",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    between, sentence = NEAR_MISSES[case]
    program = stepping(between=between)
    done = check_rewrite(program, *inputs(), expect={"rope": 2})
    assert op_names(done) == ["rope_qk"]
    assert sentence in refusals(program)


def refusals(program: Program) -> list[str]:
    """Why rotations and stores are not one, by the fusion or for want of a place."""
    said: list[str] = []

    def capture(gm: fx.GraphModule, example_inputs: Any) -> Any:
        with inductor.fake_mode_of(gm.graph):
            matches = raise_matches(gm.graph, RAISING).matches
            notes = fuse_matches(matches, FUSION, Options())
            said.extend(note.partition(": ")[2] for note in notes)
            use = Use(arch_named("gfx942"))
            selector = Selector(effects_of(gm.graph), Options(), use, STRICT)
            places = [selector.place(match) for match in matches.of(rope_cache_write)]
            said.extend(place for place in places if isinstance(place, str))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(program, backend=capture)(*inputs())
    return said


def test_other_slots_for_values_are_not_joined() -> None:
    def between(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        values.index_copy_(2, slots.flip(0), v)

    def program(*args: Tensor) -> Any:
        q, k, v, cos, sin, keys, values, length = args
        q, k, v = heads(q, k, v)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        slots = torch.arange(k.shape[2]) + length
        keys, values = keys.clone(), values.clone()
        keys.index_copy_(2, slots, k)
        between(keys, values, k, v, slots)
        return q, keys, values

    assert op_names(check_rewrite(program, *inputs(), expect={"rope": 2})) == ["rope_qk"]
    assert refusals(program) == [
        "0 other tensors, not one, are stored where index_copy_ stores keys"
    ]


def test_one_cache_for_both_is_left_alone() -> None:
    def program(*args: Tensor) -> Any:
        q, k, v, cos, sin, keys, _, length = args
        q, k, v = heads(q, k, v)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        both = torch.cat((keys, keys), 2)
        slots = torch.arange(k.shape[2]) + length
        both[:, :, :T].index_copy_(2, slots, k)
        both[:, :, T:].index_copy_(2, slots, v)
        return q, both

    assert op_names(check_rewrite(program, *inputs(), expect={"rope": 2})) == ["rope_qk"]
    (said,) = refusals(program)
    assert said.endswith("share their memory")


@pytest.mark.parametrize(("name", "dynamic"), [("llama", None), ("qwen3", None), ("gemma3", True)])
@torch.no_grad()
def test_models_leave_the_same_caches_behind(name: str, dynamic: bool | None) -> None:
    """Prompt and next token of a model, its graphs functionalised after the rewrite."""
    model = zoo.build(name, dtype=torch.float32, layers=1, head_dim=16)
    ids = zoo.token_ids(2, 7)
    results, done = [], Rewritten()

    def capture(gm: fx.GraphModule, example_inputs: Any) -> Any:
        rewrite(gm, "gfx942", done)
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

    for compiled in (False, True):
        torch._dynamo.reset()
        run = torch.compile(model, backend=capture, dynamic=dynamic) if compiled else model
        cache = StaticCache(config=model.config, max_cache_len=T)
        logits = [run(part, past_key_values=cache).logits for part in (ids[:, :6], ids[:, 6:])]
        layers = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        results.append((*logits, *layers))
    assert op_names(done).count("rope_cache_write") == len(done.graphs)
    assert not any("index_copy_" in graph for graph in done.graphs)
    for found, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
