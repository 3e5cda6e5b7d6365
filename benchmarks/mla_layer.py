"""DeepSeek-V3 attention layers, decoding or at prefill, under this backend and plain Inductor.

    python benchmarks/mla_layer.py --device cuda --batch 32 --kv-len 4096 --dtype bfloat16
    python benchmarks/mla_layer.py --device cpu --hidden 512 --heads 16 --kv-len 2048
    python benchmarks/mla_layer.py --device cuda --batch 1 --kv-len 4096 --prefill --layers 4

The layers are transformers' own, with random weights. Decoding one token, the cache is allocated
once at its full length, and each step writes its last row, as a server's cache does. At prefill,
`kv_len` tokens attend causally without a cache, and positions, rotary tables and mask are made once
for all layers, in the graph, by the calls of `DeepseekV3Model.forward`; with `--no-mask` the layers
get none and say `is_causal` themselves. Both versions run interleaved, on a GPU as replays of CUDA
graphs. Times are of one layer.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

import aiter_inductor
from aiter_inductor.cli.timing import measure, ratio


class FilledCache:
    """Latent rows of `kv_len` tokens of which `update` writes the last.

    Attributes:
        rows: [batch, 1, kv_len, R].
        rotated: [batch, 1, kv_len, rope].
    """

    def __init__(self, rows: Tensor, rotated: Tensor) -> None:
        self.rows, self.rotated = rows, rotated

    def update(self, rows: Tensor, rotated: Tensor, _layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Store the rows of the new token; all rows."""
        self.rows[:, :, -1:].copy_(rows)
        self.rotated[:, :, -1:].copy_(rotated)
        return self.rows, self.rotated


class Decoding(nn.Module):
    """One layer that stores a token's latent row and attends over the cache."""

    def __init__(self, config: DeepseekV3Config, cache: FilledCache) -> None:
        super().__init__()
        self.layer, self.cache = DeepseekV3Attention(config, layer_idx=0), cache
        self.rotary = DeepseekV3RotaryEmbedding(config)

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        """[batch, 1, hidden] of the token at `position` [batch, 1]."""
        tables = self.rotary(hidden, position)
        out: Tensor = self.layer(hidden, tables, None, past_key_values=self.cache)[0]
        return out


class Prefill(nn.Module):
    """Layers one after another, as a model without a cache calls them."""

    def __init__(self, config: DeepseekV3Config, num_layers: int, mask: bool) -> None:
        super().__init__()
        made = [DeepseekV3Attention(config, layer_idx=i) for i in range(num_layers)]
        self.layers, self.config, self.mask = nn.ModuleList(made), config, mask
        self.rotary = DeepseekV3RotaryEmbedding(config)

    def forward(self, hidden: Tensor, _: Tensor) -> Tensor:
        """[batch, kv_len, hidden] through every layer."""
        position = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        mask = None
        if self.mask:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=None,
                position_ids=position,
            )
        tables = self.rotary(hidden, position)
        for layer in self.layers:
            hidden = layer(hidden, tables, mask)[0]
        return hidden


def layer_config(args: argparse.Namespace) -> DeepseekV3Config:
    """DeepSeek-V3's, narrower where asked."""
    full = args.hidden == 7168
    return DeepseekV3Config(
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        q_lora_rank=1536 if full else args.hidden // 2,
        kv_lora_rank=512 if full else args.hidden // 4,
        qk_nope_head_dim=128 if full else 32,
        qk_rope_head_dim=64 if full else 16,
        v_head_dim=128 if full else 32,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )


def main() -> None:
    """Print both times and their ratio, and how far the results are apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    for name, default in (("hidden", 7168), ("heads", 128), ("batch", 32), ("kv-len", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prefill", action="store_true", help="all tokens at once, no cache")
    parser.add_argument("--layers", type=int, default=1, help="at prefill")
    parser.add_argument("--no-mask", action="store_true", help="at prefill: is_causal instead")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    config = layer_config(args)
    num_layers = args.layers if args.prefill else 1
    with device:
        first = 0 if args.prefill else args.kv_len - 1
        position = torch.arange(first, args.kv_len).expand(args.batch, -1)
        hidden = torch.randn(*position.shape, args.hidden, dtype=dtype)
        if args.prefill:
            model: nn.Module = Prefill(config, num_layers, not args.no_mask)
        else:
            model = Decoding(config, filled_cache(args, config, dtype))
        model.to(dtype).eval()
    compiled = {name: torch.compile(model, backend=name) for name in ("aiter", "inductor")}

    def step(name: str) -> Tensor:
        with torch.no_grad():
            result: Tensor = compiled[name](hidden, position)
            return result

    results = {name: step(name) for name in compiled}
    apart = (results["aiter"] - results["inductor"]).abs().max() / results["inductor"].abs().max()
    timings = measure(
        {name: [partial(step, name)] for name in compiled},
        device,
        graph=device.type == "cuda",
        rounds=args.rounds,
    )
    for site in aiter_inductor.report(compiled["aiter"]).sites:
        print(f"{site.pattern}: {site.status} {site.provider or ''} {site.reason}")
    for name, timing in timings.items():
        print(f"{name}: {timing.median_us / num_layers:.1f} us, spread {timing.spread:.3f}")
    print(f"inductor / aiter: {1 / ratio(timings['aiter'], timings['inductor']):.2f}")
    print(f"results apart, of the largest: {float(apart):.1e}")


def filled_cache(
    args: argparse.Namespace, config: DeepseekV3Config, dtype: torch.dtype
) -> FilledCache:
    """Random latent rows of every token."""
    sizes = (args.batch, 1, args.kv_len)
    rows = torch.randn(*sizes, config.kv_lora_rank, dtype=dtype)
    return FilledCache(rows, torch.randn(*sizes, config.qk_rope_head_dim, dtype=dtype))


if __name__ == "__main__":
    main()
