"""`attn_implementation="aiter"` for Hugging Face models, registered on demand.

    import aiter_inductor.transformers
    aiter_inductor.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="aiter")

Models with a softcap (Gemma 2) or sinks (GPT-OSS) then compute attention by one op, compiled or
not; others call `scaled_dot_product_attention`, which the backend recognises with its mask. Packed
sequences whose starts are handed over, as `DataCollatorWithFlattening` does, are attended to one by
one, and the mask is not read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "aiter"


def register() -> None:
    """Make `aiter` known to transformers as an attention, with the masks that SDPA is given.

    A registered attention without masks of its own gets none, and then reads padding as tokens.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of an attention's own code.

    Args:
        module: the attention; `is_causal` is read where the argument is None.
        query: [batch, num_heads, q_len, head_dim].
        key, value: [batch, num_kv_heads, kv_len, head_dim].
        attention_mask: as `sdpa_mask` builds it, True where a key is seen; None for all keys, or
            for those up to the query's own where the module is causal. Windows are in the mask.
        dropout: probability with which a weight is dropped.
        scaling: factor on the scores; None for `head_dim ** -0.5`.
        softcap: c in `c * tanh(scores / c)`, or None.
        s_aux: [num_heads], the sinks, or None.
        is_causal: overrides the module's.
        cu_seq_lens_q, cu_seq_lens_k: [num_sequences + 1], int32, or None: where the sequences
            start that the tokens of all rows together are made of.
        max_length_q: no sequence has more queries; None for all of them.
        sliding_window: keys that a query of packed sequences sees, its own included, or None.
        kwargs: what other attentions take.

    Returns:
        [batch, q_len, num_heads, head_dim], and no weights.

    Raises:
        ValueError: for dropout beside a softcap or sinks.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and not dropout:
        how = {"scale": scale, "softcap": softcap, "window": sliding_window}
        how["causal"] = "bottom_right" if causal else "none"
        starts = cu_seq_lens_q, cu_seq_lens_k
        return _packed(query, key, value, starts, s_aux, max_length_q, how), None
    causal = causal and attention_mask is None and query.shape[2] > 1
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).contiguous(), None
    if dropout:
        raise ValueError(f"dropout={dropout:g} beside a softcap or sinks: no weight can be dropped")
    return _capped_or_sunk(query, key, value, attention_mask, s_aux, scale, causal, softcap), None


def _capped_or_sunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    from aiter_inductor.lowerings.attention import attention

    out: Tensor = attention(
        query,
        key,
        value,
        mask,
        sinks,
        scale=scale,
        causal="top_left" if causal else "none",
        softcap=softcap,
        layout="bshd",
    )
    return out.transpose(1, 2)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: tuple[Tensor, Tensor],
    sinks: Tensor | None,
    longest: int | None,
    how: dict[str, Any],
) -> Tensor:
    """Attention of packed sequences, [batch, q_len, num_heads, head_dim]."""
    from aiter_inductor.lowerings.attention_varlen_backward import attention_varlen_with_lse

    tokens = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    of = tuple(start.to(torch.int32) for start in starts)
    most = query.shape[0] * query.shape[2] if longest is None else longest
    out, _ = attention_varlen_with_lse(*tokens, *of, sinks, max_seqlen_q=most, **how)
    found: Tensor = out.unflatten(0, (query.shape[0], query.shape[2]))
    return found
