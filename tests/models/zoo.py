"""Tiny causal language models of transformers: every family's own graph, small enough for a test.

`build(name)` gives the real, unmodified class with random weights. Vectors (norm weights, biases,
attention sinks, router corrections) are moved off their initial zeros and ones, because a weight
that is forgotten or added twice would not show on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 128

_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LOCAL_EXPERTS: Mapping[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
_ROUTED_EXPERTS: Mapping[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_MLA: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    **_ROUTED_EXPERTS,
}


@dataclass(frozen=True)
class Family:
    """One model family: its transformers `model_type` and what it needs besides the common sizes.

    Attributes:
        attention: the implementation it runs by default; some families refuse sdpa.
    """

    model_type: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama"),
    "mistral": Family("mistral", {"sliding_window": None}),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", {"head_dim": 32}),
    "gemma2": Family("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}, "eager"),
    "gemma3": Family("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi3": Family("phi3"),
    "gpt_oss": Family("gpt_oss", {"head_dim": 16, **_LOCAL_EXPERTS}, "eager"),
    "mixtral": Family("mixtral", _LOCAL_EXPERTS),
    "qwen3_moe": Family(
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            **_ROUTED_EXPERTS,
        },
    ),
    "deepseek_v2": Family("deepseek_v2", {"topk_method": "group_limited_greedy", **_MLA}),
    "deepseek_v3": Family("deepseek_v3", _MLA),
    "glm4": Family("glm4", {"head_dim": 16}),
    "glm4_moe": Family(
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            **_ROUTED_EXPERTS,
        },
    ),
    "olmo2": Family("olmo2"),
    "minimax_m2": Family("minimax_m2", {"head_dim": 16, **_LOCAL_EXPERTS}),
    "llama4": Family(
        "llama4_text",
        {
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 1,
        },
    ),
    "phimoe": Family("phimoe", _LOCAL_EXPERTS),
}

REQUIRED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_oss",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
)
"""The families whose every norm and rotation must be recognised."""


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    experts: str | None = None,
    layers: int = 2,
    seed: int = 0,
    **sizes: Any,
) -> PreTrainedModel:
    """A model of the family `name` in eval mode, on the CPU, reproducible by `seed`.

    Args:
        name: a key of `FAMILIES`.
        dtype: of its parameters.
        attention: transformers' `attn_implementation`; None takes the family's own.
        experts: transformers' `experts_implementation`; None takes transformers' default.
        layers: number of decoder layers.
        seed: of the random weights; the global generator is left as it was.
        sizes: further entries of the configuration, over the family's.

    Raises:
        KeyError: for a family that is not in `FAMILIES`.
    """
    family = FAMILIES[name]
    chosen = {**_SIZES, "num_hidden_layers": layers, **family.sizes, **sizes}
    config = AutoConfig.for_model(family.model_type, **chosen)
    implementations: dict[str, Any] = {"attn_implementation": attention or family.attention}
    if experts is not None:
        implementations["experts_implementation"] = experts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **implementations)
        _perturb_vectors(model)
    return model.eval()


def token_ids(batch: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random tokens, [batch, length], int64, never a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)


def count_modules(model: torch.nn.Module, *names: str) -> int:
    """Modules of `model` whose class is called one of `names` or ends in one, such as `RMSNorm`."""
    return sum(type(module).__name__.endswith(names) for module in model.modules())


def _perturb_vectors(model: torch.nn.Module) -> None:
    vectors = [p for p in model.parameters() if p.dim() == 1]
    vectors += [b for name, b in model.named_buffers() if name.endswith("correction_bias")]
    with torch.no_grad():
        for vector in vectors:
            vector.add_(0.1 * torch.randn_like(vector))
