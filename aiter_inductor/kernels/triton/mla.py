"""Latent attention with the projections absorbed, and the cached keys split among programs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.launch import launchable
from aiter_inductor.kernels.triton.mla_kernel import mla_reduce_kernel, mla_split_kernel

MAX_SPLITS, OPEN_SPLITS = 32, 16
WANTED_PROGRAMS = 256  # an MI355X has 256 compute units, an MI300X 304, an H200 132


@dataclass(frozen=True)
class MlaConfig:
    """What one program handles.

    Attributes:
        block_h: heads, at least 16 for the matrix instructions.
        block_n: keys at a time.
        splits: parts of the cache that run side by side.
        num_warps: warps of 32 lanes; a chip with wider ones launches half as many.
        num_stages: tiles of keys under way at once; one on AMD, whose LDS holds no second tile.
    """

    block_h: int
    block_n: int
    splits: int
    num_warps: int = 8
    num_stages: int = 1

    @classmethod
    def default(
        cls,
        tokens: int | torch.SymInt,
        num_heads: int,
        kv_len: int | torch.SymInt,
        itemsize: int,
        width: int = 576,
    ) -> MlaConfig:
        """Splits until every compute unit has a program; tiles by what the chip's LDS holds.

        On an H100, 128 heads and 128 sequences of 4096 keys take 577 µs with 64 heads a program and
        805 with 32; 16 heads take 218 µs with tiles of 64 keys, two under way, and 225 with 32.

        Args:
            tokens: batch times q_len; OPEN_SPLITS splits where it or kv_len is not known.
            num_heads: query heads.
            kv_len: keys.
            itemsize: bytes an element. A tile of 32 bf16 rows of 512 is 32 KiB, half of a
                gfx942's LDS.
            width: latent and rotated numbers of a row; two tiles of 64 rows of 576 fit an H100.
        """
        block_h, block_n, warps, stages = 16, 32 if itemsize == 2 else 16, 8, 1
        if torch.version.cuda and itemsize == 2:
            block_h, warps = (64, 8) if num_heads >= 64 else (16, 4)
            block_n, stages = 64, 2 if width <= 576 else 1
        splits = OPEN_SPLITS
        if isinstance(tokens, int) and isinstance(kv_len, int):
            side_by_side = max(tokens * triton.cdiv(num_heads, block_h), 1)
            most = min(MAX_SPLITS, max(kv_len // (4 * block_n), 1))
            splits = min(triton.cdiv(WANTED_PROGRAMS, side_by_side), most)
        return cls(block_h, block_n, splits, warps, stages)

    def launch(self) -> dict[str, int]:
        """Keywords for the launch."""
        if torch.version.hip:
            return {"num_warps": max(self.num_warps // 2, 1), "num_stages": 1}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def mla_decode(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    mask: Tensor | None,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    config: MlaConfig | None = None,
) -> Tensor:
    """Attention over latent rows; see the op of this name."""
    num_heads, nope = q_nope.shape[1], q_nope.shape[-1]
    weight = kv_b_weight.unflatten(0, (num_heads, -1))
    q_latent = torch.einsum("bhsd,hdr->bhsr", q_nope, weight[:, :nope])
    out = attend(q_latent, q_rope, latent, k_rope, mask, scale, causal, config, kv_scale)
    return torch.einsum("bhsr,hdr->bhsd", out, weight[:, nope:]).contiguous()


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    config: MlaConfig | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """Attention of absorbed queries [batch, heads, q_len, R]: sums of latent rows, same shape."""
    q_latent, q_rope = q_latent.contiguous(), q_rope.contiguous()
    latent, k_rope = _rows(latent), _rows(k_rope)
    batch_size, num_heads, q_len, rank = q_latent.shape
    kv_len, rope, tokens = latent.shape[1], q_rope.shape[-1], batch_size * q_len
    config = config or MlaConfig.default(
        tokens, num_heads, kv_len, q_latent.element_size(), rank + rope
    )
    num_rows, splits = tokens * num_heads, config.splits
    partial = q_latent.new_empty(splits, num_rows, rank, dtype=torch.float32)
    lse = q_latent.new_empty(splits, num_rows, dtype=torch.float32)
    if mask is not None:
        mask = mask.expand(batch_size, num_heads, q_len, kv_len)
        mask = mask.to(torch.uint8) if mask.dtype == torch.bool else mask
    if isinstance(num_rows, int) and num_rows == 0:
        return torch.empty_like(q_latent)
    grid = (tokens, triton.cdiv(num_heads, config.block_h), splits)
    launchable(mla_split_kernel)[grid](
        q_latent,
        q_rope,
        latent,
        k_rope,
        None,
        None,
        mask,
        kv_scale,
        partial,
        lse,
        scale * math.log2(math.e),
        num_heads,
        q_len,
        kv_len,
        num_rows,
        latent.stride(0),
        latent.stride(1),
        k_rope.stride(0),
        k_rope.stride(1),
        0,
        *(mask.stride() if mask is not None else (0, 0, 0, 0)),
        CAUSAL=causal,
        PAGE=0,
        R=rank,
        ROPE=rope,
        BLOCK_R=triton.next_power_of_2(rank),
        BLOCK_ROPE=max(triton.next_power_of_2(rope), 16),
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_n,
        **config.launch(),
    )
    return reduced(partial, lse, torch.empty_like(q_latent))


def reduced(partial: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """Sums of all splits, weighted by what each saw, stored in `out`."""
    splits, num_rows, rank = partial.shape
    launchable(mla_reduce_kernel)[(num_rows,)](
        partial,
        lse,
        out,
        num_rows,
        SPLITS=splits,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        R=rank,
        BLOCK_R=triton.next_power_of_2(rank),
        num_warps=4,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
