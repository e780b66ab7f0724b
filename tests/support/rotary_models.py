"""Tiny models whose rotary settings are not the default ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

THETA = 123456.0
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}

ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {"rope_theta": THETA})
        for name in (
            "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "olmo", "olmo2", "smollm3", "starcoder2",
            "granite", "cohere", "helium", "nemotron", "mixtral", "qwen2_moe", "ernie4_5", "glm", "glm4",
            "arcee", "seed_oss", "stablelm", "phi", "gpt_neox", "persimmon",
        )
    },
    "llama, linear": ("llama", {"rope_theta": THETA, **LINEAR}),
    "llama, llama3": ("llama", {"rope_theta": THETA, **LLAMA3}),
    "qwen2, yarn": ("qwen2", {"rope_theta": THETA, **YARN}),
    "qwen3, yarn": ("qwen3", {"rope_theta": THETA, **YARN}),
    "phi3, longrope": ("phi3", {"rope_theta": THETA, **LONG}),
    "stablelm, a quarter": ("stablelm", {"rope_theta": THETA, "partial_rotary_factor": 0.75}),
    "gpt_neox, a half": ("gpt_neox", {"rope_theta": THETA, "partial_rotary_factor": 0.5}),
    "gemma3": (
        "gemma3_text",
        {
            "full_attention": {"rope_theta": THETA, **LINEAR},
            "sliding_attention": {"rope_theta": 7000.0, "rope_type": "default"},
        },
    ),
    "modernbert": (
        "modernbert",
        {
            "full_attention": {"rope_theta": THETA, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 7000.0, "rope_type": "default"},
        },
    ),
}  # fmt: skip
"""Model type and rope_parameters by a name."""

_EXTRA: dict[str, dict[str, Any]] = {
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "phi3": {"original_max_position_embeddings": 16, "max_position_embeddings": 64},
    "mixtral": {"num_local_experts": 2},
    "qwen2_moe": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def rotary_config(name: str) -> Any:
    kind, rope = ROTARY[name]
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    rope = {k: dict(v) if isinstance(v, dict) else v for k, v in {"rope_type": "default", **rope}.items()}
    if "full_attention" in rope:
        rope.pop("rope_type")
    return transformers.AutoConfig.for_model(kind, **sizes | _EXTRA.get(kind, {}), rope_parameters=rope)


def auto_class(name: str) -> str:
    return "AutoModelForMaskedLM" if ROTARY[name][0] == "modernbert" else "AutoModelForCausalLM"


def make_rotary(name: str, folder: Path) -> Any:
    """The model, saved in `folder` as transformers saves it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, auto_class(name)).from_config(rotary_config(name)).eval()
    model.save_pretrained(folder)
    return model
