"""transformers' attention by fastpeft where torch's own has no fast path: on a CPU, while there is dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastpeft.kernels.ops.attention.op import attention
from fastpeft.models.fast.small_parts import on_cpu

NAME = "fastpeft"
_PLAIN = {"is_causal", "position_ids", "output_hidden_states", "output_attentions", "use_cache", "return_dict"}
"""Keyword arguments that do not change what is computed, where they are None or False."""


def use(model: Any) -> bool:
    """Whether the model's attention goes through here now: encoders on torch's attention do."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    settings = model.config
    drops = getattr(settings, "attention_probs_dropout_prob", 0) or getattr(settings, "attention_dropout", 0)
    if getattr(settings, "_attn_implementation", None) != "sdpa" or not drops or getattr(settings, "is_decoder", False):
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return True


def stop_using(model: Any) -> None:
    model.set_attn_implementation("sdpa")


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query (N, H, Q, D), key and value (N, H, T, D); returns (N, Q, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = not any(value is not None and value is not False for key, value in settings.items() if key not in _PLAIN)
    if not (dropout and plain and on_cpu(query) and query.shape[1] == key.shape[1] and _is_bias(attention_mask)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attention(query, key, value, scale, attention_mask, dropout=dropout), None


def _is_bias(mask: torch.Tensor | None) -> bool:
    return mask is None or (mask.is_floating_point() and mask.ndim == 4 and mask.shape[1] == 1)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *arguments: Any,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> torch.Tensor | None:
    """(N, 1, 1, T), 0 and the lowest number, of padding alone; nothing is asked of its values."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if mask_function is not bidirectional_mask_function or arguments or attention_mask is None:
        if mask_function is not None:
            settings["mask_function"] = mask_function
        return sdpa_mask(
            batch_size, q_length, kv_length, *arguments, attention_mask=attention_mask, dtype=dtype, **settings
        )
    lowest = torch.finfo(dtype).min
    padding = attention_mask[:, None, None, -kv_length:].logical_not()
    return torch.zeros(padding.shape, dtype=dtype, device=padding.device).masked_fill_(padding, lowest)
