"""What this package recognises and what it fuses, in the order in which it is tried."""

from __future__ import annotations

from aiter_inductor.core.match import Fusion, Recogniser
from aiter_inductor.patterns.fusion import (
    add_norm,
    attention_parts,
    into_quant,
    preshuffle,
    quant_once,
    residual_into_gemm,
    rope_into_cache,
    rope_pair,
)
from aiter_inductor.patterns.raising import (
    act_and_mul,
    attention,
    attention_eager,
    called,
    gemm,
    gemm_batched,
    gemm_int4pack,
    gemm_scaled_after,
    gemm_scaled_mm,
    gemm_torchao,
    layer_norm,
    mla,
    moe_route,
    mxfp4,
    quant,
    quant_decomposed,
    quant_int4,
    rms_norm,
    rope,
)

RAISING: tuple[Recogniser, ...] = (
    attention.masked_operator,
    called.called_operator,
    layer_norm.functional_layer_norm,
    layer_norm.spelled_layer_norm,
    layer_norm.deviation_layer_norm,
    rms_norm.functional_rms_norm,
    rms_norm.spelled_rms_norm,
    rms_norm.other_rms_norm,
    quant.spelled_quant,
    quant_int4.packed_int4,
    quant_decomposed.decomposed_quant,
    rope.rotary_embedding,
    act_and_mul.gated_activation,
    act_and_mul.clamped_swiglu,
    gemm.dequantised_linear,
    gemm_scaled_after.scaled_product,
    gemm_batched.dequantised_bmm,
    gemm_scaled_mm.library_call,
    gemm_torchao.torchao_linear,
    gemm_int4pack.int4pack_call,
    mxfp4.dequantised_mxfp4,
    mla.latent_attention,
    attention.fused_attention,
    attention_eager.spelled_attention,
    moe_route.routed_experts,
)

FUSION: tuple[Fusion, ...] = (
    add_norm.add_into_rms_norm,
    quant_once.quant_once,
    into_quant.norm_into_quant,
    into_quant.act_into_quant,
    rope_pair.rope_into_pair,
    rope_pair.qk_norm_into_rope,
    rope_into_cache.rope_into_cache,
    attention_parts.parts_into_attention,
    preshuffle.preshuffle,
    residual_into_gemm.residual_into_gemm,
)

PATTERNS = (
    *(rule.pattern for rule in RAISING if rule is not called.called_operator),
    *(rule.name for rule in FUSION),
)
"""Names by which each can be switched off; a called operator is by its own name."""
