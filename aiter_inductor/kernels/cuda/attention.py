"""Flash attention on Hopper's tensor cores; the Python side of attention.cu."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from aiter_inductor.core.heads import heads_first, heads_like
from aiter_inductor.core.launch import NO_MAP, tensor_map
from aiter_inductor.kernels.cuda.attention_config import (
    COLUMN,
    WARPGROUP_ROWS,
    AttentionConfig,
    AttentionVariant,
    padded,
)
from aiter_inductor.kernels.cuda.loading import arch_name, load_kernel
from aiter_inductor.kernels.prepared import Plans, facts_of, same_memory

L2_BYTES = 20 << 20  # of keys and values that heads advancing together may hold there


@dataclass(frozen=True)
class Hiding:
    """What queries do not see: arguments of the op `attention`."""

    causal: str
    window: int | None = None
    first_keys: Tensor | None = None

    def named_keys(self) -> Tensor | None:
        """The first keys as kernels read them."""
        return None if self.first_keys is None else self.first_keys.contiguous()


@dataclass(frozen=True)
class Packed:
    """Where the sequences of a batch start, and the end of the last: [num_sequences + 1], int32."""

    q_starts: Tensor
    k_starts: Tensor

    @property
    def num_sequences(self) -> int:
        """How many there are."""
        return self.q_starts.shape[0] - 1


def blocks_of(rows: int, size: int, packed: Packed | None) -> int:
    """Blocks of `size` rows of a batch: the slots of attention_packed.h where it is packed."""
    return rows // size + packed.num_sequences if packed else -(-rows // size)


def starts_of(packed: Packed | None) -> tuple[Tensor | None, Tensor | None]:
    """As kernels take them."""
    return (packed.q_starts, packed.k_starts) if packed else (None, None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    first_keys: Tensor | None = None,
    *,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    layout: str = "bhsd",
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attention without its log-sum-exp; see the op of this name."""
    refuse_mask(mask)
    out = heads_like(q, v, layout)
    hiding = Hiding(causal, window, first_keys)
    _attend(q, k, v, sinks, out, None, scale, hiding, softcap, config)
    return out


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    first_keys: Tensor | None = None,
    *,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    layout: str = "bhsd",
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp; see the op of this name."""
    refuse_mask(mask)
    out = heads_like(q, v, layout)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    hiding = Hiding(causal, window, first_keys)
    _attend(q, k, v, sinks, out, lse, scale, hiding, softcap, config)
    return out, lse


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attention within packed sequences; see the op of this name."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    packed = Packed(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    q, k, v, of_heads = map(heads_first, (q, k, v, out))
    hiding = Hiding(causal, window)
    _attend(q, k, v, sinks, of_heads, None, scale, hiding, softcap, config, packed)
    return out


def attention_varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The same and its log-sum-exp; see the op of this name."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    packed = Packed(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    q, k, v, of_heads = map(heads_first, (q, k, v, out))
    of_lse = lse.unsqueeze(0)
    hiding = Hiding(causal, window)
    _attend(q, k, v, sinks, of_heads, of_lse, scale, hiding, softcap, config, packed)
    return out, lse


def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: str = "none",
    layout: str = "bhsd",
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attention of heads in two parts; see the op of this name."""
    out = heads_like(q_nope, v, layout)
    parts, rest = (q_nope, k_nope, v), (q_rope, k_rope)
    _attend(*parts, None, out, None, scale, Hiding(causal), None, config, rest=rest)
    return out


def refuse_mask(mask: Tensor | None) -> None:
    """Raise ValueError for what these kernels do not read."""
    if mask is not None:
        raise ValueError(f"the kernel reads no mask, and one of {tuple(mask.shape)} is given")


