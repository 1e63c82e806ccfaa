"""Tiny random checkpoints, one per architecture family that the export is proven on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What makes each family different, beside the sizes: windows shorter than the text, caps, scales.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 9},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi3": {"sliding_window": 11},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_positions": 256},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "stablelm": {"partial_rotary_factor": 0.5},
    "cohere": {"logit_scale": 0.3},
    "smollm3": {},
    "starcoder2": {"sliding_window": 9},
    "phi": {"partial_rotary_factor": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def make_checkpoint(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint of a family (no tokenizer) and return its folder.

    Weights are drawn wide, so that greedy texts are not constant and a wrong operator shows.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = 0.3 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * wide)
            if "embed" in name:
                parameter.mul_(2.0)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder
