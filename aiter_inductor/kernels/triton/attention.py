"""Flash attention; the host side of attention_kernel.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from aiter_inductor.core.heads import heads_first, heads_like
from aiter_inductor.kernels.triton.attention_kernel import attention_kernel
from aiter_inductor.kernels.triton.launch import launchable

MIN_TILE = 16  # columns, the depth of the smallest matrix instruction


@dataclass(frozen=True)
class AttentionConfig:
    """What one program handles; each field is a column of the tuned table.

    Attributes:
        block_m: queries.
        block_n: keys at a time.
        num_warps: warps of 32 lanes; a chip with wider ones launches half as many.
        num_stages: tiles of keys and values in flight.
        heads_together: heads that advance side by side, their longest blocks of queries first.
    """

    block_m: int
    block_n: int
    num_warps: int = 8
    num_stages: int = 2
    heads_together: int = 8

    @classmethod
    def default(
        cls,
        qk_dim: int,
        itemsize: int,
        *,
        amd: bool,
        window: int | None = None,
        masked: bool = False,
    ) -> AttentionConfig:
        """Untuned choice; on Hopper the best of 12 to 24 that were raced at 4096 tokens.

        Args:
            qk_dim: elements a head of queries and keys.
            itemsize: bytes an element.
            amd: whether tiles must fit 64 KiB, the LDS of a gfx942.
            window: keys a query sees; a short one leaves large tiles mostly masked.
            masked: whether tiles of a mask are in flight too; three of them and of heads of 192
                exceed Hopper's shared memory.
        """
        if itemsize > 2:
            return cls(64, 32, num_warps=8, num_stages=1)
        if amd:
            return cls(128, 64 if qk_dim <= 128 else 32, num_warps=8, num_stages=1)
        if window is not None and window <= 512:
            return cls(64, 32, num_warps=4, num_stages=3 if qk_dim <= 128 else 2)
        if qk_dim <= 128:
            return cls(64, 64, num_warps=4, num_stages=3)
        block_n = 64 if qk_dim <= 192 else 32
        return cls(128, block_n, num_warps=8, num_stages=2 if masked else 3)

    def launch(self) -> dict[str, int]:
        """Keywords for the launch."""
        warps = max(self.num_warps // 2, 1) if torch.version.hip else self.num_warps
        return {"num_warps": warps, "num_stages": self.num_stages}


def tiles(width: int) -> tuple[int, int]:
    """Widths of the one or two tiles, powers of two, that hold a head; 0 for no second one."""
    first = max(triton.next_power_of_2(width + 1) // 2, MIN_TILE)
    rest = width - first
    return first, max(triton.next_power_of_2(rest), MIN_TILE) if rest > 0 else 0


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
    out = heads_like(q, v, layout)
    hiding = (mask, causal, window, first_keys)
    _attend(q, k, v, hiding, sinks, out, None, scale, softcap, config)
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
    out = heads_like(q, v, layout)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    hiding = (mask, causal, window, first_keys)
    _attend(q, k, v, hiding, sinks, out, lse, scale, softcap, config)
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
    starts = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    q, k, v, of_heads = map(heads_first, (q, k, v, out))
    hiding = (None, causal, window, None)
    _attend(q, k, v, hiding, sinks, of_heads, None, scale, softcap, config, starts)
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
    starts = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    q, k, v, of_heads = map(heads_first, (q, k, v, out))
    of_lse = lse.unsqueeze(0)
    hiding = (None, causal, window, None)
    _attend(q, k, v, hiding, sinks, of_heads, of_lse, scale, softcap, config, starts)
    return out, lse


def innermost(x: Tensor) -> Tensor:
    """`x`, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied if it is not contiguous."""
    return None if x is None else x.contiguous()


def spread(mask: Tensor | None, *sizes: Any) -> tuple[Tensor | None, tuple[Any, ...]]:
    """A mask over all pairs of query and key, bool as uint8, and its strides.

    Only a bool mask is copied, before it is spread: Inductor cannot view bool as another dtype.
    """
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = mask.to(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask.expand(*sizes)
    return mask, mask.stride()


def head_sizes(qk_dim: int, v_dim: int) -> dict[str, int]:
    """Constants of the kernels that say how heads are cut into tiles."""
    (block_d, rest_d), (block_dv, rest_dv) = tiles(qk_dim), tiles(v_dim)
    return {
        "D": qk_dim,
        "DV": v_dim,
        "BLOCK_D": block_d,
        "REST_D": rest_d,
        "BLOCK_DV": block_dv,
        "REST_DV": rest_dv,
    }


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hiding: tuple[Tensor | None, str, int | None, Tensor | None],
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    softcap: float | None,
    config: AttentionConfig | None,
    packed: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """Fill `out`, and `lse` if it is asked for.

    Args:
        hiding: the mask, `causal`, the window and the first keys.
        packed: where each sequence starts among queries and keys, with the end of the last, and
            the most queries a sequence has; None if sequences are the batch.
    """
    mask, causal, window, first_keys = hiding
    q, k, v = innermost(q), innermost(k), innermost(v)
    batch, num_heads, S, qk_dim = q.shape
    T, v_dim = k.shape[2], v.shape[-1]
    amd = torch.version.hip is not None
    config = config or AttentionConfig.default(
        qk_dim, q.element_size(), amd=amd, window=window, masked=mask is not None
    )
    mask, mask_strides = spread(mask, batch, num_heads, S, T)
    cu_seqlens_q, cu_seqlens_k, longest = packed or (None, None, S)
    if cu_seqlens_q is not None:
        batch = cu_seqlens_q.shape[0] - 1
    num_blocks = triton.cdiv(longest, config.block_m)
    if isinstance(num_blocks, int) and num_blocks * batch * num_heads == 0:
        return
    launchable(attention_kernel)[(num_blocks * batch * num_heads,)](
        q,
        k,
        v,
        mask,
        sinks,
        contiguous(first_keys),
        cu_seqlens_q,
        cu_seqlens_k,
        out,
        lse,
        scale,
        softcap,
        window,
        num_heads,
        num_heads // k.shape[1],
        S,
        T,
        num_blocks,
        batch * num_heads,
        *_strides(q, packed is not None),
        *_strides(k, packed is not None),
        *_strides(v, packed is not None),
        *_strides(out, packed is not None),
        *((0, 0) if lse is None else _strides(lse, packed is not None)[:2]),
        *mask_strides,
        CAUSAL=causal != "none",
        FROM_END=causal == "bottom_right",
        **head_sizes(qk_dim, v_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        HEADS_TOGETHER=config.heads_together,
        **config.launch(),
    )


def _strides(x: Tensor, packed: bool) -> tuple[Any, ...]:
    """Of batch, head and row; packed sequences are told apart by their rows alone."""
    batch, head, row = x.stride()[:3]
    return 0 if packed else batch, head, row