class _Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    q_rest: Tensor | None
    k_rest: Tensor | None
    sinks: Tensor | None
    first_keys: Tensor | None
    q_starts: Tensor | None
    k_starts: Tensor | None

    def taken(self) -> _Inputs:
        """As the kernel reads them: the same tensors, or copies."""
        heads = (None if x is None else readable(x) for x in self[:5])
        q, k, v, q_rest, k_rest = heads
        assert q is not None
        assert k is not None
        assert v is not None
        sinks = None if self.sinks is None else self.sinks.float()
        first_keys, *starts = (None if x is None else x.contiguous() for x in self[6:])
        return _Inputs(q, k, v, q_rest, k_rest, sinks, first_keys, *starts)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    hiding: Hiding,
    softcap: float | None,
    config: AttentionConfig | None,
    packed: Packed | None = None,
    rest: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill `out`, and `lse` if there is one; `rest` are the last columns of queries and keys."""
    if out.numel() == 0:
        return
    if k.shape[2] == 0:
        _see_nothing(out, lse, sinks)
        return
    q_rest, k_rest = rest or (None, None)
    given = _Inputs(q, k, v, q_rest, k_rest, sinks, hiding.first_keys, *starts_of(packed))
    style = hiding.causal, hiding.window, softcap is not None, config
    key = style, facts_of(*given), out.stride()
    plan = _PLANS.get(key) or _PLANS.keep(key, AttentionPlan.of(given, out, *style))
    if plan.copies:
        given = given.taken()
    plan.run(given, out, lse, scales_of(scale, softcap))


@dataclass(frozen=True)
class AttentionPlan:
    """All of a launch but its addresses and scales.

    Attributes:
        copies: whether the kernel takes copies of some inputs.
        launch: the kernel.
        maps: of q, k, v and the last columns of q and k, if they lie apart.
        counts: whether blocks count the rows that they take, which take unequally long.
        numbers, strides: its arguments before and behind the scales.
    """

    copies: bool
    launch: Callable[..., None]
    maps: tuple[bytes, ...]
    counts: bool
    numbers: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(
        cls,
        given: _Inputs,
        out: Tensor,
        causal: str,
        window: int | None,
        softcap: bool,
        config: AttentionConfig | None,
    ) -> AttentionPlan:
        """The plan of all calls with these facts."""
        taken = given.taken()
        q, k, v, rest, named = taken.q, taken.k, taken.v, taken.q_rest, taken.first_keys is not None
        (batch, num_heads, num_queries, qk_dim), (kv_heads, num_keys) = q.shape, k.shape[1:3]
        packed = None
        if taken.q_starts is not None and taken.k_starts is not None:
            packed = Packed(taken.q_starts, taken.k_starts)
        rest_dim = 0 if rest is None else rest.shape[-1]
        widths = padded(qk_dim) + padded(rest_dim), padded(v.shape[-1])
        many = packed is not None
        config = config or AttentionConfig.default(*widths, num_queries, packed=many or named)
        kinds = causal != "none", window is not None, softcap, many
        fp16 = q.dtype == torch.float16
        variant = AttentionVariant(config, *widths, *kinds, fp16, padded(rest_dim) // COLUMN, named)
        kernel = load_kernel(variant, arch_name(q.device), q.device.type)
        row_blocks, per_kv = blocks_of(num_queries, config.rows, packed), num_heads // kv_heads
        items, num_sms = batch * num_heads * row_blocks, _num_sms(q.device)
        from_end = causal == "bottom_right"
        sizes = (num_heads, per_kv, batch * num_heads, num_queries, num_keys)
        order = (window or 0, row_blocks, together_of(q, k, v, rest_dim))
        rows, keys = WARPGROUP_ROWS, config.block_n
        boxes = (q, rows), (k, keys), (v, keys), (taken.q_rest, rows), (taken.k_rest, keys)
        maps = tuple(NO_MAP if x is None else heads_map(x, size) for x, size in boxes)
        return cls(
            not same_memory(given, taken),
            partial(kernel.launch, min(items, num_sms), config.threads, variant.shared_bytes),
            maps,
            (variant.causal or variant.window or many or named) and items > num_sms,
            (
                *(*sizes, num_keys - num_queries if from_end else 0, *order),
                *(packed.num_sequences if packed else 0, int(from_end), v.shape[-1]),
            ),
            out.stride()[:3],
        )

    def run(
        self, taken: _Inputs, out: Tensor, lse: Tensor | None, scales: tuple[float, float, float]
    ) -> None:
        """Launch for inputs and an output of the plan's facts."""
        q, k, v, q_rest, k_rest, sinks, *positions = taken
        of_q, of_k, of_v, of_q_rest, of_k_rest = self.maps
        first_keys, q_starts, k_starts = positions
        self.launch(
            *((of_q, q, 0), (of_k, k, 0), (of_v, v, 0)),
            of_q_rest if q_rest is None else (of_q_rest, q_rest, 0),
            of_k_rest if k_rest is None else (of_k_rest, k_rest, 0),
            *(out, lse, sinks),
            torch.zeros(1, dtype=torch.int32, device=q.device) if self.counts else None,
            *(q_starts, k_starts, first_keys, *self.numbers, *scales, *self.strides),
        )


_PLANS = Plans[AttentionPlan]()


def scales_of(
    scale: float, softcap: float | None, *, gradients: bool = False
) -> tuple[float, float, float]:
    """What is multiplied by scores or their tanh, the same times log2(e), and what is in the tanh.

    The first is the softmax's factor; of `gradients`, it is that on the gradients of raw scores.
    """
    log2_e = math.log2(math.e)
    if softcap is None:
        return scale, scale * log2_e, 0.0
    first = scale if gradients else softcap
    return first, softcap * log2_e, 2 * scale / softcap * log2_e


def together_of(q: Tensor, k: Tensor, v: Tensor, rest_dim: int = 0) -> int:
    """Query heads that advance side by side: so many as keys and values stay in the L2."""
    (batch, num_heads), (kv_heads, num_keys, qk_dim) = q.shape[:2], k.shape[1:]
    key_bytes = num_keys * (qk_dim + rest_dim + v.shape[-1]) * 2
    together = max(L2_BYTES // max(key_bytes, 1), 1) * (num_heads // kv_heads)
    return min(together, batch * num_heads)


def _see_nothing(out: Tensor, lse: Tensor | None, sinks: Tensor | None) -> None:
    """What attention over no keys gives."""
    out.zero_()
    if lse is not None and sinks is not None:
        lse.copy_(sinks[:, None])
    elif lse is not None:
        lse.fill_(-math.inf)


def heads_map(heads: Tensor, rows: int) -> bytes:
    """By which TMA copies `rows` rows of one column of [B, H, S, D]."""
    return tensor_map(heads, (1, 1, rows, COLUMN))


def readable(heads: Tensor) -> Tensor:
    """[B, H, S, D] as TMA can read it: D contiguous, the others 16 bytes or multiples apart."""
    step = 16 // heads.element_size()
    strides = heads.stride()
    fits = strides[-1] == 1 and heads.data_ptr() % 16 == 0
    if fits and all(stride > 0 and stride % step == 0 for stride in strides[:-1]):
        return heads
    return heads.clone(memory_format=torch.contiguous_format)


@lru_cache
def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; on meta tensors an H200's."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
