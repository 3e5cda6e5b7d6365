"""Models by name: real configurations with few layers and random weights, and small variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Model:
    """One configuration.

    Attributes:
        model_type: as transformers calls it.
        layers: decoder layers by default.
        tokens: inputs by default, `BATCHxLENGTH`.
        sizes: entries of the configuration.
        attention: `attn_implementation`.
    """

    model_type: str
    layers: int
    tokens: tuple[str, ...]
    sizes: Mapping[str, Any]
    attention: str = "sdpa"


_SMALL: Mapping[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LARGE_TOKENS = ("1x4096", "64x1")
_SMALL_TOKENS = ("1x256", "16x1")

MODELS: Mapping[str, Model] = {
    "llama-3-8b": Model(
        "llama",
        4,
        _LARGE_TOKENS,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
    "gemma-2-9b": Model(
        "gemma2",
        4,
        _LARGE_TOKENS,
        {
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
        },
        "eager",
    ),
    "gemma-3-12b": Model(
        "gemma3_text",
        6,  # five with a window and one without
        _LARGE_TOKENS,
        {
            "vocab_size": 262208,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
        },
    ),
    "gpt-oss-20b": Model(
        "gpt_oss",
        4,
        _LARGE_TOKENS,
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
        "eager",
    ),
    "qwen3-8b": Model(
        "qwen3",
        4,
        _LARGE_TOKENS,
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
        },
    ),
    "qwen3-30b-a3b": Model(
        "qwen3_moe",
        4,
        _LARGE_TOKENS,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
        },
    ),
    "deepseek-v3": Model(
        "deepseek_v3",
        2,
        _LARGE_TOKENS,
        # transformers' defaults are the 671B model's; a quarter of its experts fits any card, and
        # a token meets as many of them.
        {"first_k_dense_replace": 1, "n_routed_experts": 64},
    ),
    "small-llama": Model("llama", 4, _SMALL_TOKENS, {**_SMALL, "num_key_value_heads": 2}),
    "small-gemma2": Model(
        "gemma2",
        4,
        _SMALL_TOKENS,
        {**_SMALL, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64},
        "eager",
    ),
    "small-qwen3": Model(
        "qwen3", 4, _SMALL_TOKENS, {**_SMALL, "num_key_value_heads": 2, "head_dim": 64}
    ),
    "small-deepseek-v3": Model(
        "deepseek_v3",
        2,
        _SMALL_TOKENS,
        {
            **_SMALL,
            "num_key_value_heads": 4,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
        },
    ),
}


def build(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
) -> PreTrainedModel:
    """The model `name` with random weights, in eval mode, made on `device`.

    Raises:
        KeyError: for a name that is not in `MODELS`.
        ImportError: without transformers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model = MODELS[name]
    config = AutoConfig.for_model(
        model.model_type, **model.sizes, num_hidden_layers=layers or model.layers
    )
    torch.manual_seed(0)
    with torch.device(device):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=model.attention
        )
    return built.eval()


def token_ids(
    model: PreTrainedModel, batch: int, length: int, *, device: torch.device | str, seed: int = 0
) -> torch.Tensor:
    """Random tokens of the model's vocabulary, [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length)
    return torch.randint(3, model.config.vocab_size, shape, generator=generator).to(device)
