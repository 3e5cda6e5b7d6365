"""What latent attention is asked to compute, what absorbing costs, and what its kernels take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import FP8_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.arguments import apart, misshapen, no_scale

HOPPER_RANK, HOPPER_ROPE = 512, 64
MAX_RANK, MAX_ROPE = 512, 128  # 16 heads of fp32 sums over 512 numbers fill 32 KiB of registers


@dataclass(frozen=True)
class MlaProblem:
    """Attention of several heads over one latent row a token.

    Attributes:
        batch_size: sequences.
        num_heads: query heads.
        q_len: new tokens of each sequence.
        kv_len: tokens in the cache.
        kv_lora_rank: numbers in a latent row.
        qk_nope_head_dim: numbers of a key head that are made from the latent row.
        qk_rope_head_dim: numbers of a key head that all heads share, with their position.
        v_head_dim: numbers of a value head.
        dtype: of queries, weight and result.
        mask: `none`, `bool` or the dtype of an additive mask.
        causal: whether token i of a sequence sees only the first i + 1 cached ones.
        mismatch: why the arguments do not fit together; empty if they do.
        cache_dtype: of the latent rows and the rotated parts, where it is not `dtype`: fp8, with a
            scale.
    """

    batch_size: Dim
    num_heads: Dim
    q_len: Dim
    kv_len: Dim
    kv_lora_rank: Dim
    qk_nope_head_dim: Dim
    qk_rope_head_dim: Dim
    v_head_dim: Dim
    dtype: torch.dtype
    mask: str = "none"
    causal: bool = False
    mismatch: str = ""
    cache_dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
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
    ) -> MlaProblem:
        """From the arguments of `mla_decode`."""
        batch_size, num_heads, q_len, nope = map(dim, q_nope.shape)
        rows, rank = map(dim, kv_b_weight.shape)
        problem = cls(
            batch_size=batch_size,
            num_heads=num_heads,
            q_len=q_len,
            kv_len=dim(latent.shape[1]),
            kv_lora_rank=rank,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=dim(q_rope.shape[-1]),
            v_head_dim=rows // num_heads - nope,
            dtype=q_nope.dtype,
            mask="none" if mask is None else short_name(mask.dtype),
            causal=causal,
        )
        misfit = _misfit(problem, (q_rope, latent, k_rope), mask, kv_scale)
        misfit = misfit or apart(q_nope, q_rope, latent, k_rope, kv_b_weight, mask, kv_scale)
        if latent.dtype in FP8_DTYPES and kv_scale is not None:
            problem = replace(problem, cache_dtype=latent.dtype)
            dtypes = [t.dtype for t in (q_nope, q_rope, kv_b_weight)]
            differing = _differing("q_nope, q_rope and weight", dtypes)
            rows = [t.dtype for t in (latent, k_rope)]
            wrong = differing or _differing("latent and k_rope", rows)
            return replace(problem, mismatch=wrong or misfit)
        dtypes = [t.dtype for t in (q_nope, q_rope, latent, k_rope, kv_b_weight)]
        differing = _differing("q_nope, q_rope, latent, k_rope and weight", dtypes)
        return replace(problem, mismatch=differing or misfit)

    def bytes_moved(self) -> Dim:
        """Cache, queries and weights read once, the result written once."""
        cached = self.batch_size * self.kv_len * (self.kv_lora_rank + self.qk_rope_head_dim)
        query = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        weights = self.num_heads * self._expanded * self.kv_lora_rank
        rows = self.batch_size * self.num_heads * self.q_len * query
        stored = (self.cache_dtype or self.dtype).itemsize
        return cached * stored + (weights + rows) * self.dtype.itemsize

    def flops(self) -> Dim:
        """Of the absorbed form: two a multiply-add."""
        a_pair = 2 * self.kv_lora_rank + self.qk_rope_head_dim
        a_query = self.kv_lora_rank * self._expanded + self.kv_len * a_pair
        return 2 * self.batch_size * self.num_heads * self.q_len * a_query

    def expanding_flops(self) -> Dim:
        """Of the program's form, which makes keys and values of all heads from the latent rows."""
        a_pair = self._expanded + self.qk_rope_head_dim
        a_key = self.kv_lora_rank * self._expanded + self.q_len * a_pair
        return 2 * self.batch_size * self.num_heads * self.kv_len * a_key

    def absorbing_costs_more(self) -> str | None:
        """Why the program's form needs fewer operations, or None if absorbing is no loss.

        Absorbed, a query row costs R·D once and 2·R + rope a key, where R is kv_lora_rank and D is
        nope + v; expanded, a key costs R·D once and D + rope a query row. A kv_len that is not
        known when compiling counts as long.
        """
        q_len, kv_len = fixed(self.q_len), fixed(self.kv_len)
        rank, expanded = fixed(self.kv_lora_rank), fixed(self._expanded)
        if q_len is None or rank is None or expanded is None:
            return f"q_len={self.q_len} is not known when compiling; absorbing pays for few tokens"
        a_pair = q_len * (2 * rank - expanded)
        if kv_len is None:
            absorbed, saved, unit = a_pair, rank * expanded, "each key"
        else:
            absorbed = q_len * rank * expanded + kv_len * a_pair
            saved, unit = kv_len * rank * expanded, f"{kv_len} keys"
        if absorbed < saved:
            return None
        return (
            f"absorbing the weights into q_len={q_len} queries adds {absorbed} multiply-adds a "
            f"head for {unit} and saves {saved}"
        )

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random heads, a cache and weights; a mask, if any, hides the first third of each row."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: Dim) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        heads, stored = (
            (self.batch_size, self.num_heads, self.q_len),
            self.cache_dtype or self.dtype,
        )
        weight = normal(self.num_heads * self._expanded, self.kv_lora_rank)
        args = (
            normal(*heads, self.qk_nope_head_dim),
            normal(*heads, self.qk_rope_head_dim),
            normal(self.batch_size, self.kv_len, self.kv_lora_rank).to(stored),
            normal(self.batch_size, self.kv_len, self.qk_rope_head_dim).to(stored),
            weight / self.kv_lora_rank**0.5,
            self._sample_mask(device),
            torch.full((1,), 0.5, device=device) if self.cache_dtype else None,
        )
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        return args, {"scale": scale, "causal": self.causal}

    def _sample_mask(self, device: str) -> Tensor | None:
        if self.mask == "none":
            return None
        seen: Tensor = torch.arange(self.kv_len, device=device) >= self.kv_len // 3
        seen = seen.expand(self.batch_size, 1, self.q_len, self.kv_len)
        if self.mask == "bool":
            return seen
        added = torch.zeros(seen.shape, dtype=self.dtype, device=device)
        return added.masked_fill(~seen, -torch.inf)

    @property
    def _expanded(self) -> Dim:
        return self.qk_nope_head_dim + self.v_head_dim


