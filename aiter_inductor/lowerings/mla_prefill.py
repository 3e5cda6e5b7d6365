"""Causal attention of a prompt over keys that were made from latent rows (DeepSeek and kin)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.op import Use, op
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.arguments import apart, misshapen
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_hopper import others_attend_faster, wgmma_unsupported
from aiter_inductor.lowerings.attention_problem import AttentionProblem
from aiter_inductor.lowerings.providers import add_cuda

COLUMN = 64
"""Elements of a head that the kernel copies at once; a part begins with a column."""


@dataclass(frozen=True)
class MlaPrefillProblem(AttentionProblem):
    """Attention whose queries and keys lie in two parts; `qk_dim` counts both.

    Attributes:
        rope_dim: elements of the rotated part, whose keys all heads share.
    """

    rope_dim: Dim = 0

    @classmethod
    def of_parts(
        cls,
        q_nope: Tensor,
        q_rope: Tensor,
        k_nope: Tensor,
        k_rope: Tensor,
        v: Tensor,
        **how: Any,
    ) -> MlaPrefillProblem:
        """The problem behind the arguments of `mla_prefill`."""
        nope, rope_dim = dim(q_nope.shape[-1]), dim(q_rope.shape[-1])
        whole = vars(AttentionProblem.of(q_nope, k_nope, v, **how))
        wrong = whole["mismatch"] or _mismatch(q_nope, q_rope, k_nope, k_rope)
        return cls(**whole | {"qk_dim": nope + rope_dim, "rope_dim": rope_dim, "mismatch": wrong})

    def bytes_moved(self) -> Dim:
        """As of attention, the rotated part of the keys read once and not for each head."""
        shared = self.batch * (self.num_kv_heads - 1) * self.num_keys * self.rope_dim
        return super().bytes_moved() - shared * self.dtype.itemsize

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random parts; the values lie beside the first part of the keys, as a projection's."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: Dim) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        nope, heads = self.qk_dim - self.rope_dim, self.num_heads
        q = normal(self.batch, self.num_queries, heads, self.qk_dim).transpose(1, 2)
        kv = normal(self.batch, self.num_keys, heads, nope + self.v_dim).transpose(1, 2)
        q_rope = normal(self.batch, heads, self.num_queries, self.rope_dim)
        k_rope = normal(self.batch, 1, self.num_keys, self.rope_dim)
        kwargs = {name: getattr(self, name) for name in ("scale", "causal", "layout")}
        return (q[..., :nope], q_rope, kv[..., :nope], k_rope, kv[..., nope:]), kwargs


def _mismatch(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor) -> str:
    if len({x.dtype for x in (q_nope, q_rope, k_nope, k_rope)}) > 1:
        return "the parts of q and k are not of one dtype"
    if dim(k_rope.shape[1]) != 1:
        return f"the rotated part of the keys has {k_rope.shape[1]} heads, not 1 for all"
    rope_dim = dim(q_rope.shape[-1])
    keys = dim(k_nope.shape[0]), 1, dim(k_nope.shape[2]), rope_dim
    return (
        misshapen("q_rope", q_rope, (*map(dim, q_nope.shape[:-1]), rope_dim))
        or misshapen("k_rope", k_rope, keys)
        or apart(q_nope, q_rope, k_nope, k_rope)
    )


def parts_unsupported(problem: MlaPrefillProblem, use: Use) -> str | None:
    """What the CUDA kernel does not take, or takes longer for than torch for whole heads."""
    if reason := wgmma_unsupported(problem, use) or others_attend_faster(problem, use):
        return reason
    nope, rope_dim = fixed(problem.qk_dim - problem.rope_dim), fixed(problem.rope_dim)
    if nope is None or rope_dim is None or nope % COLUMN or rope_dim % 8:
        return f"parts of {nope} and {rope_dim} elements are not multiples of {COLUMN} and 8"
    return None


@op(problem=MlaPrefillProblem.of_parts)
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
) -> Tensor:
    """`attention` of heads whose parts are not put together; the keys' second part is shared.

    Args:
        q_nope: [B, H, S, nope], any float dtype.
        q_rope: [B, H, S, rope], rotated.
        k_nope: [B, H, T, nope].
        k_rope: [B, 1, T, rope], rotated, the same for every head.
        v: [B, H, T, Dv].
        scale, causal, layout: as of `attention`.

    Returns:
        [B, H, S, Dv], dtype of `q_nope`, dense in the order of `layout`.
    """
    k_rope = k_rope.expand(*k_nope.shape[:-1], k_rope.shape[-1])
    q, k = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1)
    out: Tensor = attention.reference(q, k, v, scale=scale, causal=causal, layout=layout)
    return out


add_cuda(mla_prefill, "attention", refuse=parts_unsupported)