def mla_unsupported(problem: MlaProblem, use: Use) -> str | None:
    """What no formulation of latent attention takes."""
    if problem.mismatch:
        return problem.mismatch
    if not problem.dtype.is_floating_point or problem.dtype.itemsize < 2:
        return f"latent rows are {short_name(problem.dtype)} without a scale"
    if problem.cache_dtype and problem.cache_dtype not in use.arch.fp8_dtypes:
        return f"{use.arch} has no instructions for {short_name(problem.cache_dtype)}"
    return None


def split_mla_unsupported(problem: MlaProblem, use: Use) -> str | None:
    """What the split-KV kernel does not take."""
    if reason := mla_unsupported(problem, use):
        return reason
    if problem.dtype.itemsize > 4:
        return f"latent rows are {short_name(problem.dtype)}; sums are kept in fp32"
    for name, most in (("kv_lora_rank", MAX_RANK), ("qk_rope_head_dim", MAX_ROPE)):
        width = fixed(getattr(problem, name))
        if width is None or width > most:
            return f"{name}={getattr(problem, name)} is not a number up to {most}"
    if fixed(problem.num_heads) is None:
        return f"num_heads={problem.num_heads} is not known when compiling"
    return None


def hopper_mla_unsupported(problem: MlaProblem, use: Use) -> str | None:
    """What the CUDA kernel does not take; its tiles are DeepSeek's latent rows, bf16 or e4m3."""
    if reason := mla_unsupported(problem, use):
        return reason
    if problem.dtype != torch.bfloat16:
        return f"latent rows are {short_name(problem.dtype)}, not bfloat16"
    for name, width in (("kv_lora_rank", HOPPER_RANK), ("qk_rope_head_dim", HOPPER_ROPE)):
        if fixed(getattr(problem, name)) != width:
            return f"{name}={getattr(problem, name)} is not {width}"
    if problem.mask != "none" or problem.causal:
        return f"it reads no mask: mask={problem.mask} causal={problem.causal}"
    return None


def _misfit(
    problem: MlaProblem,
    others: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    kv_scale: Tensor | None,
) -> str:
    """What does not go with `q_nope` and the weight, or nothing."""
    q_rope, latent, k_rope = others
    heads = problem.batch_size, problem.num_heads, problem.q_len
    rows = problem.batch_size, problem.kv_len
    wide = "" if mask is None or mask.dim() == 4 else f"the mask has {mask.dim()} dimensions, not 4"
    return (
        misshapen("q_rope", q_rope, (*heads, problem.qk_rope_head_dim))
        or misshapen("latent", latent, (*rows, problem.kv_lora_rank))
        or misshapen("k_rope", k_rope, (*rows, problem.qk_rope_head_dim))
        or no_scale("kv_scale", kv_scale)
        or wide
    )


def _differing(names: str, dtypes: list[torch.dtype]) -> str:
    if len(set(dtypes)) == 1:
        return ""
    return f"{names} are {', '.join(map(short_name, dtypes))}, not of one dtype"
